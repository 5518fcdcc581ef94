"""Virtual machines by QEMU, with KVM where it really works, else by translation (TCG).

How a machine is started, saved and cloned, and what holds at a crash: see DESIGN.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from blixard.errors import MachineLost, NotFound, NotSupportedHere, StoreUnavailable
from blixard.vm.hypervisor import accelerator as probing
from blixard.vm.hypervisor.confinement import Confinement
from blixard.vm.hypervisor.contract import Accelerator, HypervisorInfo, Machine, MachineShape, Template
from blixard.vm.hypervisor.definition import VERSION
from blixard.vm.hypervisor.guest_memory import Descriptors, copy_memory, create_memory, seal_memory
from blixard.vm.hypervisor.host_memory import available_mb, require_memory
from blixard.vm.hypervisor.launch import Launch, destroyed_on_error, unreadable
from blixard.vm.hypervisor.machine import QemuMachine
from blixard.vm.hypervisor.orphans import end_orphans
from blixard.vm.hypervisor.saved import (
    MAX_STATE_BYTES,
    CorruptTemplate,
    OpenTemplate,
    OpenTemplates,
    keep_state,
    note_use,
    open_saved,
    prune_saved,
    remove_leftovers,
    write_saved,
)

NAME = "qemu"


class QemuHypervisor:
    """Implements ``Hypervisor``. Needs qemu-system-x86_64 and bubblewrap; without them ``info`` says so and machines are refused."""

    def __init__(
        self,
        directory: Path,
        *,
        share_memory: bool = True,
        qemu: str = "qemu-system-x86_64",
        accelerator: Accelerator | None = None,
        available: Callable[[], int] = available_mb,
    ) -> None:
        """Nothing happens yet.

        ``directory`` is ``vm.directory``: what was found out about KVM is remembered there, and a kernel to try it with is looked for in its
        images. ``accelerator`` skips that probe. With ``share_memory`` false each clone gets a copy of the template's memory.
        ``available``: MB that the host can give.
        """
        self._directory = directory
        self._share_memory = share_memory
        self._qemu = qemu
        self._wanted = accelerator
        self._available = available
        self._opened = OpenTemplates()
        self._lock = threading.RLock()
        self._confinement: Confinement | None = None
        self._version = ""
        self._found: tuple[Accelerator, str] | None = None

    # What this host allows

    def info(self) -> HypervisorInfo:
        try:
            self._confine()
        except NotSupportedHere as error:
            missing = f"{error.message}: {error.hint}" if error.hint else error.message
            return HypervisorInfo(name=NAME, missing=missing)
        chosen, reason = self._choose(self._kernels())
        notes = (f"KVM is not used: {reason}",) if chosen is Accelerator.TCG else ()
        return HypervisorInfo(name=NAME, version=self._version, accelerator=chosen, notes=notes)

    def _confine(self) -> Confinement:
        """Return how to start QEMU. Raises ``NotSupportedHere``."""
        with self._lock:
            if self._confinement is None:
                found = Confinement.find(self._qemu)
                self._version = found.version()
                self._confinement = found
            return self._confinement

    def _kernels(self) -> list[Path]:
        return [*sorted(self._directory.glob("images/*/vmlinuz")), *sorted(Path("/boot").glob("vmlinuz-*"))]

    def _choose(self, kernels: Sequence[Path]) -> tuple[Accelerator, str]:
        """Return the accelerator, and why it is not KVM. Blocking when KVM must be tried first."""
        with self._lock:
            if self._wanted is not None:
                return self._wanted, "another accelerator was asked for"
            if self._found is not None:
                return self._found
            if reason := probing.refuse_device():
                self._found = Accelerator.TCG, reason
                return self._found
            return self._probe([kernel for kernel in kernels if os.access(kernel, os.R_OK)])

    def _probe(self, kernels: Sequence[Path]) -> tuple[Accelerator, str]:
        confinement = self._confine()
        host = probing.describe_host(self._version)
        answer = probing.recall(self._directory, host)
        if answer is None:
            if not kernels:
                return Accelerator.TCG, "it was not tried yet, for want of a kernel; the first guest image brings one"
            reason = probing.try_kernel(confinement, kernels[0])
            answer = probing.Answer(host=host, works=reason is None, reason=reason or "")
            probing.remember(self._directory, answer)
        self._found = (Accelerator.KVM, "") if answer.works else (Accelerator.TCG, answer.reason)
        return self._found

    async def _prepare(self, shape: MachineShape) -> tuple[Confinement, Accelerator]:
        """Raises ``NotSupportedHere``, ``NotEnoughMemory``."""
        if self._confinement is None or (self._wanted or self._found) is None:
            await asyncio.to_thread(self._decide, shape)
        require_memory(shape.memory_mb, self._available())
        return self._confine(), self._decide(shape)

    def _decide(self, shape: MachineShape) -> Accelerator:
        self._confine()
        return self._choose([shape.image.kernel])[0]

    # Machines

    async def boot(self, machine_id: str, shape: MachineShape, directory: Path) -> Machine:
        confinement, accelerator = await self._prepare(shape)
        with Descriptors() as owned:
            try:
                kernel = owned.own(await asyncio.to_thread(probing.load_file, shape.image.kernel))
                initrd = owned.own(await asyncio.to_thread(probing.load_file, shape.image.initrd))
            except OSError as error:
                raise unreadable(shape, error) from error
            memory = owned.own(create_memory("ram", shape.memory_mb << 20))
            launch = Launch(confinement, accelerator, shape, machine_id, directory)
            return await launch.start(memory, kernel=kernel, initrd=initrd, shared=True)

    async def clone(self, machine_id: str, template: Template, directory: Path) -> Machine:
        shape = template.shape
        confinement, accelerator = await self._prepare(shape)
        attached = self._opened.attach(template.directory)
        if attached is None:
            attached = await asyncio.to_thread(self._load, template)
        with Descriptors() as owned:
            memory, state = owned.own(attached[0]), owned.own(attached[1])
            if not self._share_memory:
                memory = owned.own(await asyncio.to_thread(copy_memory, memory, "ram"))
            launch = Launch(confinement, accelerator, shape, machine_id, directory)
            machine = await launch.start(memory, incoming=state, shared=not self._share_memory)
            async with destroyed_on_error(machine):
                await machine.load(f"fd:{state}", run=True, ignore_shared=True)
            return machine

    # Templates

    def template_path(self, shape: MachineShape, templates: Path) -> Path:
        return templates / self._key_of(shape)

    def _key_of(self, shape: MachineShape) -> str:
        """Raises ``NotSupportedHere``."""
        accelerator = self._decide(shape)
        parts = [str(VERSION), shape.image.digest, str(shape.memory_mb), str(shape.vcpus), str(shape.network)]
        parts += [accelerator.value, self._version]
        if accelerator is Accelerator.KVM:  # the guest has seen this very processor
            parts += [f"{name}={value}" for name, value in sorted(probing.describe_host(self._version).items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def find_template(self, shape: MachineShape, templates: Path) -> Template | None:
        path = self.template_path(shape, templates)
        template = Template(key=path.name, shape=shape, directory=path)
        remove_leftovers(templates)
        try:
            for descriptor in self._opened.attach(path) or self._load(template):
                os.close(descriptor)
        except NotFound:
            return None
        note_use(path)
        return template

    def _load(self, template: Template) -> tuple[int, int]:
        """Read and check it; return descriptors as ``attach``. Raises ``NotFound``; what is corrupt is removed."""
        directory = template.directory
        try:
            return self._opened.keep(directory, open_saved(directory, template.shape.memory_mb))
        except FileNotFoundError as error:
            raise NotFound(f"there is no template {directory}", hint="boot and save the machine anew") from error
        except CorruptTemplate as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise NotFound(f"the template {directory} was corrupt and is removed: {error}") from error
        except OSError as error:
            raise StoreUnavailable(f"the template {directory} cannot be read: {error}") from error

    async def save(self, machine: Machine, template: Path) -> Template:
        assert isinstance(machine, QemuMachine)
        with Descriptors() as owned:
            try:
                if machine.memory is None:
                    raise MachineLost(f"machine {machine.id} shares its memory with a template: take a snapshot of it")
                memory = owned.own(os.dup(machine.memory))
                if await machine.is_running():
                    await machine.settle()
                state = await _save_state(machine)
            finally:
                await machine.destroy()
            seal_memory(memory)
            await asyncio.to_thread(write_saved, template, memory, state)
            await asyncio.to_thread(prune_saved, template.parent)
            for descriptor in self._opened.keep(template, OpenTemplate(os.dup(memory), keep_state(state))):
                os.close(descriptor)
        return Template(key=template.name, shape=machine.shape, directory=template)

    async def snapshot(self, machine: Machine, template: Path) -> Template:
        assert isinstance(machine, QemuMachine)
        confinement, accelerator = await self._prepare(machine.shape)
        directory = template.with_name(f".snapshot-{template.name}-{os.urandom(4).hex()}")
        launch = Launch(confinement, accelerator, machine.shape, machine.id, directory)
        there, here = socket.socketpair()
        with there, here, Descriptors() as owned:
            memory = owned.own(create_memory("ram", machine.shape.memory_mb << 20))
            directory.mkdir(parents=True, mode=0o700)
            copy = await launch.start(memory, incoming=there.fileno(), shared=True, held=True)
            async with destroyed_on_error(copy):
                await _copy_over(machine, copy, incoming=there.fileno(), outgoing=here.fileno())
        return await self.save(copy, template)

    def end_orphans(self, directory: Path) -> int:
        return end_orphans(directory)

    def close(self) -> None:
        self._opened.close()


async def _save_state(machine: QemuMachine) -> bytes:
    """Return the state of the devices. Raises ``MachineLost``."""
    reading, writing = os.pipe()
    reader = asyncio.create_task(asyncio.to_thread(_read_state, reading), name="read a machine's state")
    try:
        await machine.send(writing, ignore_shared=True)
    except BaseException:
        await machine.destroy()  # so that the reader comes to an end
        raise
    finally:
        os.close(writing)
        await asyncio.wait({reader})
    return reader.result()


def _read_state(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(MAX_STATE_BYTES + 1)
    if len(data) > MAX_STATE_BYTES:
        raise MachineLost(f"the state of its devices is larger than {MAX_STATE_BYTES} bytes")
    return data


async def _copy_over(machine: QemuMachine, copy: QemuMachine, *, incoming: int, outgoing: int) -> None:
    """Let ``copy`` become what ``machine`` is, which then goes on if it was running. Raises ``MachineLost``."""
    runs = await machine.is_running()
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(copy.load(f"fd:{incoming}", run=False, ignore_shared=False), name="load a snapshot")
            tasks.create_task(machine.send(outgoing, ignore_shared=False), name="send a snapshot")
    except* MachineLost as errors:
        raise errors.exceptions[0] from None
    finally:
        if runs and not machine.is_gone:
            await machine.resume()

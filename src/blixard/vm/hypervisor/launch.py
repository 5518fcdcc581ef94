"""Starts one QEMU with all that it needs in its hands."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from blixard.errors import MachineLost, NotEnoughMemory, NotSupportedHere
from blixard.storage.locks import FileLock
from blixard.vm.hypervisor.confinement import Confinement
from blixard.vm.hypervisor.contract import Accelerator, MachineShape
from blixard.vm.hypervisor.definition import Attachments, arguments_of
from blixard.vm.hypervisor.guest_memory import Descriptors
from blixard.vm.hypervisor.machine import QemuMachine
from blixard.vm.hypervisor.orphans import LOCK


class Launch(msgspec.Struct, frozen=True):
    """One start of one machine. Whatever fails, nothing is left, the machine's directory neither."""

    confinement: Confinement
    accelerator: Accelerator
    shape: MachineShape
    machine_id: str
    directory: Path

    async def start(
        self,
        memory: int,
        *,
        shared: bool,
        kernel: int | None = None,
        initrd: int | None = None,
        incoming: int | None = None,
        held: bool = False,
    ) -> QemuMachine:
        """Return a machine that takes commands. It boots ``kernel``, or waits to be loaded through ``incoming``.

        ``held``: stand still once loaded. The caller keeps its descriptors. Raises ``MachineLost``, ``NotSupportedHere``.
        """
        machine = self._spawn(memory, shared, kernel, initrd, incoming, held)
        async with destroyed_on_error(machine):
            await machine.connect()
            if kernel is not None:
                await machine.resume()
        return machine

    def _spawn(
        self, memory: int, shared: bool, kernel: int | None, initrd: int | None, incoming: int | None, held: bool
    ) -> QemuMachine:
        (agent, agent_there), (monitor, monitor_there) = socket.socketpair(), socket.socketpair()
        with agent_there, monitor_there, contextlib.ExitStack() as on_error, Descriptors() as owned:
            on_error.callback(shutil.rmtree, self.directory, ignore_errors=True)
            on_error.enter_context(agent)
            on_error.enter_context(monitor)
            root = owned.own(self._open_root())
            lock = FileLock.create(self.directory / LOCK)
            owned.callback(lock.release)
            attached = Attachments(
                memory=memory,
                root=root,
                agent=agent_there.fileno(),
                monitor=monitor_there.fileno(),
                kernel=kernel,
                initrd=initrd,
            )
            arguments = arguments_of(self.shape, self.accelerator, attached, machine_id=self.machine_id, shared=shared)
            # A cold guest starts when we can hear it, a copy of a living one never: it is to be saved.
            arguments += ["-S"] if held or kernel is not None else []
            given = [memory, root, lock.fd, agent_there.fileno(), monitor_there.fileno(), kernel, initrd, incoming]
            process = self._start(arguments, [descriptor for descriptor in given if descriptor is not None])
            on_error.pop_all()
        return QemuMachine(
            self.machine_id, self.directory, self.shape, process, agent, monitor, os.dup(memory) if shared else None
        )

    def _start(self, arguments: list[str], keep: list[int]) -> subprocess.Popen[bytes]:
        try:
            return self.confinement.start(
                arguments,
                keep=keep,
                space_mb=self.shape.memory_mb,
                network=self.shape.network,
                kvm=self.accelerator is Accelerator.KVM,
            )
        except OSError as error:
            if error.errno in {errno.ENOMEM, errno.EAGAIN}:
                raise NotEnoughMemory(f"the host cannot start another process: {error.strerror}") from error
            raise MachineLost(f"machine {self.machine_id}: QEMU cannot be started: {error}") from error

    def _open_root(self) -> int:
        try:
            return os.open(self.shape.image.root, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(self.shape, error) from error


def unreadable(shape: MachineShape, error: OSError) -> NotSupportedHere:
    return NotSupportedHere(
        f"the guest image {shape.image.name!r} cannot be read: {error.strerror}: {error.filename}",
        hint="see that this user may read it, or build it anew: `blixard image build`",
    )


@contextlib.asynccontextmanager
async def destroyed_on_error(machine: QemuMachine) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        await machine.destroy()
        raise

"""A hypervisor in memory: machines that start at once, with a scripted agent at the other end of the port."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import shutil
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from blixard.errors import MachineLost, NotEnoughMemory, NotFound, NotSupportedHere
from blixard.vm.hypervisor.contract import Accelerator, HypervisorInfo, Machine, MachineShape, Template

READ_BYTES = 64 * 1024
MARK = "fake-template"


class Guest:
    """What a scripted agent sees of its machine.

    ``reader`` is the port's stream, ``memory`` what a template keeps and a clone gets a copy of, ``booted`` false in a clone.
    """

    def __init__(self, machine: FakeMachine, *, memory: dict[str, object], booted: bool) -> None:
        self.machine = machine
        self.memory = memory
        self.booted = booted
        self.reader = asyncio.StreamReader()

    async def write(self, data: bytes) -> None:
        await self.machine.write(data)

    def shut_down(self, cause: str = "guest shut down") -> None:
        self.machine.end(cause)


Agent = Callable[[Guest], Awaitable[None]]


async def silent(guest: Guest) -> None:
    """Says nothing and ignores what it is told, as a hung guest."""
    while await guest.reader.read(READ_BYTES):
        pass


class FakeMachine:
    """Implements ``Machine``. ``end`` makes it die by any cause."""

    def __init__(
        self,
        machine_id: str,
        directory: Path,
        shape: MachineShape,
        agent: Agent,
        guest_memory: dict[str, object],
        *,
        booted: bool,
    ) -> None:
        self.id = machine_id
        self.directory = directory
        self.shape = shape
        self.console = ""
        self.private_bytes = 16 << 20
        self.guest = Guest(self, memory=guest_memory, booted=booted)
        self._running = asyncio.Event()
        self._running.set()
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._host, self._port = socket.socketpair()
        self._port.setblocking(False)
        self._tasks = {
            asyncio.create_task(self._pump(), name=f"port of {machine_id}"),
            asyncio.create_task(self._run(agent), name=f"agent of {machine_id}"),
        }

    @property
    def is_gone(self) -> bool:
        return self._gone.done()

    @property
    def is_paused(self) -> bool:
        return not self._running.is_set()

    async def open_agent(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.check()
        return await asyncio.open_connection(sock=self._host.dup())

    async def pause(self) -> None:
        self.check()
        self._running.clear()

    async def resume(self) -> None:
        self.check()
        self._running.set()

    def private_memory(self) -> int:
        return 0 if self.is_gone else self.private_bytes

    async def wait(self) -> str:
        return await asyncio.shield(self._gone)

    async def destroy(self) -> None:
        self.end("destroyed")
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._host.close()
        self._port.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        self._tasks.clear()
        for error in ended:
            if isinstance(error, Exception):  # the script is wrong
                raise error

    def end(self, cause: str) -> None:
        """Let the machine be gone, as if its process had died. Allowed twice; the first cause counts."""
        if not self._gone.done():
            self._gone.set_result(cause)
            self._port.shutdown(socket.SHUT_RDWR)

    async def write(self, data: bytes) -> None:
        await self._running.wait()
        await asyncio.get_running_loop().sock_sendall(self._port, data)

    async def _pump(self) -> None:
        """Bytes reach the guest only while its processors run."""
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._port, READ_BYTES):
            await self._running.wait()
            self.guest.reader.feed_data(data)
        self.guest.reader.feed_eof()

    async def _run(self, agent: Agent) -> None:
        try:
            await agent(self.guest)
        except OSError:  # the machine ended while its agent was writing
            if not self.is_gone:
                raise

    def check(self) -> None:
        """Raise ``MachineLost`` with its cause if it is gone."""
        if self._gone.done():
            raise MachineLost(f"machine {self.id}: {self._gone.result()}")


class FakeHypervisor:
    """Implements ``Hypervisor``. ``agent`` runs in every machine.

    ``available``: MB that the host has left, changed at will; ``missing``: what the host lacks, if it cannot run machines at all. ``faults``:
    errors to raise, by the name of the method, each once. ``machines``: all that were made, oldest first.
    """

    def __init__(self, agent: Agent = silent, *, available: int = 1 << 20, missing: str = "") -> None:
        self.agent = agent
        self.available = available
        self.missing = missing
        self.faults: dict[str, list[Exception]] = {}
        self.machines: list[FakeMachine] = []
        self._saved: dict[Path, tuple[dict[str, object], bytes]] = {}

    @property
    def living(self) -> list[FakeMachine]:
        return [machine for machine in self.machines if not machine.is_gone]

    def info(self) -> HypervisorInfo:
        if self.missing:
            return HypervisorInfo(name="fake", missing=self.missing)
        return HypervisorInfo(name="fake", version="1", accelerator=Accelerator.TCG)

    async def boot(self, machine_id: str, shape: MachineShape, directory: Path) -> Machine:
        self._check("boot", shape)
        return self._add(machine_id, shape, directory, {}, booted=True)

    async def clone(self, machine_id: str, template: Template, directory: Path) -> Machine:
        self._check("clone", template.shape)
        memory = self._read(template.directory)
        if memory is None:
            raise NotFound(f"there is no template {template.directory}", hint="boot and save the machine anew")
        return self._add(machine_id, template.shape, directory, memory, booted=False)

    async def save(self, machine: Machine, template: Path) -> Template:
        assert isinstance(machine, FakeMachine)
        try:
            self._fail("save")
            machine.check()
            return self._write(machine, template)
        finally:
            await machine.destroy()

    async def snapshot(self, machine: Machine, template: Path) -> Template:
        assert isinstance(machine, FakeMachine)
        self._check("snapshot", machine.shape)
        machine.check()
        return self._write(machine, template)

    def template_path(self, shape: MachineShape, templates: Path) -> Path:
        words = f"{shape.image.digest} {shape.memory_mb} {shape.vcpus} {shape.network}"
        return templates / hashlib.sha256(words.encode()).hexdigest()[:32]

    def find_template(self, shape: MachineShape, templates: Path) -> Template | None:
        path = self.template_path(shape, templates)
        return None if self._read(path) is None else Template(key=path.name, shape=shape, directory=path)

    def end_orphans(self, directory: Path) -> int:
        del directory
        return 0

    def close(self) -> None:
        pass

    def _add(
        self, machine_id: str, shape: MachineShape, directory: Path, memory: dict[str, object], *, booted: bool
    ) -> FakeMachine:
        machine = FakeMachine(machine_id, directory, shape, self.agent, memory, booted=booted)
        self.machines.append(machine)
        return machine

    def _write(self, machine: FakeMachine, path: Path) -> Template:
        path.mkdir(parents=True, exist_ok=True)
        mark = machine.id.encode()
        (path / MARK).write_bytes(mark)
        self._saved[path] = copy.deepcopy(machine.guest.memory), mark
        return Template(key=path.name, shape=machine.shape, directory=path)

    def _read(self, path: Path) -> dict[str, object] | None:
        """Return a copy of what was saved; what was changed on disk is removed."""
        memory, mark = self._saved.get(path, ({}, b""))
        if path.exists() and (not (path / MARK).exists() or (path / MARK).read_bytes() != mark):
            shutil.rmtree(path)
        return copy.deepcopy(memory) if mark and path.exists() else None

    def _check(self, name: str, shape: MachineShape) -> None:
        self._fail(name)
        if self.missing:
            raise NotSupportedHere(f"no virtual machine can run here: {self.missing}")
        if shape.memory_mb > self.available:
            raise NotEnoughMemory(
                f"a virtual machine of {shape.memory_mb} MB is wanted, {self.available} MB are available"
            )

    def _fail(self, name: str) -> None:
        if self.faults.get(name):
            raise self.faults[name].pop(0)

"""One QEMU process."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from blixard.errors import MachineLost
from blixard.vm.hypervisor.causes import count_oom_kills, explain_end
from blixard.vm.hypervisor.confinement import child_of, kill_group
from blixard.vm.hypervisor.contract import MachineShape
from blixard.vm.hypervisor.idleness import wait_until_idle
from blixard.vm.hypervisor.monitor import CommandRefused, Monitor, MonitorLost
from blixard.vm.hypervisor.tail import Tail

T = TypeVar("T")

_STATE = "state"
_UNBOUNDED = 1 << 40
"""Bytes per second that a migration may write; it goes to this very process, not over a network."""

MONITOR_SECONDS = 60.0
"""How long QEMU may take over one command. It answers in microseconds; this is for a host that is loaded out of all measure."""
MIGRATION_SECONDS = 600.0
"""How long the copy of a machine's memory may take; the largest machine at a slow disk's speed."""
END_SECONDS = 30.0
"""How long the kernel may take to end a killed QEMU; it takes milliseconds."""


class QemuMachine:
    """Implements ``Machine``. Made by ``QemuHypervisor``, which starts the process."""

    def __init__(
        self,
        machine_id: str,
        directory: Path,
        shape: MachineShape,
        process: subprocess.Popen[bytes],
        agent: socket.socket,
        monitor: socket.socket,
        memory: int | None,
    ) -> None:
        """Everything is taken over. ``memory``: the file that holds all of the guest's memory, if the machine shares it with nobody."""
        self.id = machine_id
        self.directory = directory
        self.shape = shape
        self.memory = memory
        self._process = process
        self._agent = agent
        self._monitor = Monitor(monitor)
        self._loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[str] = self._loop.create_future()
        self._cause: str | None = None
        self._ending = asyncio.Lock()
        self._oom_kills = count_oom_kills()
        self._qemu: int | None = None
        assert process.stdout is not None
        assert process.stderr is not None
        self._console = Tail(os.dup(process.stdout.fileno()), self._look)
        self._complaint = Tail(os.dup(process.stderr.fileno()), self._look)
        process.stdout.close()
        process.stderr.close()
        self._handle: int | None = os.pidfd_open(process.pid)
        self._loop.add_reader(self._handle, self._reap)

    @property
    def console(self) -> str:
        return self._console.text + self._complaint.text

    @property
    def is_gone(self) -> bool:
        return self._gone.done()

    async def connect(self) -> None:
        """Returns when QEMU takes commands. Raises ``MachineLost``."""
        await self._ask(self._monitor.connect(), "start")
        self._qemu = child_of(self._process.pid)

    async def execute(self, command: str, **arguments: object) -> object:
        """Raises ``MachineLost``."""
        return await self._ask(self._monitor.execute(command, **arguments), command)

    async def load(self, uri: str, *, run: bool, ignore_shared: bool) -> None:
        """Load the state of a saved machine. ``ignore_shared``: without memory, which is in its file already."""
        await self._set_migration(ignore_shared=ignore_shared)
        await self._ask(self._monitor.load(uri, run=run), "migrate-incoming", MIGRATION_SECONDS)

    async def send(self, descriptor: int, *, ignore_shared: bool) -> None:
        """Stop, and write the machine's state to a pipe or socket; without memory if ``ignore_shared`` and it lies in a file."""
        await self.pause()
        await self._set_migration(ignore_shared=ignore_shared)
        await self.execute("migrate-set-parameters", **{"max-bandwidth": _UNBOUNDED})
        await self._ask(self._monitor.give(_STATE, descriptor), "getfd")
        await self._ask(self._monitor.send(f"fd:{_STATE}"), "migrate", MIGRATION_SECONDS)

    async def settle(self) -> None:
        """Return when the guest has nothing to do, or will not stop having."""
        if self._qemu is not None and not self._gone.done():
            await wait_until_idle(self._qemu)

    async def is_running(self) -> bool:
        status = await self.execute("query-status")
        return isinstance(status, dict) and status.get("running") is True

    async def _set_migration(self, *, ignore_shared: bool) -> None:
        wanted = {"x-ignore-shared": ignore_shared, "events": True}
        capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
        await self.execute("migrate-set-capabilities", capabilities=capabilities)

    async def _ask(self, question: Awaitable[T], name: str, seconds: float = MONITOR_SECONDS) -> T:
        """Wait for an answer or the machine's end, whichever is first."""
        asked = asyncio.ensure_future(question)
        try:
            either: tuple[asyncio.Future[T] | asyncio.Future[str], ...] = (asked, self._gone)
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if asked.done() and asked.exception() is None:
                return asked.result()
            raise await self._lost(asked, name)
        finally:
            asked.cancel()
            await asyncio.wait({asked})

    async def _lost(self, asked: asyncio.Future[T], name: str) -> MachineLost:
        error = asked.exception() if asked.done() else None
        if isinstance(error, CommandRefused):
            return MachineLost(f"machine {self.id}: QEMU refused {error}")
        if error is not None and not isinstance(error, MonitorLost):
            raise error
        # A closed monitor is the first sign of an end whose cause comes a moment later.
        await asyncio.wait({self._gone}, timeout=END_SECONDS if error is not None else 0)
        if self._gone.done():
            return MachineLost(f"machine {self.id}: {self._gone.result()}")
        return MachineLost(f"machine {self.id}: QEMU did not answer to {name} in time")

    async def open_agent(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._gone.done():
            raise MachineLost(f"machine {self.id}: {self._gone.result()}")
        return await asyncio.open_connection(sock=self._agent.dup())

    async def pause(self) -> None:
        await self.execute("stop")

    async def resume(self) -> None:
        await self.execute("cont")

    def private_memory(self) -> int:
        if self._gone.done():
            return 0
        try:
            lines = Path(f"/proc/{self._qemu}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) * 1024

    async def wait(self) -> str:
        return await asyncio.shield(self._gone)

    async def destroy(self) -> None:
        """Raises ``MachineLost`` only if the kernel does not end a killed process within half a minute."""
        async with self._ending:
            self._cause = self._cause or "destroyed"
            if not self._gone.done():
                kill_group(self._process)
            await asyncio.wait({self._gone}, timeout=END_SECONDS)
            if not self._gone.done():
                raise MachineLost(f"machine {self.id}: the kernel did not end QEMU within {END_SECONDS:g} s")
            await self._monitor.close()
            self._agent.close()
            self._close_descriptors()
            shutil.rmtree(self.directory, ignore_errors=True)

    def _reap(self) -> None:
        """The process that we started has ended, not necessarily of its own accord; QEMU is not to survive it."""
        assert self._handle is not None
        self._loop.remove_reader(self._handle)
        kill_group(self._process)
        self._process.wait()
        self._look()

    def _look(self) -> None:
        """QEMU is gone when nobody holds its outputs any more, however bubblewrap ended."""
        status = self._process.returncode
        if status is None or not (self._console.closed and self._complaint.closed) or self._gone.done():
            return
        self._gone.set_result(self._cause or self._explain(status))

    def _explain(self, status: int) -> str:
        return explain_end(
            status,
            console=self._console.text,
            complaint=self._complaint.text,
            oom_kills=count_oom_kills() - self._oom_kills,
        )

    def _close_descriptors(self) -> None:
        for descriptor in (self._handle, self.memory):
            if descriptor is not None:
                os.close(descriptor)
        self._handle = self.memory = None

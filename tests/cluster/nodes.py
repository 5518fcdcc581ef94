"""A cluster of real processes on loopback, to be asked, paused and killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from blixard.storage.hiqlite.settings import Member
from tests.cluster.addresses import make_member, make_settings

START_SECONDS = 90.0
ANSWER_SECONDS = 60.0
ROOT = Path(__file__).parents[2]


class RemoteError(Exception):
    """What a node answered in the place of a value: the error's code in Blixard's tree."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class NodeGone(Exception):
    """The process ended before it answered."""


class NodeProcess:
    """One node. Made by ``Cluster``."""

    def __init__(self, node_id: int, members: tuple[Member, ...], directory: Path, migrations: Path) -> None:
        self.node_id = node_id
        self.settings = make_settings(node_id, members, directory / f"node-{node_id}")
        self._settings_file = directory / f"node-{node_id}.json"
        self._settings_file.write_bytes(msgspec.json.encode(self.settings, enc_hook=str))
        self._log = directory / f"node-{node_id}.log"
        self._migrations = migrations
        self._numbers = itertools.count()
        # Any: what a node answers is the test's affair.
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._ready: asyncio.Future[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def log(self) -> str:
        """What the process has written to standard error, in all its lives."""
        return self._log.read_text() if self._log.exists() else ""

    async def start(self) -> None:
        """Start the process and wait until it is a member that answers."""
        await self.launch()
        assert self._ready is not None
        await asyncio.wait_for(asyncio.shield(self._ready), START_SECONDS)

    async def launch(self) -> None:
        """Start the process without waiting."""
        self._ready = asyncio.get_running_loop().create_future()
        log: IO[bytes] = self._log.open("ab")
        with log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.cluster.node_program",
                str(self._settings_file),
                str(self._migrations),
                cwd=ROOT,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=1 << 26,
            )
        self._reading = asyncio.create_task(self._read(self._process, self._ready))

    async def _read(self, process: asyncio.subprocess.Process, ready: asyncio.Future[None]) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            if not line.startswith(b"{"):
                continue  # the engine prints how far it has restored a snapshot
            message = json.loads(line)
            if "ready" in message:
                ready.set_result(None)
            elif (future := self._waiting.pop(message["id"], None)) is not None and not future.done():
                if "error" in message:
                    future.set_exception(RemoteError(message["error"], message["message"]))
                else:
                    future.set_result(message["value"])
        gone = NodeGone(f"node {self.node_id} has ended: {self.log[-2000:]}")
        for future in [*self._waiting.values(), ready]:
            if not future.done():
                future.set_exception(gone)
        self._waiting.clear()

    async def ask(self, operation: str, **arguments: Any) -> Any:
        """Return the node's answer. Raises ``RemoteError``, or ``NodeGone`` when it ends before."""
        assert self._process is not None
        assert self._process.stdin is not None
        if self._reading is None or self._reading.done():
            raise NodeGone(f"node {self.node_id} does not run")
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(json.dumps({"id": number, "operation": operation, **arguments}).encode() + b"\n")
        return await asyncio.wait_for(future, ANSWER_SECONDS)

    async def write(self, sql: str, **params: Any) -> list[list[Any]]:
        rows: list[list[Any]] = await self.ask("write", name="write", sql=sql, params=params)
        return rows

    async def read(self, sql: str, *, name: str = "read", **params: Any) -> list[list[Any]]:
        """Read at the leader, or with a ``name`` of ``LOCAL_READS`` at this node."""
        rows: list[list[Any]] = await self.ask("read", name=name, sql=sql, params=params)
        return rows

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self.ask("status")
        return status

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        """End it as a crash would, and wait until it is gone. Harmless when it is gone already."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        if self._reading is not None:
            await asyncio.wait([self._reading])
        for future in [*self._waiting.values(), *([self._ready] if self._ready else [])]:
            if future.done() and not future.cancelled():
                future.exception()  # nobody may have waited for it


class Cluster:
    """Some nodes in one directory. ``stop`` kills what still runs."""

    def __init__(self, directory: Path, schema: str) -> None:
        self._directory = directory
        self._migrations = directory / "migrations"
        self._migrations.mkdir(parents=True)
        (self._migrations / "0001_test.sql").write_text("-- phase: before\n" + schema)
        self.nodes: list[NodeProcess] = []

    async def start(self, count: int = 3) -> None:
        members = tuple(make_member(number) for number in range(1, count + 1))
        self.nodes = [NodeProcess(number, members, self._directory, self._migrations) for number in range(1, count + 1)]
        await asyncio.gather(*(node.start() for node in self.nodes))

    async def add(self) -> NodeProcess:
        """Start one more node. The others are not told: they learn of it when it joins."""
        member = make_member(max(node.node_id for node in self.nodes) + 1)
        members = (*self.nodes[0].settings.members, member)
        node = NodeProcess(member.id, members, self._directory, self._migrations)
        self.nodes.append(node)
        await node.start()
        return node

    async def stop(self) -> None:
        await asyncio.gather(*(node.kill() for node in self.nodes))

    async def find_leader(self, among: Sequence[NodeProcess] | None = None) -> NodeProcess:
        """Return the node that the others take for the leader, once they agree on one of them."""
        nodes = list(self.nodes if among is None else among)
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                leaders = {(await node.status())["leader"] for node in nodes}
                found = [node for node in nodes if {node.node_id} == leaders]
                if found:
                    return found[0]
                await asyncio.sleep(0.05)  # sleep: an election has no event that could be waited for

    async def contents(self, sql: str) -> list[list[list[Any]]]:
        """Return the rows of a query as each node has them by itself, once all have applied what the leader's log holds."""
        leader = await self.find_leader()
        last = (await leader.status())["last_log"]
        for node in self.nodes:
            await _wait_applied(node, last)
        return [await node.read(sql, name="count_jobs") for node in self.nodes]


async def _wait_applied(node: NodeProcess, last: int) -> None:
    async with asyncio.timeout(ANSWER_SECONDS):
        while True:
            if ((await node.status())["last_applied"] or 0) >= last:
                return
            await asyncio.sleep(0.05)  # sleep: applying has no event that another process could wait for

"""``Database`` on a cluster of nodes that replicate SQLite by Raft. See ``DESIGN.md`` beside this file."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, cast

import blixard_hiqlite
from blixard_hiqlite import Failure, Node, Operation

from blixard.errors import InternalError, StoreUnavailable
from blixard.storage.database import Params, Row, Statement
from blixard.storage.filesystem import check_local, make_private_directory
from blixard.storage.hiqlite.consistency import LOCAL_READS
from blixard.storage.hiqlite.crash_mark import CrashMark
from blixard.storage.hiqlite.lane import Lane
from blixard.storage.hiqlite.log import ReplicatedLog
from blixard.storage.hiqlite.membership import remove_member
from blixard.storage.hiqlite.operations import Outcome, build_statement, build_transaction, name_transaction
from blixard.storage.hiqlite.schema import migrate
from blixard.storage.hiqlite.settings import LOG_FILE_BYTES, NodeSettings, check_settings
from blixard.storage.hiqlite.watching import Watches
from blixard.storage.migrator import load_migrations
from blixard.storage.watch import Watch

if TYPE_CHECKING:
    from blixard_hiqlite import Settings, Status

START_SECONDS = 60.0
"""How long a node waits at its start for the others to let it in."""
CLOSE_SECONDS = 25.0
"""The engine gives itself 20 s to end in good order."""
END_SECONDS = 5.0


class HiqliteDatabase:
    """One node of a cluster, and the door to the data that all nodes share.

    Acknowledged means on the disks of a majority. Bound to the event loop of ``open``; one per data directory, in whichever process.
    """

    def __init__(self, settings: NodeSettings, *, migrations: Traversable | None = None) -> None:
        self._settings = settings
        self._migrations = files("blixard.storage") / "migrations" if migrations is None else migrations
        self._mark = CrashMark(settings.data_dir)
        self._gate = asyncio.Lock()
        self._running: _Running | None = None

    async def open(self) -> None:
        """Start the node, wait for the cluster, and migrate it. Calling it twice is harmless; a closed one can be opened again.

        Raises ``ConfigError`` for settings that cannot work, ``StoreUnavailable`` when the node cannot start, finds no majority of the others
        within ``START_SECONDS``, or the schema is newer than this code.
        """
        async with self._gate:
            if self._running is None:
                check_settings(self._settings)
                self._running = await self._open()

    async def close(self) -> None:
        """Finish what was accepted, then end the node; the cluster goes on without it. Allowed before ``open``, during it, and twice."""
        async with self._gate:
            running, self._running = self._running, None
            if running is not None:
                await self._close(running)

    async def abandon(self) -> None:
        """End the node at once, as a crash would: calls that wait hear ``StoreUnavailable`` or ``OutcomeUnknown``. Nothing acknowledged is lost.

        The next start builds the database anew from the log. A cluster's node takes about ten seconds for a good end; this is for who cannot wait.
        """
        async with self._gate:
            running, self._running = self._running, None
            if running is not None:
                await asyncio.to_thread(running.node.end, END_SECONDS)
                await running.stop()

    async def read(self, statement: Statement, params: Params | None = None) -> list[Row]:
        """Return all rows: the leader's, unless the statement is one of ``LOCAL_READS``. Sees what this object has acknowledged in any case."""
        running = self._check()
        lane = running.local_reads if statement.name in LOCAL_READS else running.leader_reads
        return _rows(await lane.call(build_statement(statement, params or {}), statement.name))

    async def write(self, statement: Statement, params: Params | None = None) -> list[Row]:
        """Execute one statement atomically; return its rows once a majority has them on disk. A cancelled call may still be carried out."""
        running = self._check()
        return _rows(await running.writes.call(build_statement(statement, params or {}), statement.name))

    async def transaction(self, statements: Sequence[tuple[Statement, Params]]) -> list[int]:
        """Execute all or nothing; return how many rows each statement changed itself (not by triggers)."""
        running = self._check()
        outcome = await running.writes.call(build_transaction(statements), name_transaction(statements))
        return cast("list[int]", outcome)

    def watch(self) -> Watch:
        """Return an iterator that yields soon after each change on any node, once it is here. Ends with ``StoreUnavailable`` at ``close``."""
        return self._check().watches.add()

    async def status(self) -> Status:
        """Return what this node knows about the cluster. Raises ``StoreUnavailable`` when it is not open."""
        return await self._check().node.status()

    async def remove_member(self, node_id: int) -> None:
        """Take a node out of the cluster for good; it may be dead. Raises ``ConfigError`` for one that is no member, ``StoreUnavailable`` without a leader."""
        await remove_member(self._settings, await self.status(), node_id)

    def _check(self) -> _Running:
        if self._running is None:
            raise StoreUnavailable(f"the database {self._settings.data_dir} is not open")
        return self._running

    async def _open(self) -> _Running:
        make_private_directory(self._settings.data_dir)
        check_local(self._settings.data_dir)
        await asyncio.to_thread(self._mark.set)
        running = _Running(await self._start())
        try:
            running.start()
            await migrate(running.read_at_leader, running.log_one, load_migrations(self._migrations))
        except BaseException:
            await self._close(running)
            raise
        return running

    async def _start(self) -> Node:
        try:
            return await blixard_hiqlite.start(to_engine(self._settings))
        except blixard_hiqlite.StartFailed as error:
            raise StoreUnavailable(
                f"node {self._settings.node_id} could not start: {error}",
                hint="check that the other nodes run, and the addresses and secrets of all",
            ) from error

    async def _close(self, running: _Running) -> None:
        await running.stop()
        is_clean = running.node.trouble() is None
        try:
            if is_clean:
                await running.node.close(CLOSE_SECONDS)
        except blixard_hiqlite.HiqliteError:
            is_clean = (
                False  # nothing is lost by it: the mark stays, and the next start rebuilds the database from the log
            )
        finally:
            await asyncio.to_thread(running.node.end, END_SECONDS)
        if is_clean:
            await asyncio.to_thread(self._mark.clear)


class _Running:
    """What lives between ``open`` and ``close``."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.log = ReplicatedLog(node)
        self.writes = Lane(self.log.write, name="blixard-cluster-writes")
        self.leader_reads = Lane(self.log.read_at_leader, name="blixard-cluster-leader-reads")
        self.local_reads = Lane(self.log.read_here, name="blixard-cluster-local-reads")
        self.watches = Watches(node)

    def start(self) -> None:
        for lane in (self.writes, self.leader_reads, self.local_reads):
            lane.start()
        self.watches.start()

    async def stop(self) -> None:
        await self.watches.stop()
        for lane in (self.writes, self.leader_reads, self.local_reads):
            await lane.stop()

    async def read_at_leader(self, statement: Statement) -> list[Row]:
        return _rows(await self.leader_reads.call(build_statement(statement, {}), statement.name))

    async def log_one(self, operation: Operation) -> Outcome:
        return (await self.log.write([operation]))[0]


def _rows(outcome: Outcome) -> list[Row]:
    if isinstance(outcome, Failure):
        raise InternalError("a failure came where rows were expected")
    return cast("list[Row]", outcome)


def to_engine(settings: NodeSettings) -> Settings:
    """Return the settings as the binding takes them."""
    shortest, longest = settings.election_seconds
    return {
        "node_id": settings.node_id,
        "members": [(member.id, member.raft, member.api) for member in settings.members],
        "data_dir": str(settings.data_dir),
        "listen_raft": settings.listen,
        "listen_api": settings.listen,
        "secret_raft": settings.raft_secret,
        "secret_api": settings.api_secret,
        "heartbeat_ms": round(settings.heartbeat_seconds * 1000),
        "election_ms": (round(shortest * 1000), round(longest * 1000)),
        "logs_until_snapshot": settings.entries_until_snapshot,
        "log_file_bytes": LOG_FILE_BYTES,
        "tls": None if settings.tls is None else (str(settings.tls.certificate), str(settings.tls.key)),
        "is_learner": settings.is_learner,
        "start_seconds": START_SECONDS,
    }

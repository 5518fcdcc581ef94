"""Makes the first node of a cluster out of a single machine's database.

The engine has no door for a database that exists. So a node is started and ended in good order, which leaves a database with the
engine's own note of how far its log is applied; the content is exchanged beside that note; and the node is started again and made to take a snapshot and
to forget its log, so that a node that joins later gets the snapshot and never a log that does not know of the content.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import apsw
import blixard_hiqlite
import msgspec

from blixard.errors import ConfigError, StoreUnavailable
from blixard.storage.database import Statement
from blixard.storage.hiqlite.crash_mark import sync_tree
from blixard.storage.hiqlite.database import CLOSE_SECONDS, END_SECONDS, HiqliteDatabase, to_engine
from blixard.storage.hiqlite.settings import NodeSettings

ENTRIES_UNTIL_SNAPSHOT = 8
MAX_ENTRIES = 1_000
"""Entries written at most to make the engine take its snapshot."""
_SETTLE = Statement("settle", "SELECT 1")


async def found_from(source: Path, settings: NodeSettings) -> None:
    """Fill the empty data directory of node 1 with all that the SQLite file ``source`` holds. The file is only read, and nobody may be writing it.

    Raises ``ConfigError`` for a directory that is not empty, a source that is missing and a node that is not node 1. Killed half way it leaves a directory that must be
    removed; the source is as it was.
    """
    _check(source, settings)
    alone = msgspec.structs.replace(
        settings,
        members=tuple(member for member in settings.members if member.id == settings.node_id),
        entries_until_snapshot=ENTRIES_UNTIL_SNAPSHOT,
    )
    await _start_once(alone)
    await asyncio.to_thread(_exchange, source, settings.data_dir)
    await _settle(alone)


def _check(source: Path, settings: NodeSettings) -> None:
    if settings.node_id != 1:
        raise ConfigError("a cluster is founded by its node 1")
    if not source.is_file():
        raise ConfigError(f"there is no database {source}")
    if settings.data_dir.exists() and any(settings.data_dir.iterdir()):
        raise ConfigError(f"{settings.data_dir} is not empty", hint="give the cluster a directory of its own")


async def _start_once(settings: NodeSettings) -> None:
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        node = await blixard_hiqlite.start(to_engine(settings))
    except blixard_hiqlite.StartFailed as error:
        raise StoreUnavailable(f"node {settings.node_id} could not start: {error}") from error
    await node.close(CLOSE_SECONDS)
    await asyncio.to_thread(node.end, END_SECONDS)


def _exchange(source: Path, data_dir: Path) -> None:
    target = data_dir / "state_machine" / "db" / "hiqlite.db"
    fresh = target.with_name("imported.db")
    _copy(source, fresh)
    with apsw.Connection(str(target), flags=apsw.SQLITE_OPEN_READWRITE) as old:
        note = old.execute("SELECT key, data FROM _metadata").fetchall()
    old.close()
    new = apsw.Connection(str(fresh))
    new.execute("CREATE TABLE _metadata (key TEXT NOT NULL CONSTRAINT _metadata_pk PRIMARY KEY, data BLOB NOT NULL)")
    new.executemany("INSERT INTO _metadata (key, data) VALUES (?, ?)", note)
    new.close()
    for suffix in ("-wal", "-shm"):
        target.with_name(target.name + suffix).unlink(missing_ok=True)
    fresh.rename(target)
    sync_tree(data_dir)


def _copy(source: Path, fresh: Path) -> None:
    reading = apsw.Connection(str(source), flags=apsw.SQLITE_OPEN_READWRITE)
    writing = apsw.Connection(str(fresh))
    with writing.backup("main", reading, "main") as copy:
        copy.step()
    writing.execute("PRAGMA journal_mode = DELETE")
    writing.close()
    reading.close()


async def _settle(settings: NodeSettings) -> None:
    database = HiqliteDatabase(settings)
    await database.open()
    try:
        first = (await database.status())["last_log"] or 0
        for _ in range(MAX_ENTRIES):
            await database.write(_SETTLE)
            if ((await database.status())["purged"] or 0) >= first:
                return
        raise StoreUnavailable("the node did not take a snapshot of the imported database")
    finally:
        await database.close()

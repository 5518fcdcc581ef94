"""The store when something goes wrong around it: killed processes, a full disk, other processes on the same file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from blixard.storage.database import Statement
from blixard.storage.sqlite import SqliteDatabase

SCHEMA = """-- phase: before
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE entries (writer TEXT NOT NULL, number INTEGER NOT NULL, payload TEXT NOT NULL, PRIMARY KEY (writer, number)) STRICT;
"""
ADD = Statement("add", "INSERT INTO entries (writer, number, payload) VALUES (:writer, :number, :payload)")
COUNT_UP = Statement("count_up", "UPDATE counters SET value = value + 1 WHERE name = 'shared' RETURNING value")
START = Statement("start", "INSERT INTO counters (name, value) VALUES ('shared', 0) ON CONFLICT DO NOTHING")
VALUE = Statement("value", "SELECT value FROM counters WHERE name = 'shared'")
PATIENCE = 100.0
SEED = 20261123


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    directory = tmp_path / "migrations"
    directory.mkdir()
    (directory / "0001_tables.sql").write_text(SCHEMA)
    return directory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "blixard.db"


async def start_program(program: str, *arguments: object) -> asyncio.subprocess.Process:
    """Start one of the programs of ``store_programs.py``; its words come back line by line."""
    file = Path(__file__).with_name("store_programs.py")
    words = [sys.executable, str(file), program, *(str(argument) for argument in arguments)]
    return await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)


async def lines_of(process: asyncio.subprocess.Process, count: int) -> list[str]:
    assert process.stdout is not None
    return [(await asyncio.wait_for(process.stdout.readline(), PATIENCE)).decode().strip() for _ in range(count)]


async def rest_of(process: asyncio.subprocess.Process) -> list[str]:
    assert process.stdout is not None
    # The last line of a killed process may be cut off: it counts only with its line break.
    text = (await asyncio.wait_for(process.stdout.read(), PATIENCE)).decode()
    await process.wait()
    return text.split("\n")[:-1]


async def test_every_write_that_a_killed_process_acknowledged_is_there(path: Path, migrations: Path) -> None:
    chance = random.Random(SEED)
    acknowledged: set[str] = set()
    kills = 5
    for life in range(kills):
        process = await start_program("write", path, migrations, f"life{life}")
        heard = await lines_of(process, chance.randrange(50, 1_500))
        process.send_signal(signal.SIGKILL)
        acknowledged.update(heard, await rest_of(process))
    connection = apsw.Connection(str(path))
    stored = {
        f"{writer}:{number}" for writer, number in connection.execute("SELECT writer, number FROM entries").fetchall()
    }
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    print(f"seed {SEED}: {kills} kills, {len(acknowledged)} acknowledged, {len(stored)} stored")
    assert len(acknowledged) > 250
    assert acknowledged - stored == set()


async def test_processes_that_write_at_once_lose_no_update_and_see_no_lock(path: Path, migrations: Path) -> None:
    each, processes = 300, 3
    others = [await start_program("count", path, migrations, each) for _ in range(processes)]
    answers = [await rest_of(other) for other in others]
    database = SqliteDatabase(path, migrations=migrations)
    await database.open()
    value = await database.read(VALUE)
    await database.close()
    assert [other.returncode for other in others] == [0] * processes
    assert value == [(each * processes,)]
    seen = sorted(int(line) for answer in answers for line in answer)
    assert seen == list(range(1, each * processes + 1))


async def test_a_busy_process_lets_another_one_write(path: Path, migrations: Path) -> None:
    """Without the turnstile a quiet writer can wait for the busy one for seconds."""
    database = SqliteDatabase(path, migrations=migrations)
    await database.open()
    await database.write(START)
    busy = await start_program("write", path, migrations, "busy")
    await lines_of(busy, 100)
    for _ in range(20):
        await asyncio.wait_for(database.write(COUNT_UP), PATIENCE)
    still_busy = await lines_of(busy, 100)
    busy.kill()
    await rest_of(busy)
    assert await database.read(VALUE) == [(20,)]
    await database.close()
    assert len(set(still_busy)) == 100


async def test_a_watcher_notices_what_another_process_writes(path: Path, migrations: Path) -> None:
    database = SqliteDatabase(path, migrations=migrations)
    await database.open()
    await database.write(START)
    changes = database.watch()
    other = await start_program("count", path, migrations, 1)
    while await database.read(VALUE) != [(1,)]:
        await asyncio.wait_for(anext(changes), PATIENCE)
    await rest_of(other)
    await database.close()


async def test_a_long_read_and_the_writer_do_not_wait_for_each_other(path: Path, migrations: Path) -> None:
    database = SqliteDatabase(path, migrations=migrations)
    await database.open()
    await database.write(START)
    endless = (
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000000) SELECT count(*) FROM n"
    )
    long_read = asyncio.ensure_future(database.read(Statement("long", endless)))
    writes = 0
    while not long_read.done() or writes < 10:
        await database.write(COUNT_UP)
        writes += 1
    assert await long_read == [(3_000_000,)]
    assert await database.read(VALUE) == [(writes,)]
    await database.close()


async def test_closing_while_many_write_answers_everybody_truthfully(path: Path, migrations: Path) -> None:
    database = SqliteDatabase(path, migrations=migrations)
    await database.open()
    calls = [
        asyncio.ensure_future(database.write(ADD, {"writer": "w", "number": number, "payload": "x"}))
        for number in range(12_000)  # more than the queue holds
    ]
    await asyncio.wait(calls[:1])
    await database.close()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    written = sum(1 for answer in answers if not isinstance(answer, BaseException))
    connection = apsw.Connection(str(path))
    stored = connection.execute("SELECT count(*) FROM entries").fetchall()
    connection.close()
    assert stored == [(written,)]
    assert written >= 10_000


def test_a_full_disk_is_told_loses_nothing_and_is_survived(migrations: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own with a disk of 4 MB. Needs root, or user namespaces."""
    program = Path(__file__).with_name("store_programs.py")
    mount = tmp_path / "small"
    mount.mkdir()
    script = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" "$3" fill "$1/data/blixard.db" "$4"'
    options = ["-m"] if os.geteuid() == 0 else ["-m", "-U", "-r"]
    words = ["unshare", *options, "sh", "-c", script, "sh", mount, sys.executable, program, migrations]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    told = dict(line.split("=") for line in done.stdout.split())
    print(told)
    assert int(told["refused"]) >= 10
    assert int(told["acknowledged"]) >= 100
    assert told["lost"] == "0"
    assert told["unacknowledged"] == "0"
    assert told["after"] == "1"
    assert told["blob"] == told["log"] == "StoreFull"


async def test_a_failed_commit_fails_its_whole_batch_and_the_next_one_works(path: Path, migrations: Path) -> None:
    """A VFS stands in for a disk whose sync fails once: nobody knows whether the batch is on it."""

    class FailingFile(apsw.VFSFile):
        def __init__(self, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
            super().__init__("unix", name, flags)

        def xSync(self, flags: int) -> None:  # noqa: N802 - the name that apsw calls
            if failures:
                failures.pop()
                raise make_sync_error()
            super().xSync(flags)

    class FailingVFS(apsw.VFS):
        def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> FailingFile:  # noqa: N802 - as above
            return FailingFile(name, flags)

    failures: list[bool] = []
    vfs = FailingVFS("failing-sync", "unix")
    database = SqliteDatabase(path, migrations=migrations, vfs="failing-sync")
    await database.open()
    await database.write(START)
    failures.append(True)
    answers = await asyncio.gather(*(database.write(COUNT_UP) for _ in range(10)), return_exceptions=True)
    failed = [type(answer).__name__ for answer in answers if isinstance(answer, BaseException)]
    assert failed
    assert set(failed) == {"OutcomeUnknown"}
    assert not failures
    rows = await database.write(COUNT_UP)
    assert rows == [(10 - len(failed) + 1,)]
    await database.close()
    with contextlib.suppress(apsw.Error):
        vfs.unregister()


def make_sync_error() -> apsw.IOError:
    error = apsw.IOError("the disk does not answer")
    error.extendedresult = apsw.SQLITE_IOERR_FSYNC  # type: ignore[attr-defined]  # apsw reads it, its stub lacks it
    return error

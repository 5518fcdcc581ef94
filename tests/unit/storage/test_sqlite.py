"""What is particular to the SQLite file: what cannot be opened, permissions, limits of the queue."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from blixard.errors import StoreUnavailable
from blixard.storage import sqlite as sqlite_module
from blixard.storage import writer as writer_module
from blixard.storage.database import Statement
from blixard.storage.sqlite import SqliteDatabase
from blixard.storage.turnstile import Turnstile
from blixard.testing.storage import memory_blob_store, memory_database

ADD = Statement("add", "INSERT INTO t (v) VALUES (:v) RETURNING id")
COUNT = Statement("count", "SELECT count(*) FROM t")


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    directory = tmp_path / "migrations"
    directory.mkdir()
    (directory / "0001_t.sql").write_text("-- phase: before\nCREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT) STRICT;\n")
    return directory


async def open_refused(path: Path, migrations: Path) -> StoreUnavailable:
    database = SqliteDatabase(path, migrations=migrations)
    with pytest.raises(StoreUnavailable) as caught:
        await database.open()
    await database.close()
    assert str(path.parent) in str(caught.value)
    assert caught.value.hint
    return caught.value


async def test_what_is_missing_is_created_for_the_owner_only(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "new" / "deep" / "blixard.db"
    database = SqliteDatabase(path, migrations=migrations)
    await database.open()
    await database.write(ADD, {"v": "x"})
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    await database.close()
    assert not path.with_name("blixard.db-wal").exists()


async def test_the_file_is_in_the_safe_mode(tmp_path: Path, migrations: Path) -> None:
    database = SqliteDatabase(tmp_path / "d" / "x.db", migrations=migrations)
    await database.open()
    for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("trusted_schema", 0)):
        assert await database.write(Statement("pragma", f"PRAGMA {pragma}")) == [(value,)]
    await database.close()


async def test_a_file_that_is_no_database(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(b"This is a letter, not a database. " * 100)
    assert "is not a Blixard database" in str(await open_refused(path, migrations))
    assert path.read_bytes().startswith(b"This is a letter")


async def test_a_damaged_database(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "x.db"
    database = SqliteDatabase(path, migrations=migrations)
    await database.open()
    await database.close()
    content = bytearray(path.read_bytes())
    content[100:4096] = b"\xff" * 3996
    path.write_bytes(content)
    assert "damaged" in str(await open_refused(path, migrations))


async def test_a_directory_in_the_place_of_the_file(tmp_path: Path, migrations: Path) -> None:
    (tmp_path / "x.db").mkdir()
    assert "cannot be opened" in str(await open_refused(tmp_path / "x.db", migrations))


async def test_a_file_in_the_place_of_the_directory(tmp_path: Path, migrations: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be created" in str(await open_refused(tmp_path / "file" / "x.db", migrations))


async def test_a_newer_schema(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "x.db"
    database = SqliteDatabase(path, migrations=migrations)
    await database.open()
    await database.close()
    connection = apsw.Connection(str(path))
    connection.execute("INSERT INTO schema_migrations VALUES (7, 'later', 'x', 1)")
    connection.close()
    with pytest.raises(StoreUnavailable, match=r"newer Blixard \(schema 7, this one knows 1\)"):
        await SqliteDatabase(path, migrations=migrations).open()


UNWRITABLE = """
import asyncio, os, sys
from pathlib import Path
from blixard.errors import StoreUnavailable
from blixard.storage.sqlite import SqliteDatabase

async def main():
    await asyncio.to_thread(os.getpid)  # so that all is imported while it may be read
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        await SqliteDatabase(Path(sys.argv[1]), migrations=Path(sys.argv[2])).open()
    except StoreUnavailable as error:
        print(error, error.hint)
asyncio.run(main())
"""


@pytest.mark.parametrize("place", ["directory", "file"])
def test_what_cannot_be_written_says_so(migrations: Path, place: str) -> None:
    # Not below pytest's own directory, which another user may not even enter.
    done = subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True)
    base = Path(done.stdout.strip())
    base.chmod(0o755)
    steps = base / "steps"
    steps.mkdir()
    (steps / "0001_t.sql").write_text("-- phase: before\nCREATE TABLE t (id INTEGER) STRICT;\n")
    if place == "file":
        base.chmod(0o777)
        (base / "x.db").touch(0o444)
    words = [sys.executable, "-c", UNWRITABLE, str(base / "x.db"), str(steps)]
    told = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True, cwd="/").stdout
    subprocess.run(["rm", "-r", str(base)], check=True)
    assert "cannot be" in told
    assert "make it" in told


async def test_the_queue_is_bounded_and_callers_wait_for_room(
    tmp_path: Path, migrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MAX_QUEUED_WRITES", 10)
    monkeypatch.setattr(writer_module, "MAX_BATCH_WRITES", 3)
    database = SqliteDatabase(tmp_path / "x.db", migrations=migrations)
    await database.open()
    calls = [asyncio.ensure_future(database.write(ADD, {"v": str(number)})) for number in range(200)]
    assert [await call for call in calls] == [[(number,)] for number in range(1, 201)]
    await database.close()


async def test_a_lock_that_another_process_keeps_is_told_to_all_who_wait(
    tmp_path: Path, migrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_module, "BUSY_SECONDS", 0.2)
    path = tmp_path / "x.db"
    database = SqliteDatabase(path, migrations=migrations)
    await database.open()
    other = apsw.Connection(str(path))
    other.execute("BEGIN IMMEDIATE")
    answers = await asyncio.gather(*(database.write(ADD, {"v": "x"}) for _ in range(100)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {StoreUnavailable}
    assert "another process" in str(answers[0])
    other.execute("ROLLBACK")
    turn = Turnstile(path.with_name("x.db-turn"), patience=1)
    turn.enter()
    with pytest.raises(StoreUnavailable, match="another process"):
        await database.write(ADD, {"v": "x"})
    turn.leave()
    turn.close()
    assert await database.write(ADD, {"v": "x"}) == [(1,)]
    other.close()
    await database.close()


async def test_concurrent_writes_share_their_commits(tmp_path: Path, migrations: Path) -> None:
    """The group commit itself: 300 calls cost far fewer transactions, seen in what another connection counts."""
    path = tmp_path / "x.db"
    database = SqliteDatabase(path, migrations=migrations)
    await database.open()
    await asyncio.gather(*(database.write(ADD, {"v": "x"}) for _ in range(300)))
    frames = path.with_name("x.db-wal").stat().st_size // (4096 + 24)
    assert frames < 100  # a commit writes at least one page
    await database.close()


def open_files() -> list[str]:
    return [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]


async def test_an_open_that_is_cancelled_leaves_nothing_open(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "x.db"
    database = SqliteDatabase(path, migrations=migrations)
    opening = asyncio.ensure_future(database.open())
    await asyncio.sleep(0)  # sleep: lets the opening begin
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert str(path) not in open_files()
    await database.open()
    assert await database.read(COUNT) == [(0,)]
    await database.close()


def test_a_database_that_was_not_closed_does_not_hold_up_the_process(tmp_path: Path, migrations: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from blixard.storage.sqlite import SqliteDatabase\n"
        "asyncio.run(SqliteDatabase(Path(sys.argv[1]), migrations=Path(sys.argv[2])).open())"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "x.db"), str(migrations)]
    assert subprocess.run(words, timeout=100, check=False).returncode == 0


async def test_the_doubles_are_the_real_code_in_memory() -> None:
    database = memory_database()
    await database.open()
    assert await database.read(Statement("jobs", "SELECT count(*) FROM jobs")) == [(0,)]
    await database.close()
    blobs = memory_blob_store()
    assert await blobs.get(await blobs.put(b"x")) == b"x"

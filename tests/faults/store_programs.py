"""Programs that the fault tests start as processes of their own: ``python store_programs.py PROGRAM PATH MIGRATIONS …``."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import apsw

from blixard.domain.log import LogRecord
from blixard.errors import BlixardError, StoreFull
from blixard.storage.blobs import LocalBlobStore
from blixard.storage.database import Statement
from blixard.storage.logs import LocalLogStore, LogAppend
from blixard.storage.sqlite import SqliteDatabase

ADD = Statement("add", "INSERT INTO entries (writer, number, payload) VALUES (:writer, :number, :payload)")
COUNT_UP = Statement("count_up", "UPDATE counters SET value = value + 1 WHERE name = 'shared' RETURNING value")
START = Statement("start", "INSERT INTO counters (name, value) VALUES ('shared', 0) ON CONFLICT DO NOTHING")


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


async def write(database: SqliteDatabase, name: str) -> None:
    """Write for ever from 8 tasks and say each acknowledged row."""

    async def one(task: int) -> None:
        number = task
        while True:
            await database.write(ADD, {"writer": name, "number": number, "payload": "x" * (number % 500)})
            say(f"{name}:{number}")
            number += 8

    async with asyncio.TaskGroup() as group:
        for task in range(8):
            group.create_task(one(task))


async def count(database: SqliteDatabase, times: str) -> None:
    """Count one shared number up, several at a time, and say each value."""
    await database.write(START)
    for _ in range(0, int(times), 10):
        for rows in await asyncio.gather(*(database.write(COUNT_UP) for _ in range(min(10, int(times))))):
            say(str(rows[0][0]))


async def fill(database: SqliteDatabase, path: Path) -> None:
    """Write until the disk is full and beyond, free some space, write again, and say what was found."""
    acknowledged: set[int] = set()
    refused = 0
    number = 0
    while refused < 10:
        batch = range(number, number + 20)
        number += 20
        calls = [database.write(ADD, {"writer": "w", "number": each, "payload": "x" * 2_000}) for each in batch]
        for each, answer in zip(batch, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(answer, StoreFull):
                refused += 1
            elif isinstance(answer, BaseException):
                raise answer
            else:
                acknowledged.add(each)
    say(f"blob={await fill_blobs(path)} log={await fill_logs(path)}")
    await database.close()
    stored = {int(str(row[0])) for row in apsw.Connection(str(path)).execute("SELECT number FROM entries").fetchall()}
    say(f"refused={refused} acknowledged={len(acknowledged)} lost={len(acknowledged - stored)}")
    say(f"unacknowledged={len(stored - acknowledged)}")


async def fill_blobs(path: Path) -> str:
    try:
        await LocalBlobStore(path.parent / "blobs").put(bytes(5_000_000))
    except BlixardError as error:
        return type(error).__name__
    return "nothing"


async def fill_logs(path: Path) -> str:
    """Fill the disk with one log; what was appended before must still be whole."""
    logs = LocalLogStore(path.parent / "logs")
    records = [LogRecord(1, "stdout", bytes(60_000))]
    answer = "nothing"
    for _ in range(200):
        try:
            await logs.append([LogAppend(namespace="default", job_id="job", attempt=1, records=records)])
        except BlixardError as error:
            answer = type(error).__name__
            break
    await logs.delete([("default", "job", 1)])
    await logs.close()
    return answer


async def write_again(path: Path, migrations: Path) -> None:
    (path.parent.parent / "ballast").unlink()
    database = SqliteDatabase(path, migrations=migrations)
    await database.open()
    await database.write(ADD, {"writer": "after", "number": 1, "payload": "x"})
    rows = await database.read(Statement("after", "SELECT count(*) FROM entries WHERE writer = 'after'"))
    await database.close()
    say(f"after={rows[0][0]!r}")


async def main() -> None:
    program, path, migrations, *arguments = sys.argv[1:]
    if program == "fill":
        (Path(path).parent.parent / "ballast").write_bytes(bytes(1_000_000))
    database = SqliteDatabase(Path(path), migrations=Path(migrations))
    await database.open()
    if program == "write":
        await write(database, arguments[0])
    elif program == "count":
        await count(database, arguments[0])
        await database.close()
    elif program == "fill":
        await fill(database, Path(path))
        await write_again(Path(path), Path(migrations))


if __name__ == "__main__":
    asyncio.run(main())

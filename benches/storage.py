"""What the storage engine costs: ``python benches/storage.py [DIRECTORY]``. Takes about 20 seconds; compare within one run only.

1. The life of jobs in batches (claim, then complete with attempt and event) through ``SqliteDatabase`` and through bare apsw
   on one thread with the same settings, in turns: the difference is what queue, threads and event loop add.
2. One write at a time: the round trip beside a bare commit, and the same without a disk.
3. A primary-key read on the loop's thread (``quick``) and through the reader threads.
4. Many small writes at once.  5. Appends to logs.  6. Small blobs.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import apsw
import msgspec

from blixard.domain.log import LogRecord
from blixard.storage.blobs import LocalBlobStore
from blixard.storage.database import Params, Row, Statement
from blixard.storage.logs import LocalLogStore, LogAppend
from blixard.storage.sqlite import CHECKPOINT_PAGES, MEMORY, SqliteDatabase

SCHEMA = """-- phase: before
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, class INTEGER NOT NULL, state TEXT NOT NULL CHECK (state IN ('pending', 'claimed', 'completed')),
    priority INTEGER NOT NULL, run_at INTEGER NOT NULL, attempt INTEGER NOT NULL DEFAULT 0, payload TEXT NOT NULL,
    result TEXT, worker TEXT, finished_at INTEGER, CHECK ((state = 'completed') = (finished_at IS NOT NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX ready ON jobs (class, priority DESC, run_at, id) WHERE state = 'pending';
CREATE INDEX leased ON jobs (worker) WHERE state = 'claimed';
CREATE INDEX by_state ON jobs (state, id);
CREATE TABLE attempts (job_id TEXT, attempt INTEGER, worker TEXT, PRIMARY KEY (job_id, attempt)) STRICT, WITHOUT ROWID;
CREATE TABLE events (seq INTEGER PRIMARY KEY, job_id TEXT, type TEXT, at INTEGER) STRICT;
CREATE TRIGGER jobs_changed AFTER UPDATE ON jobs WHEN new.state = 'completed' BEGIN
    INSERT INTO attempts VALUES (new.id, new.attempt, new.worker);
    INSERT INTO events (job_id, type, at) VALUES (new.id, 'completed', new.finished_at);
END;
CREATE TABLE small (id INTEGER PRIMARY KEY, v TEXT) STRICT;
"""
SUBMIT = Statement(
    "submit",
    "INSERT INTO jobs (id, class, state, priority, run_at, payload) "
    "SELECT value ->> 0, 1, 'pending', 0, :now, value ->> 1 FROM json_each(:jobs) RETURNING id",
)
CLAIM = Statement(
    "claim",
    "UPDATE jobs SET state = 'claimed', worker = 'w', attempt = attempt + 1 WHERE id IN (SELECT id FROM jobs "
    "WHERE state = 'pending' AND class = 1 ORDER BY priority DESC, run_at, id LIMIT :want) RETURNING id, attempt, payload",
)
COMPLETE = Statement(
    "complete",
    "UPDATE jobs SET state = 'completed', result = j.value ->> 2, finished_at = :now FROM json_each(:jobs) AS j "
    "WHERE jobs.id = j.value ->> 0 AND jobs.attempt = j.value ->> 1 AND +jobs.state = 'claimed' RETURNING jobs.id",
)
SMALL = Statement("small", "INSERT INTO small (v) VALUES (:v)")
FIND = Statement("find", "SELECT id, state, attempt, payload FROM jobs WHERE id = :id")
QUICK = Statement("quick", FIND.sql, quick=True)

Run = Callable[[Statement, Params], Awaitable[list[Row]]]


def report(what: str, figure: str) -> None:
    print(f"{what:<58} {figure:>30}", flush=True)


async def live(run: Run, jobs: int, batch: int, tag: str) -> float:
    """Run the life of ``jobs`` jobs and return the seconds."""
    started = time.perf_counter()
    ids = [f"job_{tag}_{number:08}" for number in range(jobs)]
    for start in range(0, jobs, 1_000):
        rows = [[job, '{"args":[1]}'] for job in ids[start : start + 1_000]]
        await run(SUBMIT, {"now": 1, "jobs": msgspec.json.encode(rows).decode()})
    left = jobs
    while left:
        claimed = await run(CLAIM, {"want": batch})
        done = [[row[0], row[1], "null"] for row in claimed]
        left -= len(await run(COMPLETE, {"now": 2, "jobs": msgspec.json.encode(done).decode()}))
    return time.perf_counter() - started


def bare(path: Path, schema: str) -> apsw.Connection:
    connection = apsw.Connection(str(path))
    connection.execute(
        f"PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}"
    )
    connection.execute("PRAGMA cache_size = -32768; PRAGMA temp_store = MEMORY; PRAGMA foreign_keys = ON")
    connection.execute(schema)
    return connection


async def compare_lives(directory: Path, migrations: Path) -> None:
    database = SqliteDatabase(directory / "lives" / "ours.db", migrations=migrations)
    await database.open()
    connection = bare(directory / "lives" / "bare.db", SCHEMA)

    async def run_bare(statement: Statement, params: Params) -> list[Row]:
        connection.execute("BEGIN IMMEDIATE")
        rows: list[Row] = connection.execute(statement.sql, params).fetchall()
        connection.execute("COMMIT")
        return rows

    for batch in (50, 200):
        ours, theirs = [], []
        for turn in range(4):
            theirs.append(await live(run_bare, 4_000, batch, f"{batch}b{turn}"))
            ours.append(await live(database.write, 4_000, batch, f"{batch}o{turn}"))
        ratio = min(ours) / min(theirs)
        report(
            f"life of jobs in batches of {batch}: ours, bare apsw",
            f"{4_000 / min(ours):,.0f}/s, {4_000 / min(theirs):,.0f}/s = {ratio:.2f}x",
        )
    started = time.perf_counter()
    await asyncio.gather(*(live(database.write, 4_000, 50, f"c{caller}") for caller in range(4)))
    report("life of jobs in batches of 50, four callers at once", f"{16_000 / (time.perf_counter() - started):,.0f}/s")
    await compare_round_trips(database, connection)
    connection.close()
    await compare_reads(database)
    await database.close()


async def compare_round_trips(database: SqliteDatabase, connection: apsw.Connection) -> None:
    ours, theirs = [], []
    for _ in range(500):
        started = time.perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(SMALL.sql, {"v": "x"})
        connection.execute("COMMIT")
        theirs.append(time.perf_counter() - started)
        started = time.perf_counter()
        await database.write(SMALL, {"v": "x"})
        ours.append(time.perf_counter() - started)
    us, them = statistics.median(ours) * 1e6, statistics.median(theirs) * 1e6
    report("one write, p50: ours, bare commit", f"{us:.0f} µs, {them:.0f} µs: +{us - them:.0f} µs")


async def compare_reads(database: SqliteDatabase) -> None:
    for name, statement in (("on the loop's thread", QUICK), ("through a reader thread", FIND)):
        times = []
        for number in range(3_000):
            started = time.perf_counter()
            await database.read(statement, {"id": f"job_50o0_{number:08}"})
            times.append(time.perf_counter() - started)
        report(f"primary-key read {name}, p50", f"{statistics.median(times) * 1e6:.1f} µs")


async def many_small_writes(directory: Path, migrations: Path) -> None:
    for name, path in (("file", directory / "small" / "x.db"), ("memory", MEMORY)):
        database = SqliteDatabase(path, migrations=migrations)
        await database.open()
        started = time.perf_counter()
        await asyncio.gather(*(database.write(SMALL, {"v": "x"}) for _ in range(20_000)))
        report(f"20,000 small writes at once, {name}", f"{20_000 / (time.perf_counter() - started):,.0f}/s")
        times = []
        for _ in range(500):
            started = time.perf_counter()
            await database.write(SMALL, {"v": "x"})
            times.append(time.perf_counter() - started)
        report(f"one write at a time, {name}, p50", f"{statistics.median(times) * 1e6:.0f} µs")
        await database.close()


async def append_logs(directory: Path) -> None:
    logs = LocalLogStore(directory / "logs")
    records = [LogRecord(1, "stdout", b"a line of output\n")]
    started = time.perf_counter()
    for start in range(0, 10_000, 200):
        await logs.append([new_log(f"job_{number}", records, ended=True) for number in range(start, start + 200)])
    report("logs: new files, each with one record and its end", f"{10_000 / (time.perf_counter() - started):,.0f}/s")
    started = time.perf_counter()
    for _ in range(400):
        await logs.append([new_log(f"open_{number}", records, ended=False) for number in range(100)])
    report("logs: appends to 100 open files", f"{40_000 / (time.perf_counter() - started):,.0f}/s")
    await logs.close()


def new_log(job: str, records: list[LogRecord], *, ended: bool) -> LogAppend:
    return LogAppend(namespace="default", job_id=job, attempt=1, records=records, ended=ended)


async def put_blobs(directory: Path) -> None:
    blobs = LocalBlobStore(directory / "blobs")
    started = time.perf_counter()
    for number in range(200):
        await blobs.put(b"%d" % number)
    report("blobs: one small one at a time", f"{(time.perf_counter() - started) / 200 * 1e3:.2f} ms")
    started = time.perf_counter()
    await asyncio.gather(*(blobs.put(b"x%d" % number) for number in range(400)))
    report("blobs: 400 small ones at once", f"{400 / (time.perf_counter() - started):,.0f}/s")


async def main(parent: str | None) -> None:
    with tempfile.TemporaryDirectory(dir=parent) as name:
        directory = Path(name)
        migrations = directory / "migrations"
        migrations.mkdir()
        (migrations / "0001_bench.sql").write_text(SCHEMA)
        await compare_lives(directory, migrations)
        await many_small_writes(directory, migrations)
        await append_logs(directory)
        await put_blobs(directory)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))

"""Acknowledged means on disk: power is cut at every write and sync, and every acknowledged row must be there.

The real ``SqliteDatabase`` with concurrent writers runs on a simulated disk; each cut is opened with ordinary SQLite. The
canary shows that the test can fail: with synchronous NORMAL the same run must find losses.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Literal

import apsw
import msgspec
import pytest

from blixard.storage.database import Statement
from blixard.storage.sqlite import SqliteDatabase
from tests.faults.lossy_disk import MODES, LossyDisk, LossyVFS

SEEDS = (20261123, 7)
WRITERS = 6
WRITES_EACH = 25
CHECKPOINT_PAGES = 24  # small, so that checkpoints and a restarted WAL are cut too
MIN_CUTS = 900
MIN_ACKNOWLEDGED = WRITERS * WRITES_EACH * 9 // 10
SCHEMA = """-- phase: before
CREATE TABLE jobs (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, payload TEXT NOT NULL) STRICT;
CREATE TABLE events (job INTEGER NOT NULL, step INTEGER NOT NULL) STRICT;
CREATE TRIGGER jobs_changed AFTER UPDATE ON jobs BEGIN INSERT INTO events VALUES (new.id, new.step); END;
"""
ADD = Statement("add", "INSERT INTO jobs (id, step, payload) VALUES (:id, 0, :payload)")
ADVANCE = Statement("advance", "UPDATE jobs SET step = step + 1 WHERE id = :id RETURNING step")


class Findings(msgspec.Struct):
    cuts: int = 0
    unreadable: int = 0
    damaged: int = 0
    lost: int = 0


class PowerCuts:
    """Cuts the power at every call of the disk and looks at what is left."""

    def __init__(self, disk: LossyDisk, database: Path, scratch: Path, chance: random.Random) -> None:
        self._disk = disk
        self._database = database
        self._scratch = scratch
        self._chance = chance
        self.acknowledged: dict[int, int] = {}
        self.findings = Findings()

    def cut(self) -> None:
        promised = dict(self.acknowledged)  # taken first: what is acknowledged later may be missing
        for mode in MODES:
            target = self._scratch / "cut"
            target.mkdir()
            self._disk.cut(self._database, target, mode, self._chance)
            self._look(target / "cut.db", promised)
            shutil.rmtree(target)

    def _look(self, path: Path, promised: dict[int, int]) -> None:
        self.findings.cuts += 1
        connection = apsw.Connection(str(path))
        try:
            if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                self.findings.damaged += 1
                return
            rows = numbers(connection, "SELECT id, step FROM jobs")
            events = numbers(connection, "SELECT job, max(step) FROM events GROUP BY job")
            whole = all(events.get(job, 0) == step for job, step in rows.items())
            if not whole or any(rows.get(job, -1) < step for job, step in promised.items()):
                self.findings.lost += 1
        except apsw.Error:
            self.findings.unreadable += 1
        finally:
            connection.close()


def numbers(connection: apsw.Connection, sql: str) -> dict[int, int]:
    return {int(str(key)): int(str(value)) for key, value in connection.execute(sql).fetchall()}


async def write_much(database: SqliteDatabase, cuts: PowerCuts, writer: int, chance: random.Random) -> None:
    mine: list[int] = []
    for number in range(WRITES_EACH):
        if mine and chance.random() < 0.6:
            job = chance.choice(mine)
            rows = await database.write(ADVANCE, {"id": job})
            cuts.acknowledged[job] = int(str(rows[0][0]))
        else:
            job = writer * 1_000 + number
            await database.write(ADD, {"id": job, "payload": "x" * chance.randrange(10, 900)})
            mine.append(job)
            cuts.acknowledged[job] = 0


async def run_with_cuts(directory: Path, synchronous: Literal["FULL", "NORMAL"], seed: int) -> Findings:
    migrations = directory / "migrations"
    migrations.mkdir()
    (migrations / "0001_jobs.sql").write_text(SCHEMA)
    path = directory / "data" / "jobs.db"
    disk = LossyDisk()
    name = f"lossy-{synchronous}-{seed}"
    vfs = LossyVFS(name, disk)
    database = SqliteDatabase(
        path, migrations=migrations, synchronous=synchronous, vfs=name, checkpoint_pages=CHECKPOINT_PAGES
    )
    await database.open()
    cuts = PowerCuts(disk, path, directory, random.Random(seed))
    disk.on_call = cuts.cut
    async with asyncio.TaskGroup() as group:
        for writer in range(WRITERS):
            group.create_task(write_much(database, cuts, writer, random.Random(seed * 100 + writer)))
    disk.on_call = None
    await database.close()
    vfs.unregister()
    print(f"synchronous {synchronous}, seed {seed}: {disk.calls} calls, {len(cuts.acknowledged)} rows, {cuts.findings}")
    assert cuts.findings.cuts >= MIN_CUTS
    assert sum(1 + step for step in cuts.acknowledged.values()) >= MIN_ACKNOWLEDGED
    return cuts.findings


@pytest.mark.parametrize("seed", SEEDS)
async def test_no_acknowledged_write_is_lost_by_a_power_cut(tmp_path: Path, seed: int) -> None:
    findings = await run_with_cuts(tmp_path, "FULL", seed)
    assert (findings.lost, findings.damaged, findings.unreadable) == (0, 0, 0)


async def test_canary_without_a_sync_at_commit_the_same_test_finds_losses(tmp_path: Path) -> None:
    findings = await run_with_cuts(tmp_path, "NORMAL", SEEDS[0])
    assert findings.lost > findings.cuts // 10

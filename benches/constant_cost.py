"""Does the cost of a job grow with the number of jobs? ``constant_cost.py [SMALL LARGE]``, by default 1,000 and 1,000,000.

Times ``find_by_id`` at the level of the services, both stores in turn, warm; counts the pages that find, cancel, retry and claim touch.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import apsw
import msgspec

from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_BATCH_JOBS
from blixard.domain.payload import FunctionPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec
from blixard.protocol.jobs import SubmitRequest
from blixard.services.control_plane import ControlPlane, ControlPlaneConfig, build_control_plane
from blixard.storage.blobs import LocalBlobStore
from blixard.storage.logs import LocalLogStore
from blixard.storage.sqlite import SqliteDatabase
from blixard.storage.statements import load_statements

ROUNDS = 4_000
SPEC = JobSpec(
    name="noop",
    payload=FunctionPayload(function="jobs:noop"),
    requirements=JobRequirements(isolation=Isolation.MINIMAL),
)


async def fill(directory: Path, count: int) -> tuple[ControlPlane, list[str]]:
    plane = build_control_plane(
        SqliteDatabase(directory / "blixard.db"),
        LocalBlobStore(directory / "blobs"),
        LocalLogStore(directory / "logs"),
        ControlPlaneConfig(),
    )
    await plane.open()
    ids: list[str] = []
    for _ in range(0, count, MAX_BATCH_JOBS):
        jobs = [NewJob(arguments=msgspec.Raw(b"[[1],{}]")) for _ in range(MAX_BATCH_JOBS)]
        ids += (await plane.commands.submit("default", SubmitRequest(spec=SPEC, jobs=jobs))).ids
    return plane, ids


async def time_finds(planes: Sequence[tuple[ControlPlane, list[str]]]) -> list[float]:
    """Return the median microseconds of a find in each store; asked for in turn, so that noise hits both."""
    chosen = [random.Random(7).sample(ids, min(500, len(ids))) for _, ids in planes]
    times: list[list[float]] = [[] for _ in planes]
    for number in range(-500, ROUNDS):
        for place, (plane, _) in enumerate(planes):
            job_id = chosen[place][number % len(chosen[place])]
            begin = time.perf_counter_ns()
            await plane.queries.find_by_id("default", job_id)
            if number >= 0:
                times[place].append((time.perf_counter_ns() - begin) / 1e3)
    return [statistics.median(values) for values in times]


def count_pages(path: Path, ids: Sequence[str]) -> dict[str, float]:
    """Return the mean number of pages that each hot statement touches on this store, over some jobs."""
    sql = load_statements(files("blixard.storage") / "sql")
    connection = apsw.Connection(str(path))
    connection.execute("INSERT INTO sessions VALUES('s','default','w','{}','online','',1,'',0,0,1,1,NULL)")
    pages: dict[str, list[int]] = {}

    def run(label: str, name: str, **params: str | int) -> None:
        codes = (apsw.SQLITE_DBSTATUS_CACHE_HIT, apsw.SQLITE_DBSTATUS_CACHE_MISS)
        before = sum(connection.status(code)[0] for code in codes)
        rows = list(connection.execute(sql[name].sql, {"namespace": "default", "now": 1, **params}))
        assert rows, name
        pages.setdefault(label, []).append(sum(connection.status(code)[0] for code in codes) - before)

    for number, job_id in enumerate(random.Random(5).sample(list(ids), 50)):
        one = msgspec.json.encode([job_id]).decode()
        run("find_by_id", "find_job", id=job_id)
        run("cancel", "cancel_jobs", ids=one)
        run("retry", "retry_jobs", ids=one)
        run("claim", "claim_jobs", session="s", worker="w", number=number + 1, classes="[1]", want=1, max_attempts=9)
    return {label: statistics.mean(values) for label, values in pages.items()}


async def main(small: int, large: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        stores = [(Path(name) / str(count), count) for count in (small, large)]
        planes = [await fill(directory, count) for directory, count in stores]
        few, many = await time_finds(planes)
        print(f"find_by_id p50: {few:.1f} µs among {small:,}, {many:.1f} µs among {large:,}: {many / few:.2f} times")
        for plane, _ in planes:
            await plane.close()
        counts = [
            count_pages(directory / "blixard.db", ids) for (directory, _), (_, ids) in zip(stores, planes, strict=True)
        ]
        for label in counts[0]:
            few, many = counts[0][label], counts[1][label]
            print(f"{label}: 1 statement, {few:.1f} and {many:.1f} pages touched: {many / few:.2f} times")


if __name__ == "__main__":
    sizes = [int(word) for word in sys.argv[1:]] or [1_000, 1_000_000]
    asyncio.run(main(*sizes))

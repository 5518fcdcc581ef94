"""Speed of ProcessBackend alone: no-op function jobs, no store and no server.

``python benches/backend_process.py [JOBS]`` prints jobs per second, CPU microseconds per job of this process and of its
executors, and the latency of a single warm job.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from blixard.backends.contract import BackendSettings, Execution, Stream
from blixard.backends.process import ProcessBackend
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import FunctionPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec

SLOTS = 2
IN_FLIGHT = 500
ALONE = 2_000


class Deaf:
    def started(self, at: int) -> None:
        pass

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        pass


def executions(directory: Path, count: int) -> list[Execution]:
    (directory / "jobs.py").write_text("def job(): pass\n")
    spec = JobSpec(
        name="noop",
        payload=FunctionPayload(function="jobs:job", bundle="b" * 64),
        requirements=JobRequirements(isolation=Isolation.MINIMAL),
    )
    blobs = {"b" * 64: directory}
    return [
        Execution(ref=AttemptRef("default", f"job_{i}", 1), spec=spec, arguments=b"[[],{}]", blobs=blobs)
        for i in range(count)
    ]


async def drain(backend: ProcessBackend, jobs: list[Execution]) -> None:
    """Run the jobs with a bounded number under way, as a worker would."""
    waiting = iter(jobs)
    deaf = Deaf()

    async def run_some() -> None:
        for job in waiting:
            check(await backend.execute(job, deaf))

    await asyncio.gather(*(run_some() for _ in range(IN_FLIGHT)))


def check(outcome: Outcome) -> None:
    if outcome.kind is not OutcomeKind.COMPLETED:
        raise SystemExit(f"a job ended as {outcome}")


def cpu_of_children() -> float:
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        times = process.cpu_times()
        total += times.user + times.system
    return total


async def measure(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "scratch").mkdir()
        backend = ProcessBackend(BackendSettings(scratch=root / "scratch", slots=SLOTS))
        await backend.start()
        try:
            await drain(backend, executions(root, 2_000))
            await measure_throughput(backend, executions(root, count))
            await measure_latency(backend, executions(root, ALONE))
        finally:
            await backend.stop()


async def measure_throughput(backend: ProcessBackend, jobs: list[Execution]) -> None:
    begun, cpu, children = time.perf_counter(), time.process_time(), cpu_of_children()
    await drain(backend, jobs)
    seconds, cpu, children = time.perf_counter() - begun, time.process_time() - cpu, cpu_of_children() - children
    per_job = 1e6 / len(jobs)
    print(f"{len(jobs)} no-op jobs, {SLOTS} slots: {len(jobs) / seconds:,.0f} jobs/s")
    print(
        f"CPU per job: backend {cpu * per_job:.1f} µs, executors {children * per_job:.1f} µs (load {os.getloadavg()[0]:.1f})"
    )


async def measure_latency(backend: ProcessBackend, jobs: list[Execution]) -> None:
    deaf = Deaf()
    times = []
    for job in jobs:
        begun = time.perf_counter()
        check(await backend.execute(job, deaf))
        times.append((time.perf_counter() - begun) * 1e3)
    print(
        f"one warm job alone: p50 {statistics.median(times):.3f} ms, p99 {statistics.quantiles(times, n=100)[98]:.3f} ms"
    )


if __name__ == "__main__":
    asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000))

"""Time of a job in the standard sandbox, end to end through the backend: ``python benches/backend_sandbox.py [JOBS]``.

Prints p50 and p90 in ms of functions and commands one after the other, and functions a second with two slots.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from blixard.backends.contract import BackendSettings, Execution, Stream
from blixard.backends.sandbox.backend import SandboxBackend
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import CommandPayload, FunctionPayload, Payload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec


class Deaf:
    def started(self, at: int) -> None:
        """Nobody listens."""

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        """Nobody listens."""


def spec_of(payload: Payload) -> JobSpec:
    return JobSpec(name="bench", payload=payload, requirements=JobRequirements(isolation=Isolation.STANDARD))


async def measure(name: str, jobs: int, run: Callable[[int], Awaitable[Outcome]]) -> None:
    times = []
    for number in range(jobs):
        begun = time.perf_counter()
        outcome = await run(number)
        times.append((time.perf_counter() - begun) * 1e3)
        assert outcome.kind is OutcomeKind.COMPLETED, outcome
    times.sort()
    print(f"{name}: p50 {statistics.median(times):.1f} ms, p90 {times[int(jobs * 0.9)]:.1f} ms of {jobs}")


async def main(jobs: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        bundle = Path(place) / "bundle"
        bundle.mkdir()
        (bundle / "facts.py").write_text("def measure(x): return x\n")
        scratch = Path(place) / "scratch"
        scratch.mkdir()
        backend = SandboxBackend(BackendSettings(scratch=scratch, slots=2))
        await backend.start()
        function = spec_of(FunctionPayload(function="facts:measure", bundle="code"))
        command = spec_of(CommandPayload(argv=("true",)))

        async def run(spec: JobSpec, number: int, arguments: bytes) -> Outcome:
            ref = AttemptRef("default", f"{id(spec)}-{number}", 1)
            blobs = {"code": bundle}
            return await backend.execute(Execution(ref=ref, spec=spec, arguments=arguments, blobs=blobs), Deaf())

        try:
            await measure("python function", jobs, lambda number: run(function, number, b"[[1],{}]"))
            await measure("command", jobs // 2, lambda number: run(command, number, b"[]"))
            begun = time.perf_counter()
            await asyncio.gather(*(run(function, jobs + number, b"[[1],{}]") for number in range(jobs)))
            print(f"two at a time: {jobs / (time.perf_counter() - begun):.0f} functions/s")
        finally:
            await backend.stop()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))

"""Time of a job in a virtual machine, through manager and backend: ``python benches/vm_jobs.py [JOBS] [MEMORY_MB]``.

Prints p50, p90 and p99 in seconds of Python scripts: each in a fresh clone, each in a clone that was kept ready, one after the other
in a service machine; and for each the time until nothing is left of it. Images and templates are kept in ~/.cache/blixard/vm.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import uvloop

from blixard.backends.contract import BackendSettings, Execution, Stream
from blixard.backends.microvm import MicroVmBackend
from blixard.backends.microvm.plan import GUEST_MEMORY_MB
from blixard.config.settings import Settings
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import OutcomeKind
from blixard.domain.payload import ScriptPayload
from blixard.domain.requirements import Isolation, JobRequirements, VmMode
from blixard.domain.spec import JobSpec
from blixard.domain.vm import VmState
from blixard.infrastructure import ProductionInfrastructureFactory
from blixard.vm.lease import VmLease, VmNeed
from blixard.vm.manager import VmManager

DIRECTORY = Path(os.environ.get("BLIXARD_VM__DIRECTORY") or Path.home() / ".cache/blixard/vm")
MIB = 1 << 20


class Deaf:
    def started(self, at: int) -> None:
        """Nobody listens."""

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        """Nobody listens."""


class Timed:
    """A leaser that notes how long machines take to come and to go."""

    def __init__(self, manager: VmManager) -> None:
        self._manager = manager
        self.came: list[float] = []
        self.went: list[float] = []

    async def acquire(self, need: VmNeed) -> VmLease:
        begun = time.perf_counter()
        lease = await self._manager.acquire(need)
        self.came.append(time.perf_counter() - begun)
        return lease

    async def release(self, lease: VmLease, *, broken: bool) -> None:
        begun = time.perf_counter()
        await self._manager.release(lease, broken=broken)
        self.went.append(time.perf_counter() - begun)


def show(name: str, times: list[float]) -> None:
    times = sorted(times)
    print(
        f"  {name}: p50 {statistics.median(times):.3f} s, p90 {times[int(len(times) * 0.9)]:.3f} s, "
        f"p99 {times[-1 - len(times) // 100]:.3f} s of {len(times)}"
    )


async def run(title: str, jobs: int, memory_mb: int, *, pool: int, mode: VmMode) -> None:
    settings = Settings.model_validate(
        {"vm": {"directory": str(DIRECTORY), "default_memory": memory_mb * MIB, "pool": pool}}
    )
    manager = ProductionInfrastructureFactory(settings).create_vm_manager()
    with tempfile.TemporaryDirectory() as place:
        bundle = Path(place) / "bundle"
        bundle.mkdir()
        (bundle / "hello.py").write_text("print('hello')\n")
        isolation = Isolation.STANDARD if mode is VmMode.SERVICE else Isolation.MAXIMUM
        spec = JobSpec(
            name="bench",
            payload=ScriptPayload(path="hello.py", bundle="code"),
            requirements=JobRequirements(isolation=isolation, vm_mode=mode),
        )
        timed = Timed(manager)
        backend = MicroVmBackend(
            BackendSettings(scratch=Path(place), slots=1, memory_mb=memory_mb - GUEST_MEMORY_MB), timed
        )
        await manager.start()
        await backend.start()
        try:
            times = []
            for number in range(jobs + 1):
                if pool:
                    while number and not manager.list_vms(VmState.READY):  # noqa: ASYNC110  it tells nobody
                        await asyncio.sleep(0.01)
                begun = time.perf_counter()
                ref = AttemptRef("bench", f"job_{number}", 1)
                outcome = await backend.execute(Execution(ref=ref, spec=spec, blobs={"code": bundle}), Deaf())
                times.append(time.perf_counter() - begun)
                assert outcome.kind is OutcomeKind.COMPLETED, msgspec.json.encode(outcome)
            print(title)
            # The first one makes the template, fills the pool or starts the service machine.
            ended = [whole - gone for whole, gone in zip(times[1:], timed.went[1:], strict=True)]
            show("to the job's end", ended)
            show("of it, for the machine", timed.came[1:])
            show("then, until it is given back", timed.went[1:])
        finally:
            await backend.stop()
            await manager.shutdown()


async def main(jobs: int, memory_mb: int) -> None:
    await run("fresh clone for each job", jobs, memory_mb, pool=0, mode=VmMode.EPHEMERAL)
    await run("clone that was kept ready", jobs, memory_mb, pool=1, mode=VmMode.EPHEMERAL)
    await run("service machine, next job", jobs, memory_mb, pool=0, mode=VmMode.SERVICE)


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    uvloop.run(main(*(numbers + [10, 256][len(numbers) :])))

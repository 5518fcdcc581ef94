"""A first job for a machine that is kept ready: ours, doing nothing, so that the next one finds the guest's code translated and loaded."""

from __future__ import annotations

import asyncio

from blixard.backends.contract import BackendSettings, Execution, Stream
from blixard.backends.microvm.plan import plan_job
from blixard.backends.microvm.run import Run
from blixard.domain.lease import AttemptRef
from blixard.domain.payload import FunctionPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec
from blixard.errors import MachineLost
from blixard.vm.lease import VmLease

_SPEC = JobSpec(
    name="warm-up",
    payload=FunctionPayload(function="builtins:len"),
    requirements=JobRequirements(isolation=Isolation.MAXIMUM),
    timeout=60.0,
)
_EXECUTION = Execution(ref=AttemptRef("", "warm-up", 1), spec=_SPEC, arguments=b'[["x"], {}]')


class _Deaf:
    def started(self, at: int) -> None:
        """Nobody listens."""

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        """Nobody listens."""


async def warm_up(lease: VmLease, settings: BackendSettings) -> None:
    """Run a job that does nothing, and return when nothing of it is left in the guest. Raises ``MachineLost``."""
    plan = await asyncio.to_thread(plan_job, _EXECUTION, settings)
    run = Run(_EXECUTION, _Deaf(), plan, lease, settings)
    ended = await run.run()
    await run.clear()
    if ended.code != 0:
        raise MachineLost(f"a job that does nothing failed in a fresh machine: {ended.error or ended.code}")

"""``MicroVmBackend``: every attempt runs on a virtual machine that somebody else keeps. See DESIGN.md."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TypeVar

from blixard.backends.contract import BackendInfo, BackendSettings, Execution, ExecutionObserver, StopReason
from blixard.backends.microvm.modules import ModuleSource
from blixard.backends.microvm.plan import JobPlan, plan_job
from blixard.backends.microvm.run import Run
from blixard.backends.microvm.verdict import early, outcome_of, with_output
from blixard.backends.outcomes import ended_early, refused
from blixard.backends.runner_backend import Refused
from blixard.backends.slots import Slots
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import Runtime, WasmPayload
from blixard.domain.requirements import Isolation, VmMode
from blixard.errors import (
    ImageNotFound,
    InvalidRequest,
    MachineLost,
    NotEnoughMemory,
    NotSupportedHere,
    VmUnavailable,
    WrongPhase,
)
from blixard.vm.lease import VmLease, VmLeaser, VmNeed

MAX_TRIES = 3
"""Machines that are lost before the job has begun on them cost it nothing, so often."""
NOTES = (
    "maximum: granted files are copied into the machine, and what the job changed is copied back when it has ended",
    "maximum: what a machine is given, and what a job writes, lies in the machine's memory",
)
_One = TypeVar("_One")
_Other = TypeVar("_Other")


class _Attempt:
    """One call of ``execute``. ``stopped`` is done when somebody wants its end before it runs."""

    def __init__(self, execution: Execution, observer: ExecutionObserver) -> None:
        self.execution = execution
        self.observer = observer
        self.stopped: asyncio.Future[StopReason] = asyncio.get_running_loop().create_future()
        self.turn: asyncio.Future[None] | None = None
        self.run: Run | None = None

    def stop(self, reason: StopReason) -> None:
        if self.run is not None:
            self.run.stop(reason)
        elif not self.stopped.done():
            self.stopped.set_result(reason)


class MicroVmBackend:
    """Implements ``ExecutionBackend`` for all runtimes. ``vms`` makes the machines, and is started and stopped by its owner.

    An attempt survives nothing: a machine that is lost ends it as ``lost`` with the cause.
    """

    def __init__(self, settings: BackendSettings, vms: VmLeaser) -> None:
        self._settings = settings
        self._vms = vms
        self._modules = ModuleSource(settings)
        self._attempts: dict[AttemptRef, _Attempt] = {}
        self._tasks: set[asyncio.Task[Outcome]] = set()
        self._queue: deque[_Attempt] = deque()
        self._slots = settings.shared_slots or Slots(settings.slots)
        self._slots.join(self)
        self._busy = 0
        self._is_started = False

    # -- the contract -------------------------------------------------------------------------------------------------

    def info(self) -> BackendInfo:
        return BackendInfo(
            name="microvm",
            runtimes=frozenset(Runtime),
            isolations=frozenset({Isolation.STANDARD, Isolation.MAXIMUM}),
            notes=NOTES,
        )

    async def start(self) -> None:
        self._is_started = True

    async def stop(self) -> None:
        self._is_started = False
        for attempt in list(self._attempts.values()):
            attempt.stop(StopReason.KILL if attempt.run is not None else StopReason.RELEASE)
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._modules.stop()

    async def execute(self, execution: Execution, observer: ExecutionObserver) -> Outcome:
        if not self._is_started:
            return ended_early(OutcomeKind.RELEASED, "")
        attempt = _Attempt(execution, observer)
        self._attempts[execution.ref] = attempt
        task = asyncio.get_running_loop().create_task(self._take_turn(attempt), name=execution.ref.job_id)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            attempt.stop(StopReason.KILL)
            await asyncio.wait([task])
            raise
        finally:
            if self._attempts.get(execution.ref) is attempt:
                del self._attempts[execution.ref]

    def interrupt(self, ref: AttemptRef, reason: StopReason) -> None:
        attempt = self._attempts.get(ref)
        if attempt is not None:
            attempt.stop(reason)

    # -- slots --------------------------------------------------------------------------------------------------------

    def busy_slots(self) -> int:
        return self._busy

    def wants_slot(self) -> bool:
        return bool(self._queue)

    def slot_is_free(self) -> None:
        """Let waiting attempts have their turn."""
        while self._queue and self._slots.may_take(self):
            turn = self._queue.popleft().turn
            assert turn is not None
            self._busy += 1
            turn.set_result(None)

    async def _take_turn(self, attempt: _Attempt) -> Outcome:
        if not await self._wait_for_slot(attempt):
            return _stopped(attempt.stopped.result())
        try:
            return await self._run_attempt(attempt)
        except Refused as refusal:
            return refusal.outcome
        finally:
            self._busy -= 1
            self.slot_is_free()
            self._slots.freed()

    async def _wait_for_slot(self, attempt: _Attempt) -> bool:
        """Wait for this attempt's turn. False if it was stopped before; then it has no slot."""
        if not self._queue and self._slots.may_take(self):
            self._busy += 1
            return True
        attempt.turn = asyncio.get_running_loop().create_future()
        self._queue.append(attempt)
        await _wait_first(attempt.turn, attempt.stopped)
        if attempt.turn.done():
            return True
        self._queue.remove(attempt)
        return False

    # -- one attempt --------------------------------------------------------------------------------------------------

    async def _run_attempt(self, attempt: _Attempt) -> Outcome:
        plan = await self._plan(attempt.execution)
        cause = ""
        for _ in range(MAX_TRIES):
            if attempt.stopped.done():
                return _stopped(attempt.stopped.result())
            try:
                lease = await self._acquire(attempt, plan.need)
            except MachineLost as error:
                cause = error.message
                continue
            if lease is None:
                return _stopped(attempt.stopped.result())
            outcome = await self._run_on(attempt, plan, lease)
            if isinstance(outcome, Outcome):
                return outcome
            cause = outcome
        return ended_early(OutcomeKind.LOST, f"no virtual machine could begin it in {MAX_TRIES} tries: {cause}")

    async def _plan(self, execution: Execution) -> JobPlan:
        """Raises ``Refused``."""
        requirements = execution.spec.requirements
        wanted = Isolation.STANDARD if requirements.vm_mode is VmMode.SERVICE else Isolation.MAXIMUM
        if requirements.isolation is not wanted:
            message = f"virtual machines do not run jobs at isolation {requirements.isolation}"
            hint = "ask for isolation maximum, or for standard with vm_mode service"
            raise Refused(refused("NotSupportedHere", message, hint=hint))
        if isinstance(execution.spec.payload, WasmPayload):
            return await self._modules.plan(execution, execution.spec.payload)
        return await asyncio.to_thread(plan_job, execution, self._settings)

    async def _acquire(self, attempt: _Attempt, need: VmNeed) -> VmLease | None:
        """Return a machine; None if the attempt was stopped meanwhile. Raises ``MachineLost`` and ``Refused``."""
        asking = asyncio.ensure_future(self._vms.acquire(need))
        try:
            await _wait_first(asking, attempt.stopped)
        finally:
            if not asking.done():
                asking.cancel()
                await asyncio.wait([asking])
        if asking.cancelled():
            return None
        try:
            lease = asking.result()
        except (ImageNotFound, NotSupportedHere, InvalidRequest) as error:
            raise Refused(refused(type(error).__name__, error.message, hint=error.hint)) from error
        except (NotEnoughMemory, VmUnavailable, WrongPhase) as error:
            raise Refused(ended_early(OutcomeKind.LOST, error.message)) from error
        if attempt.stopped.done():
            await self._vms.release(lease, broken=False)
            return None
        return lease

    async def _run_on(self, attempt: _Attempt, plan: JobPlan, lease: VmLease) -> Outcome | str:
        """Return how the job ended on this machine; the cause in words if the machine was lost before the job began."""
        run = Run(attempt.execution, attempt.observer, plan, lease, self._settings)
        attempt.run = run
        is_broken = True
        try:
            end = await run.run()
            outcome = outcome_of(attempt.execution, run, end, self._settings)
            if plan.need.mode is VmMode.SERVICE:
                await run.clear()
            is_broken = False
        except MachineLost as error:
            if run.ending is None and run.started_at is None:
                attempt.run = None
                return error.message
            outcome = _lost(attempt.execution, run, error)
        finally:
            await self._vms.release(lease, broken=is_broken)
        return outcome


def _lost(execution: Execution, run: Run, error: MachineLost) -> Outcome:
    if run.ending is not None:
        return with_output(early(execution, run), execution, run)
    words = f"its virtual machine was lost: {error.message}"
    return with_output(ended_early(OutcomeKind.LOST, words, run.started_at), execution, run)


def _stopped(reason: StopReason) -> Outcome:
    """Return the outcome of an attempt that was stopped before it ran."""
    match reason:
        case StopReason.CANCEL:
            return ended_early(OutcomeKind.CANCELLED, "cancelled before it started")
        case StopReason.RELEASE:
            return ended_early(OutcomeKind.RELEASED, "")
        case StopReason.KILL:
            return ended_early(OutcomeKind.LOST, "the lease ended before it started")


async def _wait_first(one: asyncio.Future[_One], other: asyncio.Future[_Other]) -> None:
    """Return when either is done; neither is cancelled."""
    futures: set[asyncio.Future[_One] | asyncio.Future[_Other]] = {one, other}
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)

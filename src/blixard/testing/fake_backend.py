"""A backend that runs nothing: jobs complete at once, or when the test says so."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from blixard.backends.contract import BackendInfo, Execution, ExecutionObserver, StopReason
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import Runtime
from blixard.domain.requirements import Isolation

Script = Callable[[Execution, ExecutionObserver], Outcome]


def complete(execution: Execution, observer: ExecutionObserver) -> Outcome:
    """End a job well, with its arguments as the result, after no time."""
    del observer
    return Outcome(
        kind=OutcomeKind.COMPLETED,
        started_at=1,
        finished_at=2,
        exit_code=0,
        result=msgspec.Raw(execution.arguments),
    )


class FakeAttempt:
    """One execution that waits for the test's word."""

    def __init__(self, execution: Execution, observer: ExecutionObserver) -> None:
        self.execution = execution
        self.observer = observer
        self.is_running = False
        self.done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def finish(self, outcome: Outcome) -> None:
        if not self.done.done():
            self.done.set_result(outcome)


class FakeBackend:
    """Follows the contract of ``ExecutionBackend``: ``slots`` at a time, in order, interruptible.

    ``held`` attempts stay until ``finish``; without it ``script`` decides at once. ``interrupts`` and ``executed`` record the calls.
    """

    def __init__(
        self,
        *,
        slots: int = 1,
        held: bool = False,
        script: Script = complete,
        isolations: frozenset[Isolation] = frozenset({Isolation.MINIMAL, Isolation.STANDARD}),
    ) -> None:
        self.held = held
        self.script = script
        self.slots = slots
        self.attempts: dict[AttemptRef, FakeAttempt] = {}
        self.executed: list[Execution] = []
        self.interrupts: list[tuple[AttemptRef, StopReason]] = []
        self.starts = 0
        self.stops = 0
        self._queue: deque[FakeAttempt] = deque()
        self._running = 0
        self._isolations = isolations

    def info(self) -> BackendInfo:
        missing = {i: "this fake was told not to" for i in Isolation if i not in self._isolations}
        return BackendInfo(name="fake", runtimes=frozenset(Runtime), isolations=self._isolations, missing=missing)

    async def start(self) -> None:
        self.starts += 1

    async def stop(self) -> None:
        self.stops += 1
        for ref in list(self.attempts):
            self.interrupt(ref, StopReason.KILL)

    async def execute(self, execution: Execution, observer: ExecutionObserver) -> Outcome:
        self.executed.append(execution)
        if not self.held:
            return self.script(execution, observer)
        attempt = self.attempts[execution.ref] = FakeAttempt(execution, observer)
        self._queue.append(attempt)
        self._start_next()
        try:
            return await attempt.done
        except asyncio.CancelledError:
            self.interrupts.append((execution.ref, StopReason.KILL))
            raise
        finally:
            self._forget(attempt)

    def interrupt(self, ref: AttemptRef, reason: StopReason) -> None:
        self.interrupts.append((ref, reason))
        attempt = self.attempts.get(ref)
        if attempt is None:
            return
        if not attempt.is_running:
            kind = OutcomeKind.CANCELLED if reason is StopReason.CANCEL else OutcomeKind.RELEASED
            attempt.finish(Outcome(kind=kind))
        elif reason is not StopReason.RELEASE:
            kind = OutcomeKind.CANCELLED if reason is StopReason.CANCEL else OutcomeKind.LOST
            attempt.finish(Outcome(kind=kind, started_at=1, finished_at=2))

    def finish(self, job_id: str, outcome: Outcome | None = None) -> None:
        """End the running attempt of a job; without an outcome: well, with the result null."""
        good = Outcome(
            kind=OutcomeKind.COMPLETED, started_at=1, finished_at=2, exit_code=0, result=msgspec.Raw(b"null")
        )
        next(a for ref, a in self.attempts.items() if ref.job_id == job_id).finish(outcome or good)

    def _start_next(self) -> None:
        while self._queue and self._running < self.slots:
            attempt = self._queue.popleft()
            if not attempt.done.done():
                attempt.is_running = True
                self._running += 1

    def _forget(self, attempt: FakeAttempt) -> None:
        del self.attempts[attempt.execution.ref]
        if attempt.is_running:
            self._running -= 1
        elif attempt in self._queue:
            self._queue.remove(attempt)
        self._start_next()

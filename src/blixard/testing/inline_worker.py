"""The worker's side of the queue for jobs that run in the process of a test."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

import msgspec

from blixard.domain.ids import DEFAULT_NAMESPACE
from blixard.domain.lease import AttemptRef, ClaimedJob, FinishedAttempt, SyncReply, SyncRequest
from blixard.domain.limits import MAX_CLAIM, MAX_INLINE_RESULT_BYTES, MAX_LIST_JOBS
from blixard.domain.outcome import AttemptError, Outcome, OutcomeKind
from blixard.domain.requirements import CPU_STEPS, MEMORY_STEPS_MB, Isolation, WorkerType
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.domain.worker import Registration, WorkerOffer
from blixard.protocol.jobs import JobFilter
from blixard.services.control_plane import ControlPlane
from blixard.testing.clock import FakeClock

EVERYTHING = dict.fromkeys(WorkerType, tuple(Isolation))
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class InlineCall(msgspec.Struct, frozen=True, kw_only=True):
    """One claimed attempt with all that it needs. ``inputs`` maps places to contents."""

    session: str
    ref: AttemptRef
    spec: JobSpec
    arguments: bytes
    inputs: dict[str, bytes]


class InlineEnding(msgspec.Struct, frozen=True, kw_only=True):
    """How a call ended."""

    call: InlineCall
    exit_code: int
    result: bytes | None
    error: AttemptError | None


class InlineWorker:
    """Claims one job after the other. Has a session for each set of labels that jobs ask for: it takes every job there is."""

    def __init__(self, plane: ControlPlane, clock: FakeClock) -> None:
        self._plane = plane
        self._clock = clock
        self._sessions: dict[tuple[tuple[str, str], ...], str | None] = {}
        self._numbers: dict[str, int] = {}

    async def next_call(self, ending: InlineEnding | None) -> InlineCall | None:
        """Report how a call ended; return the next one, None if nothing is due.

        An attempt that waits to be tried again is due: the clock moves to its time.
        """
        if ending is not None:
            await self._sync(ending.call.session, [await self._report(ending)], want=0)
        await self._plane.maintenance.run_once()
        return await self._claim() or (await self._claim() if await self._move_to_retry() else None)

    async def _claim(self) -> InlineCall | None:
        for session in await self._opened_sessions():
            reply = await self._sync(session, [], want=1)
            for claimed in reply.claimed:
                return await self._complete(session, claimed, reply.specs)
        return None

    async def _complete(self, session: str, claimed: ClaimedJob, specs: Mapping[int, JobSpec]) -> InlineCall:
        blobs, digest = self._plane.blobs, claimed.arguments_blob
        return InlineCall(
            session=session,
            ref=claimed.ref,
            spec=specs[claimed.spec],
            arguments=bytes(claimed.arguments) if digest is None else await blobs.get(digest),
            inputs={item.path: await blobs.get(item.digest) for item in claimed.inputs},
        )

    async def _sync(self, session: str, finished: list[FinishedAttempt], *, want: int) -> SyncReply:
        self._numbers[session] = self._numbers.get(session, 0) + 1
        request = SyncRequest(
            session=session,
            number=self._numbers[session],
            finished=finished,
            want=want,
            free_cpus=CPU_STEPS[-1],
            free_memory_mb=MEMORY_STEPS_MB[-1],
        )
        return await self._plane.workers.sync(DEFAULT_NAMESPACE, request)

    async def _report(self, ending: InlineEnding) -> FinishedAttempt:
        now, result = self._clock.now(), ending.result
        digest = None
        if result is not None and len(result) > MAX_INLINE_RESULT_BYTES:
            digest = await self._plane.blobs.put(result)
        is_good = ending.exit_code == 0 and ending.error is None
        outcome = Outcome(
            kind=OutcomeKind.COMPLETED if is_good else OutcomeKind.FAILED,
            started_at=now,
            finished_at=now,
            exit_code=ending.exit_code,
            error=ending.error,
            result_blob=digest,
        )
        if result is not None and digest is None:
            outcome = msgspec.structs.replace(outcome, result=msgspec.Raw(result))
        return FinishedAttempt(ref=ending.call.ref, outcome=outcome)

    def expect(self, labels: Mapping[str, str]) -> None:
        """Be ready for jobs that ask for these labels."""
        key = tuple(sorted(labels.items()))
        self._sessions.setdefault(key, None)

    async def _opened_sessions(self) -> list[str]:
        for labels, session in list(self._sessions.items()):
            if session is None:
                self._sessions[labels] = await self._register(dict(labels))
        return [session for session in self._sessions.values() if session is not None]

    async def _register(self, labels: dict[str, str]) -> str:
        offer = WorkerOffer(
            capabilities=EVERYTHING, labels=labels, cpus=CPU_STEPS[-1], memory_mb=MEMORY_STEPS_MB[-1], slots=MAX_CLAIM
        )
        reply = await self._plane.workers.register(DEFAULT_NAMESPACE, Registration(name="inline", offer=offer))
        return reply.session

    async def _move_to_retry(self) -> bool:
        """Move the clock to the next attempt of a job that has failed before; False if there is none."""
        page = await self._plane.queries.jobs(
            DEFAULT_NAMESPACE, JobFilter(states=(JobState.PENDING,)), limit=MAX_LIST_JOBS
        )
        due = [job.run_at for job in page.jobs if job.failures]
        if not due:
            return False
        left = (min(due) - EPOCH) // dt.timedelta(microseconds=1) - self._clock.now()
        self._clock.advance(max(0, left + 1) / 1e6)
        await self._plane.maintenance.run_once()
        return True

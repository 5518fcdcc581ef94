"""One session: a life of a worker from registration to good-bye, expiry or lapse."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from blixard.backends.contract import BulkBackend, ExecutionBackend, StopReason, Stream
from blixard.domain.lease import AttemptRef, ClaimedJob, FinishedAttempt, StartedAttempt, SyncReply, SyncRequest
from blixard.domain.limits import MAX_CLAIM, MIB
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import FunctionPayload, ScriptPayload, blobs_of
from blixard.domain.requirements import Isolation, WorkerType, worker_type_for
from blixard.domain.spec import JobSpec
from blixard.errors import BlixardError, SessionExpired
from blixard.services.clock import Clock
from blixard.worker import outcomes
from blixard.worker.appetite import Appetite
from blixard.worker.attempt_runner import AttemptRunner
from blixard.worker.capacity import Capacity
from blixard.worker.gateway import WorkerGateway
from blixard.worker.held import HeldAttempt, Phase, ResolvedSpec
from blixard.worker.local_files import LocalFiles
from blixard.worker.log_shipper import LogShipper
from blixard.worker.options import WorkerOptions
from blixard.worker.sync_link import SyncLink

BackendTable = Mapping[tuple[WorkerType, Isolation], ExecutionBackend]
MAX_REPORT_BYTES = 8 * MIB
"""Results and errors in one sync; the server takes requests of 16 MiB. The rest goes with the next."""
REPORT_OVERHEAD = 256
MAX_KINDS = 256
"""Specs that are remembered."""
PARK_PAUSE_SECONDS = 0.1
PARK_DELAY_SECONDS = 0.003
"""Between taking jobs and parking the next sync: short jobs end before, and their report asks for more by itself."""
GOODBYE_SECONDS = 3.0
"""How long a killed worker tries to deliver its last reports."""
_encode = msgspec.msgpack.Encoder().encode
logger = logging.getLogger(__name__)


class SessionEnd(enum.Enum):
    CLOSED = enum.auto()
    """Said good-bye, or tried to."""
    EXPIRED = enum.auto()
    """The server gave its jobs to others."""
    LAPSED = enum.auto()
    """No answer for the lease time; own jobs were ended."""


class Session:
    """Runs what it claims until stopped. All methods belong on one event loop.

    Every finished attempt is reported until the server has answered; every claim that was answered is run or given back.
    """

    def __init__(
        self,
        *,
        session: str,
        lease_seconds: float,
        gateway: WorkerGateway,
        backends: BackendTable,
        options: WorkerOptions,
        clock: Clock,
        files: LocalFiles,
    ) -> None:
        self.id = session
        self.error: BlixardError | None = None
        """Why the server refuses this worker; then no other session would help."""
        self._lease_seconds = lease_seconds
        self._gateway = gateway
        self._backends = backends
        self._bulk = {place: backend for place, backend in backends.items() if isinstance(backend, BulkBackend)}
        self._options = options
        self._clock = clock
        self._files = files
        self._logs = LogShipper(gateway, session, clock, self)
        self._runner = AttemptRunner(gateway, files, self._logs, clock)
        self._capacity = Capacity(options.offer)
        self._appetite = Appetite(options.offer.slots, options.prefetch)
        self._kinds: dict[bytes, ResolvedSpec] = {}
        self._held: dict[AttemptRef, HeldAttempt] = {}
        self._active = 0
        self._waiting: deque[HeldAttempt] = deque()
        self._finished: deque[FinishedAttempt] = deque()
        self._started: list[StartedAttempt] = []
        self._reporting = False
        self._parked = False
        self._parked_at = 0.0
        self._pause: asyncio.TimerHandle | None = None
        self._wanted = 0
        self._held_sent_at = float("-inf")
        self._planned = False
        self._draining = False
        self._stopping = False
        self._killed = False
        self._ending: SessionEnd | None = None
        self._over = asyncio.Event()
        self._all_ended = asyncio.Event()
        self._timers: list[asyncio.TimerHandle] = []

    async def run(self) -> SessionEnd:
        """Live. Returns when everything that was claimed has ended and is reported, or the session is lost."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._link = SyncLink(self._gateway, self._clock, self, self._tasks)
                helpers = [
                    self._tasks.create_task(self._logs.run(), name="ship output"),
                    self._tasks.create_task(self._watch_lease(), name="watch the lease"),
                ]
                try:
                    self._plan()
                    await self._over.wait()
                finally:
                    for helper in helpers:
                        helper.cancel()
                    self._link.close()
                    self._drop_all()
                    await self._until_all_ended()
        finally:
            for timer in [*self._timers, *filter(None, [self._pause])]:
                timer.cancel()
        if self._ending is not SessionEnd.EXPIRED:
            await self._say_goodbye()
        assert self._ending is not None
        return self._ending

    def stop(self) -> None:
        """Give back what has not started, let the rest go on for the grace time, then end it and say good-bye."""
        if self._stopping:
            return
        self._stopping = True
        self._ending = self._ending or SessionEnd.CLOSED
        self._drain()
        self._later(self._options.grace_seconds, self.kill)
        self._check_over()

    def kill(self) -> None:
        """End everything now; deliver the reports within ``GOODBYE_SECONDS`` or leave them to the rescuer.

        What it ends is given back and costs the jobs nothing: that somebody stops workers is neither their fault nor an accident.
        """
        self.stop()
        self._killed = True
        self._stop_all(StopReason.KILL)
        self._later(GOODBYE_SECONDS, self._over.set)

    # What the sync link says

    def answered(self, request: SyncRequest, reply: SyncReply) -> None:
        for finished in request.finished:
            self._held.pop(finished.ref, None)
        if request.wait:
            self._parked = False
            self._pace(request, reply)
        else:
            self._reporting = False
        self._wanted -= request.want
        if reply.claimed:
            self._take_all(reply.claimed, reply.specs)
            if self._pause is None:
                self._pause = asyncio.get_running_loop().call_later(PARK_DELAY_SECONDS, self._end_pause)
        for ref in reply.lost:
            if ref in self._held:
                self._lose(self._held[ref])
        for ref in reply.cancelled:
            if ref in self._held:
                self._interrupt(self._held[ref], StopReason.CANCEL)
        if reply.drain and not self._draining:
            logger.info("session %s was told to drain", self.id)
            self._drain()
        self._plan_soon()
        self._check_over()

    def expired(self, error: SessionExpired) -> None:
        if self._ending is not SessionEnd.EXPIRED:
            logger.warning("session %s has expired; its jobs are ended: %s", self.id, error)
            self._ending = SessionEnd.EXPIRED
            self._drop_all()
        self._over.set()

    def refused(self, error: BlixardError) -> None:
        self.error = error
        self._ending = SessionEnd.CLOSED
        self._drop_all()
        self._over.set()

    # What running attempts say

    def attempt_started(self, held: HeldAttempt, at: int) -> None:
        self._started.append(StartedAttempt(held.ref, at))
        self._plan_soon()

    def attempt_wrote(self, held: HeldAttempt, at: int, stream: Stream, data: bytes) -> None:
        if not held.lost:
            self._logs.write(held.ref, at, stream, data)

    def attempt_ended(self, held: HeldAttempt, outcome: Outcome) -> None:
        self._runner.release(held)
        if held.kind.is_sized:
            self._capacity.give_back(held.kind.spec)
            self._launch_waiting()
        if outcome.started_at and outcome.finished_at:
            self._appetite.heard((outcome.finished_at - outcome.started_at) / 1e6, self._clock.monotonic())
        self._note_end(held)
        if self._killed and outcome.kind is OutcomeKind.LOST:
            outcome = outcomes.given_back(outcome)
        if not held.lost and (held.has_output or self._runner.is_large(outcome)):
            self._tasks.create_task(self._store(held, outcome))
        else:
            self._settle(held, outcome)

    # Syncs

    def _plan_soon(self) -> None:
        # One turn later, so that all that ends in this turn of the loop goes into one request.
        if not self._planned:
            self._planned = True
            asyncio.get_running_loop().call_soon(self._plan)

    def _plan(self) -> None:
        """Send a sync if there is something to say, and else keep one parked for claims and cancels."""
        self._planned = False
        if self._over.is_set() or self._reporting:
            return
        if self._finished or self._started:
            self._reporting = True
            self._post(wait=0.0)
        elif not self._parked and self._pause is None:
            self._parked = True
            self._parked_at = asyncio.get_running_loop().time()
            self._post(wait=self._lease_seconds / 3)

    def _pace(self, request: SyncRequest, reply: SyncReply) -> None:
        """Wait a little before the next parked sync if this one came back at once without work.

        A cancel and a drain are told again in every answer until they are done: without this, both sides would spin.
        """
        loop = asyncio.get_running_loop()
        is_newest = request.number == self._link.next_number - 1
        if is_newest and not reply.claimed and loop.time() - self._parked_at < PARK_PAUSE_SECONDS:
            self._pause = loop.call_later(PARK_PAUSE_SECONDS, self._end_pause)

    def _end_pause(self) -> None:
        self._pause = None
        self._plan()

    def _post(self, *, wait: float) -> None:
        now = self._clock.monotonic()
        third = self._lease_seconds / 3
        since = now - self._held_sent_at
        finished = self._take_finished()
        holding = None
        if since >= third / 2:
            reported = {item.ref for item in finished}
            holding = [ref for ref in self._held if ref not in reported]
            self._held_sent_at = now
            since = 0.0
        want = self._want(now)
        self._wanted += want
        self._link.post(
            SyncRequest(
                session=self.id,
                number=self._link.next_number,
                seen=self._link.seen,
                finished=finished,
                started=self._take_started(),
                holding=holding,
                want=want,
                free_cpus=0.0 if self._waiting else self._capacity.free_cpus,
                free_memory_mb=0 if self._waiting else self._capacity.free_memory_mb,
                wait=min(wait, third - since),
            )
        )

    def _want(self, now: float) -> int:
        if self._draining:
            return 0
        room = self._appetite.target(now, self._active) - self._active - self._wanted
        return min(max(room, 0), MAX_CLAIM)

    def _take_finished(self) -> list[FinishedAttempt]:
        taken: list[FinishedAttempt] = []
        size = 0
        while self._finished and size < MAX_REPORT_BYTES and len(taken) < MAX_CLAIM:
            finished = self._finished.popleft()
            if self._held[finished.ref].lost:
                del self._held[finished.ref]
                continue
            size += _report_size(finished.outcome)
            taken.append(finished)
        return taken

    def _take_started(self) -> list[StartedAttempt]:
        started = [s for s in self._started if s.ref in self._held and self._held[s.ref].phase is not Phase.ENDED]
        self._started.clear()
        return started

    # Claims

    def _take_all(self, claimed: Sequence[ClaimedJob], specs: Mapping[int, JobSpec]) -> None:
        kinds = {key: self._kind_of(spec) for key, spec in specs.items()}
        for claim in claimed:
            if claim.ref not in self._held:
                self._take(HeldAttempt(claim, kinds[claim.spec], self))

    def _kind_of(self, spec: JobSpec) -> ResolvedSpec:
        """Return the same object for equal specs, so that backends know again what they have learned of one."""
        key = _encode(spec)
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            kind = self._kinds[key] = self._resolve(spec)
        return kind

    def _resolve(self, spec: JobSpec) -> ResolvedSpec:
        payload, requirements = spec.payload, spec.requirements
        type_ = worker_type_for(spec.runtime, requirements.isolation, requirements.vm_mode)
        return ResolvedSpec(
            spec=spec,
            backend=self._backends.get((type_, requirements.isolation)),
            bulk=self._bulk.get((type_, requirements.isolation)),
            digests=tuple(blobs_of(payload)),
            bundle=payload.bundle if isinstance(payload, FunctionPayload | ScriptPayload) else None,
            is_sized=requirements.cpus is not None or requirements.memory_mb is not None,
        )

    def _take(self, held: HeldAttempt) -> None:
        self._held[held.ref] = held
        self._active += 1
        if self._draining:
            self._end(held, outcomes.not_started(StopReason.RELEASE))
        elif held.kind.is_sized and (self._waiting or not self._capacity.take(held.kind.spec)):
            self._waiting.append(held)
        else:
            self._launch(held)

    def _launch(self, held: HeldAttempt) -> None:
        held.phase = Phase.PREPARING
        if not self._runner.begin(held):
            self._tasks.create_task(self._carry_out(held))

    def _launch_waiting(self) -> None:
        while self._waiting and self._capacity.take(self._waiting[0].kind.spec):
            self._launch(self._waiting.popleft())

    async def _carry_out(self, held: HeldAttempt) -> None:
        self.attempt_ended(held, await self._runner.execute(held))

    async def _store(self, held: HeldAttempt, outcome: Outcome) -> None:
        self._settle(held, await self._runner.store(held, outcome))

    def _end(self, held: HeldAttempt, outcome: Outcome) -> None:
        """End an attempt that was never launched."""
        self._note_end(held)
        self._settle(held, outcome)

    def _note_end(self, held: HeldAttempt) -> None:
        held.phase = Phase.ENDED
        self._active -= 1
        if not self._active:
            self._all_ended.set()

    async def _until_all_ended(self) -> None:
        """Wait for the backends; what they run without a coroutine of ours is no task of the group."""
        while self._active:
            self._all_ended.clear()
            await self._all_ended.wait()

    def _settle(self, held: HeldAttempt, outcome: Outcome) -> None:
        if held.lost:
            self._held.pop(held.ref, None)
            self._check_over()
        else:
            self._finished.append(FinishedAttempt(ref=held.ref, outcome=outcome))
        self._plan_soon()

    # Ends

    def _interrupt(self, held: HeldAttempt, reason: StopReason) -> None:
        if held.phase is Phase.WAITING:
            self._waiting.remove(held)
            self._end(held, outcomes.not_started(reason))
        else:
            self._runner.interrupt(held, reason)

    def _stop_all(self, reason: StopReason) -> None:
        for held in list(self._held.values()):
            self._interrupt(held, reason)

    def _lose(self, held: HeldAttempt) -> None:
        held.lost = True
        self._logs.forget(held.ref)
        self._interrupt(held, StopReason.KILL)

    def _drop_all(self) -> None:
        self._draining = True
        for held in list(self._held.values()):
            self._lose(held)

    def _drain(self) -> None:
        self._draining = True
        self._stop_all(StopReason.RELEASE)

    def _check_over(self) -> None:
        if self._ending is not None and not self._held and not self._reporting:
            self._over.set()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, action))

    async def _watch_lease(self) -> None:
        while (left := self._link.renewed_at + self._lease_seconds - self._clock.boottime()) > 0:  # noqa: ASYNC110 - time itself is awaited
            await asyncio.sleep(min(left, self._lease_seconds / 10))
        logger.warning("session %s had no answer for %g s; its jobs are ended", self.id, self._lease_seconds)
        if self._ending is None:
            self._ending = SessionEnd.LAPSED
        self._draining = True
        self._stop_all(StopReason.KILL)
        self._check_over()

    async def _say_goodbye(self) -> None:
        try:
            async with asyncio.timeout(GOODBYE_SECONDS):
                await self._gateway.close_session(self.id)
        except (BlixardError, TimeoutError) as error:
            # Nothing of ours runs any more; what the server still counts as ours is given to others when the lease is over.
            logger.warning("session %s could not be closed: %s", self.id, error or "no answer")


def _report_size(outcome: Outcome) -> int:
    size = REPORT_OVERHEAD
    if outcome.result is not None:
        size += len(bytes(outcome.result))
    if outcome.error is not None:
        size += len(outcome.error.message) + len(outcome.error.traceback or "")
    return size

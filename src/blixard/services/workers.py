"""Workers: register, sync, good-bye. ``sync`` is the one call for all that concerns leases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

from blixard.domain.ids import check_id, new_id
from blixard.domain.lease import AttemptRef, ClaimedJob, FinishedAttempt, SyncReply, SyncRequest
from blixard.domain.limits import MAX_CLAIM
from blixard.domain.outcome import OutcomeKind
from blixard.domain.worker import Registration, SessionState
from blixard.errors import InvalidRequest, LeaseLost, LimitExceeded, SessionExpired, WorkerNotFound
from blixard.protocol.workers import LogBatch, RegisterReply, WorkerView
from blixard.services.clock import Clock
from blixard.services.maintenance.rescuer import RENEWAL_SHARE
from blixard.services.placement import PlacementService
from blixard.services.signals import Signals
from blixard.services.views import worker_view
from blixard.storage.locks import boot_id
from blixard.storage.logs import LogAppend, LogStore
from blixard.storage.repositories.leases import LeaseRepository
from blixard.storage.repositories.sessions import SessionRepository, StoredSession

MAX_FINISHED = 10_000
MAX_HOLDING = 20_000
MAX_SLOTS = 4_096
LOSE_STEP = 1_000
ENDED = frozenset({SessionState.DEAD, SessionState.CLOSED})
RETRYABLE = frozenset({OutcomeKind.FAILED, OutcomeKind.TIMED_OUT})


class Life:
    """What this process remembers of a living session: all of it can be read again from the store."""

    def __init__(self, stored: StoredSession) -> None:
        self.session = stored.session
        self.last_number = stored.last_number
        self.owner = (stored.namespace, stored.token)
        self.is_remembered = False
        """False before the first sync here: a server that died may have served the same number without noting it."""
        self.renewed_at = float("-inf")
        self.parked_for: frozenset[int] = frozenset()
        """Classes that a parked sync would claim from."""
        self.is_expecting = False
        """A job for the parked sync is on its way into the store."""
        self.turn = asyncio.Lock()
        self.poke = asyncio.Event()
        self.waiting = 0


class WorkerService:
    def __init__(
        self,
        sessions: SessionRepository,
        leases: LeaseRepository,
        placement: PlacementService,
        logs: LogStore,
        signals: Signals,
        clock: Clock,
        *,
        lease_seconds: float,
        lock_directory: Path | None,
    ) -> None:
        self._sessions = sessions
        self._leases = leases
        self._placement = placement
        self._logs = logs
        self._signals = signals
        self._clock = clock
        self._lease_seconds = lease_seconds
        self._lock_directory = lock_directory
        self._host = boot_id()
        self._lives: dict[str, Life] = {}

    async def register(self, namespace: str, registration: Registration, *, token: str = "") -> RegisterReply:
        """Begin a session. Repeating it with the same ``session`` is the same session. Raises ``InvalidRequest``.

        ``token`` is the id of the caller's token (empty: none was needed). Only calls with the same one can speak for the session;
        to all others it does not exist.
        """
        _check_registration(registration)
        session = registration.session or new_id("session")
        await self._sessions.add(namespace, session, registration, self._clock.now(), token=token)
        same_machine = self._lock_directory is not None and registration.host == self._host != ""
        lock_path = str(self._lock_directory / f"{session}.lock") if same_machine and self._lock_directory else None
        return RegisterReply(session=session, lease_seconds=self._lease_seconds, lock_path=lock_path)

    async def sync(self, namespace: str, request: SyncRequest, *, token: str = "") -> SyncReply:
        """Store what the worker reports, renew its leases, hand it new ones; see ``SyncRequest`` for what it may rely on.

        Parked for up to ``wait`` seconds when there is nothing to say; a newer sync of the session ends the parked one.
        Raises ``SessionExpired`` when the session is not alive: nothing that it reports is stored then.
        """
        _check_sync(request, self._lease_seconds)
        life = await self._life(namespace, request.session, token)
        life.waiting += 1
        life.poke.set()
        try:
            await life.turn.acquire()
        finally:  # also when the worker hangs up while it queues: or no later sync would ever be parked
            life.waiting -= 1
            if not life.waiting:
                life.poke.clear()
        try:
            return await self._serve(namespace, request, life)
        finally:
            life.turn.release()

    def expect(self, class_id: int) -> None:
        """Let one parked sync claim from this class with the very commit that is about to store a job of it.

        Only saves time: a claim that comes too early finds nothing and waits on.
        """
        for life in self._lives.values():
            if class_id in life.parked_for and not life.is_expecting:
                life.is_expecting = True
                self._signals.wake()
                return

    async def _life(self, namespace: str, session: str, token: str) -> Life:
        life = self._lives.get(session)
        if life is None:
            stored = await self._sessions.find(session)
            if stored is None:
                raise _expired(session)
            life = Life(stored)
        if life.owner != (namespace, token):
            raise _expired(session)
        return self._lives.setdefault(session, life)

    async def _serve(self, namespace: str, request: SyncRequest, life: Life) -> SyncReply:
        is_old = request.number < life.last_number
        claimed = await self._claimed_before(request, life)
        retry_at = await self._retry_times(request.finished)
        classes = [] if claimed or is_old else await self._classes(namespace, request, life)
        claim_now = bool(classes) and await self._placement.has_ready_job(classes)
        state, lost, more = await asyncio.gather(
            self._renew(namespace, request, life),
            self._store_reports(namespace, request, retry_at),
            self._claim(request, life, classes) if claim_now else _nothing(),
        )
        if state is None or state in ENDED:
            self._lives.pop(request.session, None)
            raise _expired(request.session)
        claimed = claimed or more
        life.last_number = max(life.last_number, request.number)
        if request.holding is not None:
            lost = lost + await self._reconcile(request, request.holding)
        cancelled = await self._leases.cancelled(request.session)
        drain = state is SessionState.DRAINING
        if not (claimed or cancelled or lost or drain or is_old):
            try:
                claimed, cancelled, drain = await self._park(namespace, request, life)
            finally:
                life.parked_for, life.is_expecting = frozenset(), False
        specs = await self._placement.specs(job.spec for job in claimed) if claimed else {}
        return SyncReply(claimed=claimed, specs=specs, cancelled=cancelled, lost=lost, drain=drain)

    async def _claimed_before(self, request: SyncRequest, life: Life) -> list[ClaimedJob]:
        """Return what a repeated sync has claimed when it came first."""
        if life.is_remembered and request.number > life.last_number:
            return []
        life.is_remembered = True
        return await self._leases.claimed_by(request.session, request.number)

    async def _renew(self, namespace: str, request: SyncRequest, life: Life) -> SessionState | None:
        """Count a renewal if the last one is a while ago; return the session's state.

        Most syncs would else cost a write that counts what the rescuer needs to see only now and then.
        """
        now = self._clock.monotonic()
        if now - life.renewed_at < RENEWAL_SHARE * self._lease_seconds:
            stored = await self._sessions.find(request.session)
            return stored.session.state if stored else None
        life.renewed_at = now
        return await self._sessions.renew(namespace, request.session, request.number, self._clock.now())

    async def _classes(self, namespace: str, request: SyncRequest, life: Life) -> list[int]:
        """Return the classes to claim from. An embedded worker takes what its own process submitted before what others left behind."""
        if request.want <= 0:
            return []
        offer = life.session.offer
        classes = await self._placement.matching(namespace, offer, request.free_cpus, request.free_memory_mb)
        if offer.submitter is None:
            return classes
        own = self._placement.submitted_by(offer.submitter, classes)
        return own if own and await self._placement.has_ready_job(own) else classes

    async def _claim(self, request: SyncRequest, life: Life, classes: Iterable[int]) -> list[ClaimedJob]:
        return await self._leases.claim(
            session=request.session,
            worker=life.session.name,
            number=request.number,
            classes=classes,
            want=request.want,
            now=self._clock.now(),
        )

    async def _retry_times(self, finished: list[FinishedAttempt]) -> dict[AttemptRef, int]:
        """Return when each failed attempt would be tried again, should it have retries left."""
        failed = [item.ref for item in finished if item.outcome.kind in RETRYABLE]
        if not failed:
            return {}
        facts = await self._leases.retry_facts(failed)
        now = self._clock.now()
        times = {}
        for ref in failed:
            if fact := facts.get((ref.namespace, ref.job_id)):
                delay = fact.policy.delay_after(fact.failures + 1, self._clock.random())
                times[ref] = now + int(delay * 1e6)
        return times

    async def _store_reports(
        self, namespace: str, request: SyncRequest, retry_at: dict[AttemptRef, int]
    ) -> list[AttemptRef]:
        """Store what started and ended; return the leases among them that were not this session's any more."""
        now = self._clock.now()
        started = self._leases.start(request.session, request.started, now) if request.started else _none()
        finished = request.finished
        if not finished:
            await started
            return []
        _, ended = await asyncio.gather(
            started, self._leases.finish(namespace, request.session, finished, retry_at, now)
        )
        stale = [item.ref for item in finished if item.ref not in ended] if len(ended) < len(finished) else []
        if not stale:
            return []
        repeated = await self._leases.already_ended(request.session, stale)
        return [ref for ref in stale if ref not in repeated]

    async def _reconcile(self, request: SyncRequest, holding: list[AttemptRef]) -> list[AttemptRef]:
        """Compare what the worker holds with what the store says; return what is not the worker's (any more)."""
        stored = await self._leases.held_by(request.session)
        held = set(holding)
        forgotten = [ref for ref, number in stored.items() if ref not in held and number <= request.seen]
        for start in range(0, len(forgotten), LOSE_STEP):
            step = forgotten[start : start + LOSE_STEP]
            await self._leases.lose(
                request.session,
                refs=step,
                message="the worker did not know of this attempt any more",
                limit=LOSE_STEP,
                now=self._clock.now(),
            )
        return [ref for ref in holding if ref not in stored]

    async def _park(
        self, namespace: str, request: SyncRequest, life: Life
    ) -> tuple[list[ClaimedJob], list[AttemptRef], bool]:
        """Wait for a job to claim, a cancel, a drain, or the next sync of the session."""
        deadline = self._clock.monotonic() + request.wait
        while True:
            generation = self._signals.generation
            left = deadline - self._clock.monotonic()
            if left <= 0 or life.poke.is_set():
                return [], [], False
            classes = await self._classes(namespace, request, life)
            life.parked_for = frozenset(classes)
            if classes and (life.is_expecting or await self._placement.has_ready_job(classes)):
                life.is_expecting = False
                claimed = await self._claim(request, life, classes)
                if claimed:
                    return claimed, await self._leases.cancelled(request.session), False
            cancelled = await self._leases.cancelled(request.session)
            stored = await self._sessions.find(request.session)
            if stored is None or stored.session.state in ENDED:
                self._lives.pop(request.session, None)
                raise _expired(request.session)
            drain = stored.session.state is SessionState.DRAINING
            if cancelled or drain:
                return [], cancelled, drain
            await self._signals.changed(generation, left, life.poke)

    async def append_logs(self, namespace: str, session: str, batches: list[LogBatch], *, token: str = "") -> None:
        """Keep output of attempts that the session holds. Repeating it is harmless. Raises ``SessionExpired``, ``LeaseLost``."""
        await self._life(namespace, session, token)
        held = await self._leases.held_by(session)
        stale = [batch.ref for batch in batches if batch.ref not in held]
        appends = [_append(batch) for batch in batches if batch.ref in held]
        await self._logs.append(appends)
        if stale:
            raise LeaseLost(f"attempt {stale[0].attempt} of job {stale[0].job_id!r} is not held by this worker")

    async def close(self, namespace: str, session: str, *, token: str = "") -> None:
        """End a session; what it still holds goes to others. Repeating it is harmless."""
        if await self._sessions.close(namespace, session, self._clock.now(), token=token):
            await self._lose_all(session, "the worker ended and left this attempt behind")
        life = self._lives.get(session)
        if life is not None and life.owner == (namespace, token):
            del self._lives[session]
            life.poke.set()

    async def _lose_all(self, session: str, message: str) -> None:
        while await self._leases.lose(session, refs=None, message=message, limit=LOSE_STEP, now=self._clock.now()):
            pass

    async def workers(self, namespace: str) -> list[WorkerView]:
        """Return the sessions that are alive."""
        return [worker_view(session) for session in await self._sessions.alive(namespace)]

    async def drain(self, namespace: str, session: str) -> WorkerView:
        """Let a worker finish what it has and take nothing new. Raises ``WorkerNotFound``."""
        if not await self._sessions.drain(namespace, session):
            raise WorkerNotFound(session)
        stored = await self._sessions.find(session)
        if stored is None:
            raise WorkerNotFound(session)
        return worker_view(stored.session)

    def poke_all(self) -> None:
        """End every parked sync, such as before the server stops."""
        for life in self._lives.values():
            life.poke.set()


async def _nothing() -> list[ClaimedJob]:
    return []


async def _none() -> None:
    return None


def _expired(session: str) -> SessionExpired:
    return SessionExpired(f"the session {session!r} is not alive", hint="the worker ends its jobs and registers again")


def _append(batch: LogBatch) -> LogAppend:
    return LogAppend(
        namespace=batch.ref.namespace,
        job_id=batch.ref.job_id,
        attempt=batch.ref.attempt,
        records=batch.records,
        offset=batch.offset,
        ended=batch.ended,
        dropped=batch.dropped,
    )


def _check_registration(registration: Registration) -> None:
    if registration.session is not None:
        check_id(registration.session, field="session")
    if not 1 <= len(registration.name) <= 255 or not registration.name.isprintable():
        raise InvalidRequest("a worker's name has 1 to 255 printable characters", field="name")
    if not registration.offer.capabilities:
        raise InvalidRequest("a worker must be able to run something", field="offer.capabilities")
    if not 1 <= registration.offer.slots <= MAX_SLOTS:
        raise InvalidRequest(f"slots is {registration.offer.slots}; 1 to {MAX_SLOTS} is allowed", field="offer.slots")


def _check_sync(request: SyncRequest, lease_seconds: float) -> None:
    checks: tuple[tuple[str, float, Callable[[], float]], ...] = (
        ("finished", MAX_FINISHED, lambda: len(request.finished)),
        ("started", MAX_FINISHED, lambda: len(request.started)),
        ("holding", MAX_HOLDING, lambda: len(request.holding or ())),
        ("want", MAX_CLAIM, lambda: request.want),
        ("wait", lease_seconds / 3, lambda: request.wait),
    )
    for field, most, size in checks:
        if not 0 <= size() <= most:
            raise LimitExceeded(f"{field} is {size():g}; 0 to {most:g} is allowed", field=field)
    if request.number < 1:
        raise InvalidRequest("numbers of syncs start at 1", field="number")

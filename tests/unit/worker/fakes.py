"""A control plane of a few lines, faithful to the words of domain/lease.py, with faults on order."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any  # options of the fake backend are passed through

import msgspec

from blixard.backends.contract import EndObserver, Execution
from blixard.domain.grants import InputFile
from blixard.domain.lease import AttemptRef, ClaimedJob, FinishedAttempt, SyncReply, SyncRequest
from blixard.domain.payload import CommandPayload, Payload
from blixard.domain.requirements import Isolation, JobRequirements, WorkerType
from blixard.domain.spec import JobSpec
from blixard.domain.worker import Registration, WorkerOffer
from blixard.errors import BlobNotFound, LeaseLost, OutcomeUnknown, ServerUnreachable, SessionExpired
from blixard.protocol.workers import LogBatch, RegisterReply
from blixard.services.clock import Clock, SystemClock
from blixard.testing.fake_backend import FakeBackend
from blixard.worker.home import WorkerHome
from blixard.worker.local_gateway import write_file
from blixard.worker.options import WorkerOptions
from blixard.worker.worker import Worker

DEADLINE = 20.0
"""Generous: the tests wait for conditions, and only a broken one takes so long."""


def command_spec(payload: Payload | None = None, **requirements: object) -> JobSpec:
    needs = msgspec.convert({"isolation": Isolation.MINIMAL, **requirements}, JobRequirements)
    return JobSpec(name="job", payload=payload or CommandPayload(argv=("true",)), requirements=needs)


class FakeJob(msgspec.Struct, kw_only=True):
    id: str
    spec: JobSpec
    arguments: bytes = b"[]"
    arguments_blob: str | None = None
    inputs: tuple[InputFile, ...] = ()
    attempt: int = 0
    session: str | None = None
    cancelled: bool = False
    ended: FinishedAttempt | None = None
    started_at: int | None = None


class FakeGateway:
    """One session is alive at a time. ``down`` makes every call unreachable; ``lose_replies`` loses that many sync answers after they took effect."""

    def __init__(self, lease_seconds: float = 10.0) -> None:
        self.lease_seconds = lease_seconds
        self.jobs: dict[str, FakeJob] = {}
        self.requests: list[SyncRequest] = []
        self.answers: dict[tuple[str, int], SyncReply] = {}
        self.registrations: list[Registration] = []
        self.closed: list[str] = []
        self.session: str | None = None
        self.down = False
        self.lose_replies = 0
        self.lost_replies = 0
        self.faults = 0
        self.lost: list[AttemptRef] = []
        self.drain = False
        self.blobs: dict[str, bytes] = {}
        self.logs: dict[AttemptRef, list[LogBatch]] = {}
        self.log_calls = 0
        self.lose_log_replies = 0
        self.stale_logs: set[AttemptRef] = set()
        self.fetches: list[str] = []
        self.history: list[str] = []
        self._newest = 0
        self._rings: set[asyncio.Event] = set()
        self.changed = asyncio.Condition()

    # What tests do

    def submit(self, *ids: str, spec: JobSpec | None = None, **fields: object) -> None:
        for id_ in ids:
            self.jobs[id_] = msgspec.convert({"id": id_, "spec": spec or command_spec(), **fields}, FakeJob)
        self.ring()

    def cancel(self, id_: str) -> None:
        self.jobs[id_].cancelled = True
        self.ring()

    def add_blob(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def ring(self) -> None:
        for ring in self._rings:
            ring.set()

    def expire(self) -> None:
        self.session = None
        self.ring()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE):
            async with self.changed:
                await self.changed.wait_for(lambda: bool(condition()))

    async def until_faults(self, count: int) -> None:
        await self.until(lambda: self.faults >= count)

    async def until_ended(self, *ids: str) -> None:
        await self.until(lambda: all(self.jobs[i].ended for i in ids))

    def kind(self, id_: str) -> str:
        ended = self.jobs[id_].ended
        return str(ended.outcome.kind) if ended else "not ended"

    # WorkerGateway

    async def register(self, registration: Registration) -> RegisterReply:
        await self._check_up()
        self.registrations.append(registration)
        assert registration.session
        self.session = registration.session
        self._newest = 0
        await self._changed()
        return RegisterReply(session=registration.session, lease_seconds=self.lease_seconds)

    async def sync(self, request: SyncRequest) -> SyncReply:
        await self._check_up()
        self._check_session(request.session)
        self.requests.append(request)
        self._newest = max(self._newest, request.number)
        self.ring()
        await self._changed()
        reply = await self._answer(request)
        if self.lose_replies:
            self.lose_replies -= 1
            self.lost_replies += 1
            raise OutcomeUnknown("the fake lost its answer")
        await self._changed()
        return reply

    async def append_logs(self, session: str, batches: Sequence[LogBatch]) -> None:
        await self._check_up()
        self._check_session(session)
        self.log_calls += 1
        if any(batch.ref in self.stale_logs for batch in batches):
            raise LeaseLost("stale")
        for batch in batches:
            known = self.logs.setdefault(batch.ref, [])
            if batch.offset == _size(known):
                known.append(batch)
            self.history.append(f"log {batch.ref.job_id}")
        await self._changed()
        if self.lose_log_replies:
            self.lose_log_replies -= 1
            self.faults += 1
            raise OutcomeUnknown("the fake lost its answer")

    async def close_session(self, session: str) -> None:
        await self._check_up()
        self.closed.append(session)
        await self._changed()

    async def put_blob(self, content: bytes) -> str:
        await self._check_up()
        return self.add_blob(content)

    async def fetch_blob(self, digest: str, directory: Path) -> Path:
        await self._check_up()
        self.fetches.append(digest)
        if digest not in self.blobs:
            raise BlobNotFound(digest)
        return write_file(directory / digest, self.blobs[digest])

    async def aclose(self) -> None:
        return

    # Inside

    async def _check_up(self) -> None:
        if self.down:
            self.faults += 1
            await self._changed()
            raise ServerUnreachable("the fake is down")

    def _check_session(self, session: str) -> None:
        if session != self.session:
            raise SessionExpired(f"session {session} is gone")

    async def _changed(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _answer(self, request: SyncRequest) -> SyncReply:
        key = (request.session, request.number)
        if key in self.answers:
            return self.answers[key]
        self._apply(request)
        reply = self._look(request)
        if _is_empty(reply) and request.wait and not request.finished and not request.started:
            reply = await self._park(request)
        self.answers[key] = reply
        return reply

    async def _park(self, request: SyncRequest) -> SyncReply:
        ring = asyncio.Event()
        self._rings.add(ring)
        reply = SyncReply()
        try:
            async with asyncio.timeout(request.wait):
                while _is_empty(reply) and self._newest == request.number:
                    await ring.wait()
                    ring.clear()
                    await self._check_up()
                    self._check_session(request.session)
                    if self._newest == request.number:
                        reply = self._look(request)
        except TimeoutError:
            return reply
        finally:
            self._rings.discard(ring)
        return reply

    def _apply(self, request: SyncRequest) -> None:
        for started in request.started:
            self.jobs[started.ref.job_id].started_at = started.started_at
        for finished in request.finished:
            self._finish(finished)
            self.history.append(f"finish {finished.ref.job_id}")

    def _finish(self, finished: FinishedAttempt) -> None:
        job = self.jobs[finished.ref.job_id]
        assert job.session is not None
        assert job.attempt == finished.ref.attempt, "a stale report"
        assert job.ended is None, f"{job.id} was reported twice"
        job.ended = finished
        job.session = None

    def _look(self, request: SyncRequest) -> SyncReply:
        cancelled = [_ref(job) for job in self.jobs.values() if job.session and job.cancelled]
        lost, self.lost = self.lost, []
        claimed = [] if self.drain else self._claim(request)
        specs = {index: self.jobs[claim.ref.job_id].spec for index, claim in enumerate(claimed)}
        return SyncReply(claimed=claimed, specs=specs, cancelled=cancelled, lost=lost, drain=self.drain)

    def _claim(self, request: SyncRequest) -> list[ClaimedJob]:
        free = [job for job in self.jobs.values() if job.session is None and job.ended is None]
        fitting = [job for job in free if (job.spec.requirements.cpus or 0) <= request.free_cpus]
        claimed: list[ClaimedJob] = []
        for job in fitting[: request.want]:
            job.session, job.attempt = request.session, job.attempt + 1
            claimed.append(
                ClaimedJob(
                    ref=_ref(job),
                    spec=len(claimed),
                    arguments=msgspec.Raw(job.arguments),
                    arguments_blob=job.arguments_blob,
                    inputs=job.inputs,
                )
            )
        return claimed


def _ref(job: FakeJob) -> AttemptRef:
    return AttemptRef("default", job.id, job.attempt)


def _is_empty(reply: SyncReply) -> bool:
    return not (reply.claimed or reply.cancelled or reply.lost or reply.drain)


def _size(batches: list[LogBatch]) -> int:
    return sum(len(record.data) for batch in batches for record in batch.records)


class BulkFakeBackend(FakeBackend):
    """Follows the contract of ``BulkBackend``, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, execution: Execution, observer: EndObserver) -> None:
        if self.held:
            task = asyncio.create_task(self._run(execution, observer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self.executed.append(execution)
            observer.ended(self.script(execution, observer))

    async def _run(self, execution: Execution, observer: EndObserver) -> None:
        observer.ended(await self.execute(execution, observer))


class Rig:
    """A worker with its fakes. ``run`` is its task."""

    def __init__(self, gateway: FakeGateway, backend: FakeBackend, worker: Worker, run: asyncio.Task[None]) -> None:
        self.gateway = gateway
        self.backend = backend
        self.worker = worker
        self.run = run

    async def finish(self) -> None:
        async with asyncio.timeout(DEADLINE):
            await self.run


def make_worker(
    tmp_path: Path,
    gateway: FakeGateway,
    backend: FakeBackend,
    *,
    clock: Clock | None = None,
    prefetch: int = 200,
    cpus: float = 2.0,
    grace: float = 30.0,
) -> Worker:
    offer = WorkerOffer(capabilities={}, slots=backend.slots, cpus=cpus, memory_mb=1024)
    options = WorkerOptions(name="test", offer=offer, prefetch=prefetch, grace_seconds=grace)
    home = WorkerHome.create(tmp_path / "scratch", None)
    table = {(WorkerType.PROCESS, Isolation.MINIMAL): backend, (WorkerType.PROCESS, Isolation.STANDARD): backend}
    return Worker(gateway, table, options, clock or SystemClock(), home)


@asynccontextmanager
async def running(tmp_path: Path, gateway: FakeGateway, backend: FakeBackend, **settings: object) -> AsyncIterator[Rig]:
    worker = make_worker(tmp_path, gateway, backend, **settings)  # type: ignore[arg-type]  # passed on as they are
    task = asyncio.create_task(worker.run())
    try:
        async with asyncio.timeout(DEADLINE):
            await worker.ready.wait()
        yield Rig(gateway, backend, worker, task)
    finally:
        gateway.down = False
        worker.kill()
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(task, return_exceptions=True)

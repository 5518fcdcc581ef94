"""A client without server, store or worker: it keeps what it is told and runs jobs as a test says."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Self

import msgspec

from blixard.client.contract import AsyncClient
from blixard.domain.batch import batch_id, batch_job_id
from blixard.domain.event import EventType
from blixard.domain.ids import new_job_id
from blixard.domain.job import NewJob
from blixard.domain.outcome import AttemptError, OutcomeKind
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.errors import BlixardError, InvalidTransition, JobNotFound, TokenNotFound
from blixard.protocol.jobs import (
    BatchResults,
    BatchView,
    CancelReply,
    EventView,
    JobDetail,
    JobFilter,
    JobPage,
    JobResult,
    JobView,
    LogEntry,
    LogPageView,
    OpenBatchRequest,
    Reason,
    StatsView,
    SubmitReply,
    SubmitRequest,
    WaitReply,
    WhyView,
)
from blixard.protocol.workers import CreateTokenReply, CreateTokenRequest, Health, TokenView, WorkerView

EPOCH = dt.datetime(2026, 11, 23, 12, 0, tzinfo=dt.UTC)


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a job of a test ends and what it writes before."""

    outcome: OutcomeKind = OutcomeKind.COMPLETED
    exit_code: int | None = 0
    result: object = None
    error: AttemptError | None = None
    output: tuple[tuple[str, bytes], ...] = ()


STATES = {
    OutcomeKind.COMPLETED: JobState.COMPLETED,
    OutcomeKind.FAILED: JobState.FAILED,
    OutcomeKind.TIMED_OUT: JobState.FAILED,
    OutcomeKind.LOST: JobState.FAILED,
    OutcomeKind.CANCELLED: JobState.CANCELLED,
}
Runner = Callable[[JobSpec, NewJob], Ending | None]
"""How a job ends; None: it runs until it is cancelled."""


class FakeJob(msgspec.Struct, kw_only=True):
    spec: JobSpec
    new: NewJob
    state: JobState = JobState.PENDING
    ending: Ending | None = None
    batch: str | None = None
    index: int | None = None
    position: int = 0
    attempt: int = 0


class FakeStore:
    """What stays when a client is gone: several clients of a test may share one."""

    def __init__(self) -> None:
        self.jobs: dict[str, FakeJob] = {}
        self.blobs: dict[str, bytes] = {}
        self.batches: dict[str, OpenBatchRequest] = {}
        self.tokens: dict[str, TokenView] = {}
        self.workers: list[WorkerView] = []
        self.ended = 0


class FakeClient(AsyncClient):
    """Runs at most ``most`` jobs, then leaves the others pending for ever, as a stopped worker would."""

    def __init__(self, store: FakeStore, runner: Runner | None = None, *, most: int | None = None) -> None:
        self.store = store
        self.runner: Runner = runner or (lambda spec, job: Ending())
        self.left = most
        self.requests: list[SubmitRequest] = []
        self.uploads: list[str] = []
        self.filters: list[tuple[JobFilter, int, str | None]] = []
        self.open_error: BlixardError | None = None
        self.waiting = asyncio.Event()
        """Set when somebody waits for a job that does not end by itself."""

    async def __aenter__(self) -> Self:
        if self.open_error is not None:
            raise self.open_error
        return self

    async def __aexit__(self, *exc: object) -> None: ...

    async def submit(self, spec: JobSpec, job: NewJob | None = None) -> str:
        reply = await self.submit_many(SubmitRequest(spec=spec, jobs=[job or NewJob()]))
        return reply.ids[0]

    async def submit_many(self, request: SubmitRequest) -> SubmitReply:
        self.requests.append(request)
        ids = []
        for number, job in enumerate(request.jobs):
            index = None if request.first_index is None else request.first_index + number
            job_id = job.id or (
                batch_job_id(request.batch, index) if request.batch and index is not None else new_job_id()
            )
            ids.append(job_id)
            self.store.jobs.setdefault(job_id, FakeJob(spec=request.spec, new=job, batch=request.batch, index=index))
        return SubmitReply(ids=ids, created=len(ids))

    async def open_batch(self, request: OpenBatchRequest) -> BatchView:
        generation = 0
        while batch_id(request.identity, generation + 1) in self.store.batches:
            generation += 1
        known = batch_id(request.identity, generation)
        if known in self.store.batches and not request.fresh:
            for job in self._jobs_of(known):
                if job.state in {JobState.FAILED, JobState.CANCELLED}:
                    job.state, job.ending = JobState.PENDING, None
            return await self.batch(known)
        others = [k for k, b in self.store.batches.items() if b.name == request.name and b.identity != request.identity]
        name = batch_id(request.identity, generation + (known in self.store.batches))
        self.store.batches[name] = request
        view = await self.batch(name)
        return msgspec.structs.replace(view, created=True, replaces=others[-1] if others else None)

    def _jobs_of(self, batch: str) -> list[FakeJob]:
        return [job for job in self.store.jobs.values() if job.batch == batch]

    async def batch(self, batch_id: str) -> BatchView:
        request = self.store.batches[batch_id]
        jobs = self._jobs_of(batch_id)
        counts: dict[JobState, int] = {}
        for job in jobs:
            counts[job.state] = counts.get(job.state, 0) + 1
        return BatchView(
            id=batch_id, name=request.name, identity=request.identity, generation=int(batch_id.rpartition("_")[2]),
            total=request.total, submitted=len(jobs), counts=counts, created_at=EPOCH,
        )  # fmt: skip

    async def batch_results(
        self, batch_id: str, *, after: int = 0, limit: int = 1000, wait: float = 0.0
    ) -> BatchResults:
        self._work()
        # Long polls give way to others, as a network does.
        await asyncio.sleep(0)
        ended = sorted(
            (job.position, job_id) for job_id, job in self.store.jobs.items()
            if job.batch == batch_id and job.state.is_terminal and job.position > after
        )[:limit]  # fmt: skip
        total = self.store.batches[batch_id].total
        all_ended = sum(job.state.is_terminal for job in self._jobs_of(batch_id)) == total
        if not ended and not all_ended and self.left == 0 and len(self._jobs_of(batch_id)) == total:
            self.waiting.set()
            await asyncio.sleep(wait)  # sleep: what a real client does while there is nothing to say
        position = ended[-1][0] if ended else after
        last = max((job.position for job in self._jobs_of(batch_id)), default=0)
        return BatchResults(
            results=[self._result(job_id) for _, job_id in ended],
            position=position,
            done=all_ended and position >= last,
        )

    def _work(self) -> None:
        for job_id, job in list(self.store.jobs.items()):
            if not job.state.is_terminal and self.left != 0:
                self._end(job_id, self.runner(job.spec, job.new))
                self.left = None if self.left is None else self.left - 1

    def _end(self, job_id: str, ending: Ending | None) -> None:
        job = self.store.jobs[job_id]
        job.attempt += 1
        if ending is None:
            job.state = JobState.IN_PROGRESS
            return
        self.store.ended += 1
        job.ending, job.state, job.position = ending, STATES[ending.outcome], self.store.ended

    async def cancel_batch(self, batch_id: str) -> int:
        open_jobs = [k for k, job in self.store.jobs.items() if job.batch == batch_id and not job.state.is_terminal]
        for job_id in open_jobs:
            await self.cancel(job_id)
        return len(open_jobs)

    def _find(self, job_id: str) -> FakeJob:
        if job_id not in self.store.jobs:
            raise JobNotFound(job_id)
        return self.store.jobs[job_id]

    def _view(self, job_id: str) -> dict[str, object]:
        job = self._find(job_id)
        ending = job.ending or Ending(exit_code=None)
        return {
            "id": job_id, "namespace": "default", "name": job.spec.name, "state": job.state, "queue": job.spec.queue,
            "runtime": job.spec.runtime, "isolation": job.spec.requirements.isolation, "priority": job.new.priority,
            "tags": job.spec.tags, "attempt": job.attempt, "failures": 0, "lost": 0, "created_at": EPOCH,
            "updated_at": EPOCH, "run_at": EPOCH, "started_at": None, "finished_at": None, "duration": None,
            "worker": None, "batch": job.batch, "batch_index": job.index, "exit_code": ending.exit_code,
            "outcome": job.ending.outcome if job.ending else None, "error": ending.error, "cancel_requested": False,
        }  # fmt: skip

    async def job(self, job_id: str) -> JobDetail:
        job = self._find(job_id)
        self._work()
        result = self._result(job_id)
        return msgspec.convert(
            {**self._view(job_id), "spec": job.spec, "arguments": job.new.arguments, "arguments_blob": None,
             **({} if result.result is None else {"result": result.result}), "result_blob": None, "attempts": []},
            JobDetail, from_attributes=True,
        )  # fmt: skip

    async def jobs(self, where: JobFilter | None = None, *, limit: int = 100, cursor: str | None = None) -> JobPage:
        self.filters.append((where or JobFilter(), limit, cursor))
        ids = list(reversed(self.store.jobs))
        start = int(cursor) if cursor is not None and cursor.isdecimal() else 0
        found = [
            msgspec.convert(self._view(job_id), JobView, from_attributes=True) for job_id in ids[start : start + limit]
        ]
        return JobPage(jobs=found, cursor=str(start + limit) if start + limit < len(ids) else None)

    async def wait(self, ids: Sequence[str], *, wait: float) -> WaitReply:
        raise AssertionError("the command line never asks this")

    def _result(self, job_id: str) -> JobResult:
        job = self._find(job_id)
        ending = job.ending
        if ending is None:
            return JobResult(id=job_id, state=job.state, outcome=None, exit_code=None, index=job.index)
        return JobResult(
            id=job_id, state=job.state, outcome=ending.outcome, exit_code=ending.exit_code, index=job.index,
            result=msgspec.Raw(msgspec.json.encode(ending.result)), error=ending.error, attempt=job.attempt,
        )  # fmt: skip

    async def result(self, job_id: str, *, timeout: float | None = None) -> JobResult:  # noqa: ASYNC109  the contract's word
        self._work()
        while not self._find(job_id).state.is_terminal:
            self.waiting.set()
            await asyncio.sleep(0.01)  # sleep: the caller asks again and again
        return self._result(job_id)

    async def cancel(self, job_id: str) -> CancelReply:
        job = self._find(job_id)
        if job.state.is_terminal:
            raise InvalidTransition(job_id, job.state, "cancelled")
        self._end(job_id, Ending(outcome=OutcomeKind.CANCELLED, exit_code=None))
        return CancelReply(id=job_id, state=job.state)

    async def retry(self, job_id: str) -> JobView:
        job = self._find(job_id)
        if job.state not in {JobState.FAILED, JobState.CANCELLED}:
            raise InvalidTransition(job_id, job.state, "pending")
        job.state, job.ending = JobState.PENDING, None
        return msgspec.convert(self._view(job_id), JobView, from_attributes=True)

    async def why(self, job_id: str) -> WhyView:
        job = self._find(job_id)
        reason = Reason(code="no_worker", text="no worker is online", unblock="start `blixard worker`")
        return WhyView(id=job_id, state=job.state, summary="it waits for a worker", reasons=[reason])

    async def events(self, job_id: str) -> list[EventView]:
        self._find(job_id)
        return [EventView(seq=1, job_id=job_id, type=EventType.SUBMITTED, attempt=0, at=EPOCH)]

    async def logs(self, job_id: str, *, attempt: int | None = None, offset: int = 0, wait: float = 0.0) -> LogPageView:
        job = self._find(job_id)
        if job.ending is None:
            await asyncio.sleep(0.01)  # sleep: the caller asks again and again
            return LogPageView(attempt=job.attempt, entries=[], offset=offset, ended=False)
        entries = [LogEntry(at=EPOCH, stream=stream, data=data) for stream, data in job.ending.output]
        # One entry a page: whoever reads must follow the offsets.
        return LogPageView(
            attempt=job.attempt, entries=entries[offset : offset + 1], offset=min(offset + 1, len(entries)),
            ended=offset + 1 >= len(entries),
        )  # fmt: skip

    async def put_blob(self, content: bytes | Path) -> str:
        data = content if isinstance(content, bytes) else content.read_bytes()  # noqa: ASYNC240  a test's small file
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self.store.blobs:
            self.uploads.append(digest)
        self.store.blobs[digest] = data
        return digest

    async def get_blob(self, digest: str) -> bytes:
        return self.store.blobs[digest]

    async def stream_blob(self, digest: str) -> AsyncIterator[bytes]:
        yield self.store.blobs[digest]

    async def stats(self) -> StatsView:
        counts: dict[JobState, int] = {}
        for job in self.store.jobs.values():
            counts[job.state] = counts.get(job.state, 0) + 1
        return StatsView(jobs=counts, queues={"default": counts}, workers={"online": len(self.store.workers)})

    async def workers(self) -> list[WorkerView]:
        return self.store.workers

    async def drain_worker(self, session: str) -> WorkerView:
        raise AssertionError("the command line never asks this")

    async def health(self) -> Health:
        return Health(status="ok", version="0")

    async def create_token(self, request: CreateTokenRequest) -> CreateTokenReply:
        view = TokenView(
            id=f"token_{len(self.store.tokens)}", name=request.name, namespace="default", scopes=request.scopes,
            created_at=EPOCH, revoked_at=None,
            expires_at=None if request.expires_in is None else EPOCH + dt.timedelta(seconds=request.expires_in),
        )  # fmt: skip
        self.store.tokens[view.id] = view
        return CreateTokenReply(token=view, secret="blx_secret")

    async def tokens(self) -> list[TokenView]:
        return list(self.store.tokens.values())

    async def revoke_token(self, token_id: str) -> TokenView:
        if token_id not in self.store.tokens:
            raise TokenNotFound(token_id)
        revoked = msgspec.structs.replace(self.store.tokens[token_id], revoked_at=EPOCH)
        self.store.tokens[token_id] = revoked
        return revoked

    async def prune(self) -> dict[str, int]:
        return {"jobs": 3, "blobs": 0}

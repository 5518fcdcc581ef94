"""From the domain's values to what travels over HTTP."""

from __future__ import annotations

import datetime as dt
from typing import TypedDict

import msgspec

from blixard.domain.batch import Batch
from blixard.domain.job import Attempt, Job
from blixard.domain.outcome import AttemptError, OutcomeKind
from blixard.domain.payload import Runtime
from blixard.domain.requirements import Isolation
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.domain.worker import WorkerSession
from blixard.protocol.jobs import AttemptView, BatchView, EventView, JobDetail, JobView
from blixard.protocol.workers import TokenView, WorkerView
from blixard.storage.repositories.jobs import StoredEvent
from blixard.storage.repositories.tokens import StoredToken

MASK = "********"


def time_of(microseconds: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(microseconds / 1e6, tz=dt.UTC)


def maybe_time_of(microseconds: int | None) -> dt.datetime | None:
    return None if microseconds is None else time_of(microseconds)


class _Common(TypedDict):
    id: str
    namespace: str
    name: str
    state: JobState
    queue: str
    runtime: Runtime
    isolation: Isolation
    priority: int
    tags: tuple[str, ...]
    attempt: int
    failures: int
    lost: int
    created_at: dt.datetime
    updated_at: dt.datetime
    run_at: dt.datetime
    started_at: dt.datetime | None
    finished_at: dt.datetime | None
    duration: float | None
    worker: str | None
    batch: str | None
    batch_index: int | None
    exit_code: int | None
    outcome: OutcomeKind | None
    error: AttemptError | None
    cancel_requested: bool


def _common(job: Job) -> _Common:
    metadata, spec = job.metadata, job.spec
    return {
        "id": job.id,
        "namespace": job.namespace,
        "name": spec.name,
        "state": job.state,
        "queue": spec.queue,
        "runtime": spec.runtime,
        "isolation": spec.requirements.isolation,
        "priority": job.priority,
        "tags": spec.tags,
        "attempt": metadata.attempt,
        "failures": metadata.failures,
        "lost": metadata.lost,
        "created_at": time_of(metadata.created_at),
        "updated_at": time_of(metadata.updated_at),
        "run_at": time_of(metadata.run_at),
        "started_at": maybe_time_of(metadata.started_at),
        "finished_at": maybe_time_of(metadata.finished_at),
        "duration": metadata.duration,
        "worker": job.assignment.worker if job.assignment else None,
        "batch": job.batch,
        "batch_index": job.batch_index,
        "exit_code": job.exit_code,
        "outcome": job.outcome,
        "error": job.error,
        "cancel_requested": metadata.cancel_requested_at is not None,
    }


def job_view(job: Job) -> JobView:
    return JobView(**_common(job))


def masked(spec: JobSpec) -> JobSpec:
    """Return the spec with the values of its environment hidden: they may be secrets."""
    return msgspec.structs.replace(spec, environment=dict.fromkeys(spec.environment, MASK))


def job_detail(job: Job, attempts: list[Attempt]) -> JobDetail:
    views = [attempt_view(attempt) for attempt in attempts]
    if job.state.is_leased and job.assignment is not None:
        views.append(_running_attempt(job))
    return JobDetail(
        **_common(job),
        spec=masked(job.spec),
        arguments=job.arguments,
        arguments_blob=job.arguments_blob,
        result=job.result,
        result_blob=job.result_blob,
        attempts=views,
    )


def _running_attempt(job: Job) -> AttemptView:
    assert job.assignment is not None  # leased jobs have one (CHECK constraint)
    return AttemptView(
        attempt=job.metadata.attempt,
        worker=job.assignment.worker,
        session=job.assignment.session,
        claimed_at=time_of(job.assignment.claimed_at),
        started_at=maybe_time_of(job.metadata.started_at),
        finished_at=None,
        outcome=None,
    )


def attempt_view(attempt: Attempt) -> AttemptView:
    return AttemptView(
        attempt=attempt.attempt,
        worker=attempt.worker,
        session=attempt.session,
        claimed_at=time_of(attempt.claimed_at),
        started_at=maybe_time_of(attempt.started_at),
        finished_at=time_of(attempt.finished_at),
        outcome=attempt.outcome,
        exit_code=attempt.exit_code,
        error=attempt.error,
    )


def event_view(event: StoredEvent) -> EventView:
    return EventView(
        seq=event.seq,
        job_id=event.job_id,
        type=event.type,
        attempt=event.attempt,
        at=time_of(event.at),
        batch=event.batch,
        worker=event.worker,
    )


def batch_view(
    batch: Batch, counts: dict[JobState, int], submitted: int, *, created: bool = False, replaces: str | None = None
) -> BatchView:
    return BatchView(
        id=batch.id,
        name=batch.name,
        identity=batch.identity,
        generation=batch.generation,
        total=batch.total,
        submitted=submitted,
        counts=counts,
        created_at=time_of(batch.created_at),
        created=created,
        replaces=replaces,
    )


def worker_view(session: WorkerSession) -> WorkerView:
    return WorkerView(
        session=session.id,
        name=session.name,
        state=session.state,
        offer=session.offer,
        host=session.host,
        pid=session.pid,
        interpreter=session.interpreter,
        registered_at=time_of(session.registered_at),
        seen_at=time_of(session.seen_at),
        leased=session.leased,
    )


def token_view(token: StoredToken) -> TokenView:
    return TokenView(
        id=token.id,
        name=token.name,
        namespace=token.namespace,
        scopes=token.scopes,
        created_at=time_of(token.created_at),
        expires_at=maybe_time_of(token.expires_at),
        revoked_at=maybe_time_of(token.revoked_at),
        last_used_at=maybe_time_of(token.last_used_at),
    )

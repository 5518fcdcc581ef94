"""Jobs: submit, find, list, cancel, retry. Every call is one statement whatever the number of jobs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from blixard.domain.batch import batch_job_id
from blixard.domain.event import EventType
from blixard.domain.job import Attempt, Job, NewJob
from blixard.domain.state_machine import JobState
from blixard.protocol.jobs import JobResult
from blixard.storage.database import Database, Params, Row
from blixard.storage.repositories.placement import StoredSpec
from blixard.storage.repositories.rows import (
    SpecDecoder,
    attempt_of,
    encode,
    error_of,
    job_of,
    maybe_number,
    maybe_text,
    number,
    outcome_of,
    raw,
    text,
    texts,
)
from blixard.storage.statements import Statements

MAX_EVENTS = 1_000
"""Newest events of one job that are listed."""
FAR_FUTURE = 1 << 62


class ListingBounds(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a listing, newest first: jobs behind the cursor, created in [since, until) (microseconds).

    ``cursor`` is the place of a job among those created at ``cursor_at``: its number, or in a listing of a batch its index.
    """

    limit: int
    cursor_at: int = FAR_FUTURE
    cursor: int = FAR_FUTURE
    since: int = 0
    until: int = FAR_FUTURE

    def params(self, namespace: str) -> dict[str, str | int]:
        return {"namespace": namespace, "limit": self.limit, "since": self.since, "until": self.until}

    def params_by_time(self, namespace: str) -> dict[str, str | int]:
        return {**self.params(namespace), "cursor_at": self.cursor_at, "cursor": self.cursor}


class Listed(msgspec.Struct, frozen=True):
    """A job in a listing and where to go on behind it."""

    id: str
    created_at: int
    place: int


class Identity(msgspec.Struct, frozen=True):
    """What tells a repeated submission from a different job with the same id."""

    spec_digest: str
    arguments: str
    arguments_blob: str | None
    inputs: str | None


class Changed(msgspec.Struct, frozen=True):
    """A job that a statement changed."""

    job_id: str
    state: JobState
    session: str | None
    batch: str | None


class StoredEvent(msgspec.Struct, frozen=True):
    seq: int
    job_id: str
    type: EventType
    attempt: int
    at: int
    batch: str | None
    worker: str | None


def encode_inputs(job: NewJob) -> str | None:
    return encode(job.inputs) if job.inputs else None


def _text_of(arguments: msgspec.Raw) -> str:
    return bytes(arguments).decode()


def _is_plain(job: NewJob) -> bool:
    return job.priority == 0 and job.run_at is None and job.arguments_blob is None and not job.inputs


def _row_of(job_id: str, job: NewJob, now: int) -> tuple[object, ...]:
    run_at = now if job.run_at is None else job.run_at
    return job_id, job.priority, run_at, _text_of(job.arguments), job.arguments_blob, encode_inputs(job)


def _listed(rows: list[Row]) -> list[Listed]:
    return [Listed(text(row[0]), number(row[1]), number(row[2])) for row in rows]


def result_of(row: Row) -> JobResult:
    """Return the result of a row of ``find_results``."""
    return JobResult(
        id=text(row[0]),
        state=JobState(text(row[1])),
        outcome=outcome_of(row[2]),
        exit_code=maybe_number(row[3]),
        result=raw(row[4]),
        result_blob=maybe_text(row[5]),
        error=error_of(row[6]),
        attempt=number(row[7]),
        index=maybe_number(row[8]),
    )


class JobRepository:
    def __init__(self, database: Database, statements: Statements) -> None:
        self._database = database
        self._sql = statements
        self._specs = SpecDecoder()

    async def add(
        self,
        namespace: str,
        spec: StoredSpec,
        jobs: Sequence[tuple[str, NewJob]],
        *,
        max_retries: int,
        max_lost: int,
        now: int,
        batch: str | None = None,
    ) -> list[str]:
        """Store jobs under the given ids and return those that are new. In a batch an id ends with the job's index."""
        are_plain = all(_is_plain(job) for _, job in jobs)
        params: Params = {
            "namespace": namespace,
            "spec_id": spec.id,
            "class_id": spec.class_id,
            "now": now,
            "max_retries": max_retries,
            "max_lost": max_lost,
            "batch": batch,
            "plain": encode({job_id: _text_of(job.arguments) for job_id, job in jobs}) if are_plain else "{}",
            "special": "[]" if are_plain else encode([_row_of(job_id, job, now) for job_id, job in jobs]),
        }
        return texts(await self._database.write(self._sql["add_jobs"], params))

    async def identities(self, namespace: str, ids: Sequence[str]) -> dict[str, Identity]:
        rows = await self._database.read(self._sql["find_identities"], {"namespace": namespace, "ids": encode(ids)})
        return {text(r[0]): Identity(text(r[1]), text(r[2]), maybe_text(r[3]), maybe_text(r[4])) for r in rows}

    async def find_by_id(self, namespace: str, job_id: str) -> Job | None:
        """Return one job by its primary key."""
        rows = await self._database.read(self._sql["find_job"], {"namespace": namespace, "id": job_id})
        return job_of(rows[0], self._specs) if rows else None

    async def find_many(self, namespace: str, ids: Sequence[str]) -> list[Job]:
        """Return the jobs that exist, in the order of ``ids``."""
        rows = await self._database.read(self._sql["find_jobs"], {"namespace": namespace, "ids": encode(ids)})
        return [job_of(row, self._specs) for row in rows]

    async def results(self, namespace: str, ids: Sequence[str]) -> list[JobResult]:
        """Return state and end of the jobs that exist, in no order."""
        rows = await self._database.read(self._sql["find_results"], {"namespace": namespace, "ids": encode(ids)})
        return [result_of(row) for row in rows]

    async def class_of(self, namespace: str, job_id: str) -> tuple[int, bool] | None:
        """Return the placement class of a job and whether it is due."""
        rows = await self._database.read(self._sql["find_class_of_job"], {"namespace": namespace, "id": job_id})
        return (number(rows[0][0]), bool(rows[0][1])) if rows else None

    async def jobs_ahead(self, job: Job, limit: int) -> int:
        """Count the due jobs of its class that come before this one, up to ``limit``."""
        params: Params = {"namespace": job.namespace, "id": job.id, "limit": limit}
        return number((await self._database.read(self._sql["position_in_class"], params))[0][0])

    async def list_ids_by_state(
        self, namespace: str, states: Iterable[JobState], bounds: ListingBounds
    ) -> list[Listed]:
        params: Params = {**bounds.params_by_time(namespace), "states": encode(list(states))}
        return _listed(await self._database.read(self._sql["list_ids_by_state"], params))

    async def list_ids_by_spec(
        self, namespace: str, specs: Sequence[int], states: Sequence[JobState], bounds: ListingBounds
    ) -> list[Listed]:
        params: Params = {
            **bounds.params_by_time(namespace),
            "specs": encode(specs),
            "states": encode(states),
            "any_state": not states,
        }
        return _listed(await self._database.read(self._sql["list_ids_by_spec"], params))

    async def list_ids_of_batch(
        self, namespace: str, batch: str, states: Sequence[JobState], bounds: ListingBounds
    ) -> list[Listed]:
        params: Params = {
            **bounds.params(namespace),
            "batch": batch,
            "before": f"{batch}/" if bounds.cursor == FAR_FUTURE else batch_job_id(batch, bounds.cursor),
            "states": encode(states),
            "any_state": not states,
        }
        return _listed(await self._database.read(self._sql["list_ids_of_batch"], params))

    async def find_spec_ids(self, namespace: str, *, name: str | None, queue: str | None, tag: str | None) -> list[int]:
        params: Params = {"namespace": namespace, "name": name, "queue": queue, "tag": tag}
        return [number(row[0]) for row in await self._database.read(self._sql["find_spec_ids"], params)]

    async def attempts(self, namespace: str, job_id: str) -> list[Attempt]:
        """Return the ended attempts of a job, oldest first."""
        rows = await self._database.read(self._sql["list_attempts"], {"namespace": namespace, "id": job_id})
        return [attempt_of(job_id, row) for row in rows]

    async def events(self, namespace: str, job_id: str) -> list[StoredEvent]:
        """Return the newest 1,000 events of a job, in order."""
        params: Params = {"namespace": namespace, "id": job_id, "limit": MAX_EVENTS}
        rows = await self._database.read(self._sql["list_events"], params)
        return [
            StoredEvent(
                number(r[0]),
                text(r[1]),
                EventType(text(r[2])),
                number(r[3]),
                number(r[4]),
                maybe_text(r[5]),
                maybe_text(r[6]),
            )
            for r in rows
        ]

    async def count(self, namespace: str) -> dict[str, dict[JobState, int]]:
        """Return the number of jobs by queue and state, from counters that triggers keep."""
        counts: dict[str, dict[JobState, int]] = {}
        for row in await self._database.read(self._sql["count_jobs"], {"namespace": namespace}):
            counts.setdefault(text(row[0]), {})[JobState(text(row[1]))] = number(row[2])
        return counts

    async def cancel(self, namespace: str, ids: Sequence[str], now: int) -> list[Changed]:
        """Cancel what has no lease and mark what has one; return both. Ended jobs are not returned."""
        params: Params = {"namespace": namespace, "ids": encode(ids), "now": now}
        rows = await self._database.write(self._sql["cancel_jobs"], params)
        return [Changed(text(r[0]), JobState(text(r[1])), maybe_text(r[2]), maybe_text(r[3])) for r in rows]

    async def retry(self, namespace: str, ids: Sequence[str], now: int) -> dict[str, int]:
        """Reopen failed and cancelled jobs; return the placement class of each that was reopened."""
        params: Params = {"namespace": namespace, "ids": encode(ids), "now": now}
        rows = await self._database.write(self._sql["retry_jobs"], params)
        return {text(row[0]): number(row[1]) for row in rows}

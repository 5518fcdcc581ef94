"""What asks about jobs. By primary key or an index of its own; nothing reads many rows to keep a few."""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from blixard.domain.ids import check_id
from blixard.domain.job import Job
from blixard.domain.limits import MAX_LIST_JOBS, MAX_WAIT_SECONDS
from blixard.domain.state_machine import JobState
from blixard.errors import BatchNotFound, InvalidRequest, JobNotFound, LimitExceeded
from blixard.protocol.jobs import (
    BatchResults,
    BatchView,
    EventView,
    JobDetail,
    JobFilter,
    JobPage,
    StatsView,
    WaitReply,
    WhyView,
)
from blixard.services.clock import Clock
from blixard.services.job_commands import contiguous
from blixard.services.signals import Signals
from blixard.services.views import batch_view, event_view, job_detail, job_view
from blixard.services.why import WhyService
from blixard.storage.repositories.batches import BatchRepository
from blixard.storage.repositories.jobs import FAR_FUTURE, JobRepository, Listed, ListingBounds
from blixard.storage.repositories.sessions import SessionRepository

MAX_WAIT_IDS = 1_000
MAX_CURSOR_DIGITS = 18
T = TypeVar("T")


class JobQueryService:
    def __init__(
        self,
        jobs: JobRepository,
        batches: BatchRepository,
        sessions: SessionRepository,
        why: WhyService,
        signals: Signals,
        clock: Clock,
    ) -> None:
        self._jobs = jobs
        self._batches = batches
        self._sessions = sessions
        self._why = why
        self._signals = signals
        self._clock = clock

    async def find_by_id(self, namespace: str, job_id: str) -> Job:
        """Return one job by its primary key. Raises ``JobNotFound``."""
        job = await self._jobs.find_by_id(namespace, check_id(job_id))
        if job is None:
            raise JobNotFound(job_id)
        return job

    async def job(self, namespace: str, job_id: str) -> JobDetail:
        """Return everything about one job. Raises ``JobNotFound``."""
        job = await self.find_by_id(namespace, job_id)
        return job_detail(job, await self._jobs.attempts(namespace, job_id))

    async def jobs(self, namespace: str, where: JobFilter, *, limit: int = 100, cursor: str | None = None) -> JobPage:
        """Return up to ``limit`` (1 to 1,000) jobs, newest first."""
        if not 1 <= limit <= MAX_LIST_JOBS:
            raise LimitExceeded(f"limit is {limit}; 1 to {MAX_LIST_JOBS} is allowed", field="limit")
        bounds = _bounds(where, limit, cursor)
        listed = await self._list(namespace, where, bounds)
        found = await self._jobs.find_many(namespace, [job.id for job in listed]) if listed else []
        cursor_behind = _cursor(listed[-1]) if len(listed) == limit else None
        return JobPage(jobs=[job_view(job) for job in found], cursor=cursor_behind)

    async def _list(self, namespace: str, where: JobFilter, bounds: ListingBounds) -> list[Listed]:
        by_spec = where.name is not None or where.tag is not None or where.queue is not None
        if where.batch is not None:
            if by_spec:
                raise InvalidRequest(
                    "batch goes with state and time only: its jobs share name, queue and tags", field="batch"
                )
            return await self._jobs.list_ids_of_batch(namespace, where.batch, where.states, bounds)
        if by_spec:
            specs = await self._jobs.find_spec_ids(namespace, name=where.name, queue=where.queue, tag=where.tag)
            return await self._jobs.list_ids_by_spec(namespace, specs, where.states, bounds)
        return await self._jobs.list_ids_by_state(namespace, where.states or JobState, bounds)

    async def wait(self, namespace: str, ids: Sequence[str], *, wait: float) -> WaitReply:
        """Return as soon as one of the jobs has ended, or one does not exist, at the latest after ``wait`` seconds (0 to 60)."""
        if not 1 <= len(ids) <= MAX_WAIT_IDS:
            raise LimitExceeded(f"{len(ids)} ids; 1 to {MAX_WAIT_IDS} can be waited for at once", field="ids")

        async def look() -> WaitReply | None:
            found = await self._jobs.results(namespace, ids)
            ended = [result for result in found if result.state.is_terminal]
            unknown = sorted(set(ids) - {result.id for result in found}) if len(found) < len(set(ids)) else []
            return WaitReply(ended=ended, unknown=unknown) if ended or unknown else None

        return await self._until(look, wait) or WaitReply(ended=[])

    async def batch(self, namespace: str, batch_id: str) -> BatchView:
        """Return one batch with its counts. Raises ``BatchNotFound``."""
        batch = await self._batches.find(namespace, batch_id)
        if batch is None:
            raise BatchNotFound(batch_id)
        counts = await self._batches.count(namespace, batch_id)
        return batch_view(batch, counts, await contiguous(self._batches, batch, sum(counts.values())))

    async def batch_results(
        self, namespace: str, batch_id: str, *, after: int = 0, limit: int = 1000, wait: float = 0.0
    ) -> BatchResults:
        """Return results behind position ``after``, waiting up to ``wait`` seconds if there are none and more will come."""
        if not 1 <= limit <= MAX_LIST_JOBS:
            raise LimitExceeded(f"limit is {limit}; 1 to {MAX_LIST_JOBS} is allowed", field="limit")
        batch = await self._batches.find(namespace, batch_id)
        if batch is None:
            raise BatchNotFound(batch_id)

        async def look() -> BatchResults | None:
            # counted before listing: what the count has seen ended is listed below, whatever ends in between
            counts = await self._batches.count(namespace, batch_id)
            results, position = await self._batches.results(namespace, batch_id, after=after, limit=limit)
            done = sum(n for state, n in counts.items() if state.is_terminal) >= batch.total and len(results) < limit
            return BatchResults(results=results, position=position, done=done) if results or done else None

        return await self._until(look, wait) or BatchResults(results=[], position=after, done=False)

    async def events(self, namespace: str, job_id: str) -> list[EventView]:
        """Return the newest 1,000 events of a job, oldest first. Raises ``JobNotFound``."""
        await self.find_by_id(namespace, job_id)
        return [event_view(event) for event in await self._jobs.events(namespace, job_id)]

    async def why(self, namespace: str, job_id: str) -> WhyView:
        """Say exactly why a job does not run and what would unblock it. Raises ``JobNotFound``."""
        return await self._why.explain(await self.find_by_id(namespace, job_id))

    async def stats(self, namespace: str) -> StatsView:
        """Return jobs by state and queue, and workers by state, without counting rows of jobs."""
        queues = await self._jobs.count(namespace)
        totals: dict[JobState, int] = {}
        for counts in queues.values():
            for state, n in counts.items():
                totals[state] = totals.get(state, 0) + n
        workers: dict[str, int] = {}
        for session in await self._sessions.alive(namespace):
            workers[session.state] = workers.get(session.state, 0) + 1
        return StatsView(jobs=totals, queues=queues, workers=workers)

    async def _until(self, look: Callable[[], Awaitable[T | None]], wait: float) -> T | None:
        """Look again after each change until there is something to see or the time is over."""
        if not 0 <= wait <= MAX_WAIT_SECONDS:
            raise InvalidRequest(f"wait is {wait:g} s; 0 to {MAX_WAIT_SECONDS:g} is allowed", field="wait")
        deadline = self._clock.monotonic() + wait
        while True:
            generation = self._signals.generation
            seen = await look()
            left = deadline - self._clock.monotonic()
            if seen is not None or left <= 0:
                return seen
            await self._signals.changed(generation, left)


def _bounds(where: JobFilter, limit: int, cursor: str | None) -> ListingBounds:
    since = _microseconds(where.since) if where.since else 0
    until = _microseconds(where.until) if where.until else FAR_FUTURE
    if cursor is None:
        return ListingBounds(limit=limit, since=since, until=until)
    at, _, place = cursor.partition(":")
    if not (_is_number(at) and _is_number(place)):
        raise InvalidRequest(f"{cursor!r} is not a cursor", field="cursor", hint="take it from the page before")
    return ListingBounds(limit=limit, cursor_at=int(at), cursor=int(place), since=since, until=until)


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= MAX_CURSOR_DIGITS


def _cursor(last: Listed) -> str:
    return f"{last.created_at}:{last.place}"


def _microseconds(moment: dt.datetime) -> int:
    if moment.tzinfo is None:
        raise InvalidRequest("times need a time zone, such as 2026-01-31T12:00:00Z", field="since")
    return int(moment.timestamp() * 1e6)

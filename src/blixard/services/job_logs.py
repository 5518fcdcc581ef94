"""Output of jobs, as it stands and as it comes."""

from __future__ import annotations

from blixard.domain.job import Job
from blixard.domain.limits import MAX_WAIT_SECONDS
from blixard.errors import InvalidRequest
from blixard.protocol.jobs import LogEntry, LogPageView
from blixard.services.clock import Clock
from blixard.services.job_queries import JobQueryService
from blixard.services.signals import Signals
from blixard.services.views import time_of
from blixard.storage.logs import LogPage, LogStore

LOOK_SECONDS = 0.5
"""How long to wait for output before looking whether the attempt has ended without an end mark."""


class JobLogService:
    def __init__(self, queries: JobQueryService, logs: LogStore, signals: Signals, clock: Clock) -> None:
        self._queries = queries
        self._logs = logs
        self._signals = signals
        self._clock = clock

    async def read(
        self, namespace: str, job_id: str, *, attempt: int | None = None, offset: int = 0, wait: float = 0.0
    ) -> LogPageView:
        """Return output of an attempt (None: the newest) from ``offset`` on, waiting up to ``wait`` seconds for some.

        ``ended``: the attempt is over and all of its output up to here was returned. Raises ``JobNotFound``, ``InvalidRequest``.
        """
        if not 0 <= wait <= MAX_WAIT_SECONDS or offset < 0:
            raise InvalidRequest(f"wait must be 0 to {MAX_WAIT_SECONDS:g} s and offset not negative", field="wait")
        job = await self._queries.find_by_id(namespace, job_id)
        wanted = job.metadata.attempt if attempt is None else attempt
        if not 0 <= wanted <= job.metadata.attempt:
            raise InvalidRequest(
                f"job {job_id!r} has {job.metadata.attempt} attempt(s), no attempt {wanted}", field="attempt"
            )
        deadline = self._clock.monotonic() + wait
        while True:
            # the state first: whatever was written before the attempt ended is seen by the read behind it
            is_over = _is_over(await self._queries.find_by_id(namespace, job_id), wanted)
            page = (
                await self._logs.read(namespace, job_id, wanted, offset)
                if wanted
                else LogPage(entries=(), next_offset=0)
            )
            left = deadline - self._clock.monotonic()
            if page.entries or page.ended or is_over or left <= 0:
                return _view(page, wanted, ended=page.ended or (is_over and not page.entries))
            await self._wait(namespace, job_id, wanted, offset, left)
            if attempt is None and not wanted:
                wanted = (await self._queries.find_by_id(namespace, job_id)).metadata.attempt

    async def _wait(self, namespace: str, job_id: str, attempt: int, offset: int, left: float) -> None:
        if attempt:
            await self._logs.wait(namespace, job_id, attempt, offset, min(left, LOOK_SECONDS))
        else:
            await self._signals.changed(self._signals.generation, min(left, LOOK_SECONDS))


def _is_over(job: Job, attempt: int) -> bool:
    current = attempt == job.metadata.attempt
    return job.state.is_terminal if current and attempt == 0 else not (current and job.state.is_leased)


def _view(page: LogPage, attempt: int, *, ended: bool) -> LogPageView:
    entries = [LogEntry(at=time_of(record.at), stream=record.stream, data=record.data) for record in page.entries]
    return LogPageView(attempt=attempt, entries=entries, offset=page.next_offset, ended=ended, dropped=page.dropped)

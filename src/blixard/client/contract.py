"""What every client can do, with a server or on a local data directory: same calls, same results, same errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol, Self

from blixard.domain.job import NewJob
from blixard.domain.spec import JobSpec
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
    LogPageView,
    OpenBatchRequest,
    StatsView,
    SubmitReply,
    SubmitRequest,
    WaitReply,
    WhyView,
)
from blixard.protocol.workers import CreateTokenReply, CreateTokenRequest, Health, TokenView, WorkerView


class AsyncClient(Protocol):
    """Raises the tree of ``blixard.errors`` and nothing else. Every write may be repeated.

    Use as ``async with``; one client serves many concurrent calls on one event loop.
    """

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...

    async def submit(self, spec: JobSpec, job: NewJob | None = None) -> str:
        """Store one job durably and return its id. Raises ``InvalidRequest``, ``IdTaken``, ``BlobNotFound``."""

    async def submit_many(self, request: SubmitRequest) -> SubmitReply:
        """Store up to 1,000 jobs of one spec, all or none."""

    async def open_batch(self, request: OpenBatchRequest) -> BatchView: ...
    async def batch(self, batch_id: str) -> BatchView: ...
    async def batch_results(
        self, batch_id: str, *, after: int = 0, limit: int = 1000, wait: float = 0.0
    ) -> BatchResults:
        """Return results that came after position ``after``; wait up to ``wait`` seconds if there are none and more will come."""

    async def cancel_batch(self, batch_id: str) -> int:
        """Cancel every job of it that has not ended; return how many."""

    async def job(self, job_id: str) -> JobDetail:
        """Return everything about one job. Raises ``JobNotFound``."""

    async def jobs(self, where: JobFilter | None = None, *, limit: int = 100, cursor: str | None = None) -> JobPage:
        """Return up to ``limit`` (1 to 1,000) jobs, newest first."""

    async def wait(self, ids: Sequence[str], *, wait: float) -> WaitReply:
        """Return as soon as one of the jobs has ended, at the latest after ``wait`` seconds. Waiting makes embedded jobs run."""

    async def result(self, job_id: str, *, timeout: float | None = None) -> JobResult:  # noqa: ASYNC109 - the user's word
        """Wait for the end of one job. Raises ``JobNotFound``, ``WaitTimedOut``; how the job ended stands in the answer."""

    async def cancel(self, job_id: str) -> CancelReply: ...
    async def retry(self, job_id: str) -> JobView:
        """Make a failed or cancelled job pending again, its counters set back. Raises ``InvalidTransition``."""

    async def why(self, job_id: str) -> WhyView: ...
    async def events(self, job_id: str) -> list[EventView]: ...
    async def logs(self, job_id: str, *, attempt: int | None = None, offset: int = 0, wait: float = 0.0) -> LogPageView:
        """Return output from ``offset`` on (attempt None: the newest), waiting up to ``wait`` seconds for more."""

    async def put_blob(self, content: bytes | Path) -> str:
        """Store a blob durably and return its digest; content that the store has is not sent again."""

    async def get_blob(self, digest: str) -> bytes: ...
    def stream_blob(self, digest: str) -> AsyncIterator[bytes]: ...

    async def stats(self) -> StatsView: ...
    async def workers(self) -> list[WorkerView]: ...
    async def drain_worker(self, session: str) -> WorkerView: ...
    async def health(self) -> Health: ...
    async def create_token(self, request: CreateTokenRequest) -> CreateTokenReply: ...
    async def tokens(self) -> list[TokenView]: ...
    async def revoke_token(self, token_id: str) -> TokenView: ...
    async def prune(self) -> dict[str, int]:
        """Remove what the retention times allow, now; return counts by kind."""

"""The client of a server: every call of ``AsyncClient`` over HTTP."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Self

import httpx
import msgspec

from blixard.client.http_link import Content, HttpLink, ServerAddress
from blixard.domain.ids import check_id, new_job_ids
from blixard.domain.job import NewJob
from blixard.domain.limits import KIB, MAX_WAIT_SECONDS
from blixard.domain.spec import JobSpec
from blixard.errors import BlobNotFound, JobNotFound, NotFound, StoreUnavailable, WaitTimedOut
from blixard.protocol import routes
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
    WaitRequest,
    WhyView,
)
from blixard.protocol.workers import CreateTokenReply, CreateTokenRequest, Health, TokenView, WorkerView

READ_BYTES = 256 * KIB
POLL_SECONDS = 30.0
"""One long poll of a longer wait: proxies between us and the server cut connections that are silent for a minute."""


class HttpClient:
    """``AsyncClient`` on a server. Ids are made here, before the first try, so that a repeated write is the same write."""

    def __init__(self, address: ServerAddress, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """``transport`` replaces the one that the address calls for, such as a double in tests."""
        self._link = HttpLink(address, transport)

    async def __aenter__(self) -> Self:
        await self._link.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._link.close()

    async def submit(self, spec: JobSpec, job: NewJob | None = None) -> str:
        reply = await self.submit_many(SubmitRequest(spec=spec, jobs=[job or NewJob()]))
        return reply.ids[0]

    async def submit_many(self, request: SubmitRequest) -> SubmitReply:
        return await self._link.call(routes.SUBMIT, _with_ids(request))

    async def open_batch(self, request: OpenBatchRequest) -> BatchView:
        # A repeated fresh start would be a second fresh start.
        return await self._link.call(routes.OPEN_BATCH, request, repeat=not request.fresh)

    async def batch(self, batch_id: str) -> BatchView:
        return await self._link.call(routes.BATCH, batch_id=check_id(batch_id))

    async def batch_results(
        self, batch_id: str, *, after: int = 0, limit: int = 1000, wait: float = 0.0
    ) -> BatchResults:
        query = routes.ResultsQuery(after=after, limit=limit, wait=min(wait, MAX_WAIT_SECONDS))
        return await self._link.call(routes.BATCH_RESULTS, query=query, wait=query.wait, batch_id=check_id(batch_id))

    async def cancel_batch(self, batch_id: str) -> int:
        reply = await self._link.call(routes.CANCEL_BATCH, batch_id=check_id(batch_id))
        return reply.cancelled

    async def job(self, job_id: str) -> JobDetail:
        return await self._link.call(routes.JOB, job_id=check_id(job_id))

    async def jobs(self, where: JobFilter | None = None, *, limit: int = 100, cursor: str | None = None) -> JobPage:
        where = where or JobFilter()
        query = routes.JobsQuery(
            state=where.states,
            name=where.name,
            tag=where.tag,
            queue=where.queue,
            batch=where.batch,
            since=where.since,
            until=where.until,
            limit=limit,
            cursor=cursor,
        )
        return await self._link.call(routes.JOBS, query=query)

    async def wait(self, ids: Sequence[str], *, wait: float) -> WaitReply:
        deadline = time.monotonic() + wait
        while True:
            seconds = max(0.0, min(deadline - time.monotonic(), POLL_SECONDS)) if wait > 0 else wait
            request = WaitRequest(ids=list(ids), wait=seconds)
            reply = await self._link.call(routes.WAIT, request, wait=max(seconds, 0.0))
            if reply.ended or reply.unknown or time.monotonic() >= deadline:
                return reply

    async def result(self, job_id: str, *, timeout: float | None = None) -> JobResult:  # noqa: ASYNC109 - the user's word
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = POLL_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
            reply = await self.wait([job_id], wait=min(left, POLL_SECONDS))
            if reply.unknown:
                raise JobNotFound(job_id)
            if reply.ended:
                return reply.ended[0]
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimedOut(f"job {job_id!r} has not ended after {timeout:g} s; it goes on")

    async def cancel(self, job_id: str) -> CancelReply:
        return await self._link.call(routes.CANCEL, job_id=check_id(job_id))

    async def retry(self, job_id: str) -> JobView:
        # Repeated after a lost answer it would be refused, the job being pending already.
        return await self._link.call(routes.RETRY, repeat=False, job_id=check_id(job_id))

    async def why(self, job_id: str) -> WhyView:
        return await self._link.call(routes.WHY, job_id=check_id(job_id))

    async def events(self, job_id: str) -> list[EventView]:
        return await self._link.call(routes.EVENTS, job_id=check_id(job_id))

    async def logs(self, job_id: str, *, attempt: int | None = None, offset: int = 0, wait: float = 0.0) -> LogPageView:
        query = routes.LogsQuery(attempt=attempt, offset=offset, wait=min(wait, MAX_WAIT_SECONDS))
        return await self._link.call(routes.LOGS, query=query, wait=query.wait, job_id=check_id(job_id))

    async def put_blob(self, content: bytes | Path) -> str:
        digest = await asyncio.to_thread(_digest_of, content)
        if await self._has_blob(digest):
            return digest
        size = await asyncio.to_thread(_size_of, content)
        body: Content = content if isinstance(content, bytes) else functools.partial(_read, content)
        headers = {"Content-Type": routes.BLOB, "Content-Length": str(size)}
        await self._link.call(routes.PUT_BLOB, content=body, headers=headers, digest=digest)
        return digest

    async def get_blob(self, digest: str) -> bytes:
        return b"".join([chunk async for chunk in self.stream_blob(digest)])

    async def stream_blob(self, digest: str) -> AsyncIterator[bytes]:
        """Yield the content; raises ``StoreUnavailable`` behind the last piece if it is not what its name says."""
        found = hashlib.sha256()
        async with self._link.stream(routes.GET_BLOB, digest=digest) as chunks:
            async for chunk in chunks:
                found.update(chunk)
                yield chunk
        if found.hexdigest() != digest:
            raise StoreUnavailable(f"the content of blob {digest} came damaged", hint="read it again; check the disk")

    async def stats(self) -> StatsView:
        return await self._link.call(routes.STATS)

    async def workers(self) -> list[WorkerView]:
        return await self._link.call(routes.WORKERS)

    async def drain_worker(self, session: str) -> WorkerView:
        return await self._link.call(routes.DRAIN_WORKER, session=check_id(session))

    async def health(self) -> Health:
        return await self._link.call(routes.READY)

    async def create_token(self, request: CreateTokenRequest) -> CreateTokenReply:
        # A repeated one would be a second token, whose twin nobody knows.
        return await self._link.call(routes.CREATE_TOKEN, request, repeat=False)

    async def tokens(self) -> list[TokenView]:
        return await self._link.call(routes.TOKENS)

    async def revoke_token(self, token_id: str) -> TokenView:
        return await self._link.call(routes.REVOKE_TOKEN, token_id=check_id(token_id))

    async def prune(self) -> dict[str, int]:
        return await self._link.call(routes.PRUNE)

    async def _has_blob(self, digest: str) -> bool:
        try:
            await self._link.call(routes.HEAD_BLOB, digest=digest)
        except (BlobNotFound, NotFound):
            return False
        return True


def _with_ids(request: SubmitRequest) -> SubmitRequest:
    """Give every job its id now; the ids of a batch's jobs follow from their index."""
    if request.batch is not None or all(job.id is not None for job in request.jobs):
        return request
    fresh = iter(new_job_ids(len(request.jobs)))
    jobs = [job if job.id is not None else msgspec.structs.replace(job, id=next(fresh)) for job in request.jobs]
    return msgspec.structs.replace(request, jobs=jobs)


def _size_of(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _digest_of(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def _read(path: Path) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while chunk := await asyncio.to_thread(file.read, READ_BYTES):
            yield chunk
    finally:
        file.close()

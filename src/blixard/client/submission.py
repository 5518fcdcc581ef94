"""What everybody does who submits: arguments that are large become blobs, and a batch goes in requests of bounded size."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from blixard.client.contract import AsyncClient
from blixard.domain.grants import InputFile
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_BATCH_JOBS, MAX_INLINE_ARGUMENTS_BYTES, MIB
from blixard.domain.spec import JobSpec
from blixard.protocol.jobs import BatchView, SubmitReply, SubmitRequest

REQUEST_BYTES = 4 * MIB
"""Arguments in one submission, well below what a server accepts as one request."""
REQUESTS_UNDER_WAY = 2
"""More do not help: the store writes one at a time."""


async def make_job(
    client: AsyncClient,
    arguments: bytes,
    *,
    job_id: str | None = None,
    inputs: Sequence[InputFile] = (),
    priority: int = 0,
) -> NewJob:
    """Return a job with these arguments: inline, or stored as a blob when they are larger than ``MAX_INLINE_ARGUMENTS_BYTES``."""
    if len(arguments) > MAX_INLINE_ARGUMENTS_BYTES:
        digest = await client.put_blob(arguments)
        return NewJob(id=job_id, arguments_blob=digest, inputs=tuple(inputs), priority=priority)
    return NewJob(id=job_id, arguments=msgspec.Raw(arguments), inputs=tuple(inputs), priority=priority)


async def submit_batch(
    client: AsyncClient,
    spec: JobSpec,
    batch: BatchView,
    size_of: Callable[[int], int],
    make_jobs: Callable[[range], Awaitable[list[NewJob]]],
) -> None:
    """Submit the jobs of a batch that are not submitted yet. Stopped at any point and begun again, it submits none twice.

    ``size_of`` is the bytes of one job's arguments, ``make_jobs`` makes the jobs of one request. While one request is stored, the next is read.
    """
    under_way: deque[asyncio.Task[SubmitReply]] = deque()
    index = batch.submitted
    try:
        while index < batch.total:
            numbers = _next_request(index, batch.total, size_of)
            jobs = await make_jobs(numbers)
            if len(under_way) == REQUESTS_UNDER_WAY:
                await under_way.popleft()
            request = SubmitRequest(spec=spec, jobs=jobs, batch=batch.id, first_index=index)
            under_way.append(asyncio.create_task(client.submit_many(request), name=f"submit from {index}"))
            index = numbers.stop
        while under_way:
            await under_way.popleft()
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def _next_request(first: int, total: int, size_of: Callable[[int], int]) -> range:
    """Return the jobs that go together from ``first`` on: at least one, whatever its size."""
    size = 0
    for index in range(first, min(first + MAX_BATCH_JOBS, total)):
        size += size_of(index)
        if index > first and size > REQUEST_BYTES:
            return range(first, index)
    return range(first, min(first + MAX_BATCH_JOBS, total))

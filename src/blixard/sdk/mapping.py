"""``map``: one durable job per call, submitted in batches while results come in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from blixard.client.contract import AsyncClient
from blixard.client.endings import index_in_batch, result_bytes
from blixard.client.submission import make_job, submit_batch
from blixard.domain.batch import batch_identity
from blixard.domain.ids import DEFAULT_NAMESPACE
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_BATCH_JOBS
from blixard.domain.spec import JobSpec, encode_spec
from blixard.protocol.jobs import BatchView, JobResult, OpenBatchRequest
from blixard.sdk.ends import error_of

WAIT_SECONDS = 20.0


class Ended(msgspec.Struct, frozen=True):
    """One ended call: its place among the inputs, and its result's JSON text or its error."""

    index: int
    data: bytes | None
    error: Exception | None


class MapStream:
    """A map under way. Abandoning it leaves the jobs that were submitted; the rest is not submitted."""

    def __init__(self, client: AsyncClient, spec: JobSpec, arguments: Sequence[bytes], priority: int) -> None:
        self._client = client
        self._spec = spec
        self._arguments = arguments
        self._priority = priority
        self._batch: BatchView | None = None
        self._submitting: asyncio.Task[None] | None = None
        self._position = 0
        self._left = set(range(len(arguments)))

    async def start(self, *, resume: bool) -> None:
        """Open the batch (with ``resume`` the one that computes the same, if there is one) and begin to submit."""
        identity = batch_identity(DEFAULT_NAMESPACE, encode_spec(self._spec), self._arguments)
        request = OpenBatchRequest(
            name=self._spec.name, identity=identity, total=len(self._arguments), fresh=not resume
        )
        self._batch = await self._client.open_batch(request)
        self._submitting = asyncio.create_task(self._submit(self._batch), name="map: submit")

    async def next_page(self) -> list[Ended]:
        """Return calls that have ended since the last page; empty when all have been returned."""
        batch, submitting = self._batch, self._submitting
        assert batch is not None  # start() comes first
        assert submitting is not None
        while self._left:
            if submitting.done():
                submitting.result()
            page = await self._client.batch_results(
                batch.id, after=self._position, limit=MAX_BATCH_JOBS, wait=WAIT_SECONDS if submitting.done() else 1.0
            )
            self._position = page.position
            ended = [await self._end(result) for result in page.results]
            fresh = [item for item in ended if item.index in self._left]
            self._left.difference_update(item.index for item in fresh)
            if fresh:
                return fresh
        return []

    async def close(self) -> None:
        """Stop submitting. Allowed before ``start`` and twice."""
        if self._submitting is not None:
            self._submitting.cancel()
            await asyncio.gather(self._submitting, return_exceptions=True)

    async def _end(self, result: JobResult) -> Ended:
        index = index_in_batch(result)
        if (error := error_of(result)) is not None:
            return Ended(index, None, error)
        return Ended(index, await result_bytes(self._client, result), None)

    async def _submit(self, batch: BatchView) -> None:
        await submit_batch(self._client, self._spec, batch, lambda index: len(self._arguments[index]), self._make_jobs)

    async def _make_jobs(self, numbers: range) -> list[NewJob]:
        wanted = self._arguments[numbers.start : numbers.stop]
        return [await make_job(self._client, data, priority=self._priority) for data in wanted]

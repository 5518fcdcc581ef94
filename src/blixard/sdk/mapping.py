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
from blixard.errors import InvalidRequest
from blixard.protocol.jobs import BatchView, JobResult, OpenBatchRequest
from blixard.sdk.ends import error_of

WAIT_SECONDS = 20.0
SUBMITTING_SECONDS = 1.0
"""While the map is being submitted, which may fail."""


class Ended(msgspec.Struct, frozen=True):
    """One ended call: its place among the inputs, and its result's JSON text or its error."""

    index: int
    data: bytes | None
    error: Exception | None


class MapStream:
    """A map under way. Abandoning it leaves the jobs that were submitted; the rest is not submitted."""

    def __init__(
        self, client: AsyncClient, spec: JobSpec, arguments: Sequence[bytes], priority: int, batch: BatchView
    ) -> None:
        self._client = client
        self._spec = spec
        self._arguments = arguments
        self._priority = priority
        self._batch = batch
        self._position = 0
        self._left = set(range(len(arguments)))

    @classmethod
    async def open(
        cls, client: AsyncClient, spec: JobSpec, arguments: Sequence[bytes], priority: int, *, resume: bool
    ) -> MapStream:
        """Open the batch, with ``resume`` the one that computes the same if there is one. Nothing is submitted yet."""
        identity = batch_identity(DEFAULT_NAMESPACE, encode_spec(spec), arguments)
        request = OpenBatchRequest(name=spec.name, identity=identity, total=len(arguments), fresh=not resume)
        return cls(client, spec, arguments, priority, await client.open_batch(request))

    async def submit(self) -> None:
        """Submit what is not submitted yet; to be done while results are taken."""
        await submit_batch(
            self._client, self._spec, self._batch, lambda index: len(self._arguments[index]), self._make_jobs
        )

    async def next_page(self, client: AsyncClient, submitting: asyncio.Task[None]) -> list[Ended]:
        """Return calls that have ended since the last page; empty when all have been returned. Raises what ``submitting`` raised."""
        while self._left:
            is_submitted = submitting.done()
            if submitting.cancelled():
                raise InvalidRequest(
                    "the app was closed while its map was under way", hint="map again with resume=True to go on"
                )
            if is_submitted:
                submitting.result()
            page = await client.batch_results(
                self._batch.id,
                after=self._position,
                limit=MAX_BATCH_JOBS,
                wait=WAIT_SECONDS if is_submitted else SUBMITTING_SECONDS,
            )
            self._position = page.position
            ended = [await self._end(client, result) for result in page.results]
            fresh = [item for item in ended if item.index in self._left]
            self._left.difference_update(item.index for item in fresh)
            if fresh:
                return fresh
        return []

    async def _end(self, client: AsyncClient, result: JobResult) -> Ended:
        index = index_in_batch(result)
        if (error := error_of(result)) is not None:
            return Ended(index, None, error)
        return Ended(index, await result_bytes(client, result), None)

    async def _make_jobs(self, numbers: range) -> list[NewJob]:
        wanted = self._arguments[numbers.start : numbers.stop]
        return [await make_job(self._client, data, priority=self._priority) for data in wanted]

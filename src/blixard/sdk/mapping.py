"""``map``: one durable job per call, submitted in batches while results come in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Protocol

import msgspec

from blixard.client.contract import AsyncClient
from blixard.client.endings import index_in_batch
from blixard.client.submission import submit_batch
from blixard.domain.batch import batch_identity
from blixard.domain.ids import DEFAULT_NAMESPACE
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_BATCH_JOBS
from blixard.domain.spec import encode_spec
from blixard.errors import InvalidRequest, WaitTimedOut
from blixard.protocol.jobs import BatchResults, BatchView, JobResult, OpenBatchRequest
from blixard.sdk.patience import Deadline
from blixard.sdk.template import JobTemplate, Prepared
from blixard.sdk.waiting import MAX_GROUP, MAX_GROUPS, Ends

WAIT_SECONDS = 20.0
SUBMITTING_SECONDS = 1.0
"""While the map is being submitted, which may fail."""
MAX_IN_FLIGHT = MAX_GROUP * MAX_GROUPS
"""What can be waited for at the same time."""
REFILL_SHARE = 4
"""A window is refilled once a quarter of it is free: a request per job would be slow."""


class Ended(msgspec.Struct, frozen=True):
    """One ended call and its place among the inputs."""

    index: int
    result: JobResult


class MapSource(Protocol):
    """A map under way. Abandoning it leaves the jobs that were submitted; the rest is not submitted."""

    async def begin(self, client: AsyncClient) -> None:
        """Make ready. Nothing is submitted yet."""

    async def work(self, client: AsyncClient) -> None:
        """Do what goes on while results are taken; what goes wrong is raised by ``next_page``."""

    def refill(self) -> list[bytes]:
        """Take inputs for the next jobs, in the caller's own thread."""

    async def next_page(self, client: AsyncClient, inputs: list[bytes], deadline: Deadline) -> list[Ended]:
        """Return calls that have ended since the last page; empty when all have been returned. Raises ``WaitTimedOut``."""

    def note_yield(self) -> None:
        """Learn that the caller has taken one result."""


class BatchMap:
    """Knows all inputs: one batch, which ``resume`` finds again."""

    def __init__(self, template: JobTemplate, arguments: Sequence[bytes], *, resume: bool) -> None:
        self._template = template
        self._arguments = arguments
        self._resume = resume
        self._prepared: Prepared
        self._batch: BatchView
        self._position = 0
        self._left = set(range(len(arguments)))
        self._is_submitted = False
        self._failure: BaseException | None = None

    async def begin(self, client: AsyncClient) -> None:
        insist = self._template.app.patience.insist
        prepared = self._prepared = await insist(partial(self._template.prepare, client), proves_contact=False)
        spec = prepared.spec
        # No arguments begin with a letter, so files are never taken for arguments.
        files = [f"input {item.path} {item.digest}".encode() for item in prepared.inputs]
        identity = batch_identity(DEFAULT_NAMESPACE, encode_spec(spec), [*self._arguments, *files])
        request = OpenBatchRequest(
            name=spec.name, identity=identity, total=len(self._arguments), fresh=not self._resume
        )
        # A fresh start that arrived twice would be two.
        self._batch = await insist(partial(client.open_batch, request), repeatable=self._resume)

    async def work(self, client: AsyncClient) -> None:
        try:
            await self._template.app.patience.insist(lambda: self._submit(client))
        except asyncio.CancelledError:
            self._failure = InvalidRequest(
                "the app was closed while its map was under way", hint="map again with resume=True to go on"
            )
            raise
        except Exception as error:  # the edge of a background task: raised by next_page
            self._failure = error
        finally:
            self._is_submitted = True

    async def _submit(self, client: AsyncClient) -> None:
        """Submit what is not submitted yet. Begun again it submits some of it twice, which is harmless."""
        await submit_batch(
            client,
            self._prepared.spec,
            self._batch,
            lambda index: len(self._arguments[index]),
            lambda numbers: self._make_jobs(client, numbers),
        )

    async def _make_jobs(self, client: AsyncClient, numbers: range) -> list[NewJob]:
        wanted = self._arguments[numbers.start : numbers.stop]
        return [await self._prepared.job(client, data) for data in wanted]

    def refill(self) -> list[bytes]:
        return []

    def note_yield(self) -> None:
        return

    async def next_page(self, client: AsyncClient, inputs: list[bytes], deadline: Deadline) -> list[Ended]:
        del inputs
        while self._left:
            if self._failure is not None:
                raise self._failure
            page = await self._look(client, deadline)
            self._position = page.position
            found = [Ended(index_in_batch(result), result) for result in page.results]
            fresh = [item for item in found if item.index in self._left]
            self._left.difference_update(item.index for item in fresh)
            if fresh:
                return fresh
            if deadline.is_over():
                raise _timed_out(deadline)
        return []

    async def _look(self, client: AsyncClient, deadline: Deadline) -> BatchResults:
        wait = WAIT_SECONDS if self._is_submitted else SUBMITTING_SECONDS
        left = deadline.left()
        return await self._template.app.patience.insist(
            lambda: client.batch_results(
                self._batch.id,
                after=self._position,
                limit=MAX_BATCH_JOBS,
                wait=wait if left is None else min(wait, left),
            ),
            deadline,
        )


class WindowMap:
    """Takes inputs as room is made: at most ``size`` of them are submitted and not yet taken by the caller."""

    def __init__(self, template: JobTemplate, inputs: Iterable[object], size: int) -> None:
        self._template = template
        self._inputs = iter(inputs)
        self._size = size
        self._index_of: dict[str, int] = {}
        self._submitted = 0
        self._taken = 0
        self._is_exhausted = False
        self._ends = Ends(template.app.patience)

    async def begin(self, client: AsyncClient) -> None:
        del client

    async def work(self, client: AsyncClient) -> None:
        await self._ends.watch(client)

    def note_yield(self) -> None:
        self._taken += 1

    def refill(self) -> list[bytes]:
        room = self._size - (self._submitted - self._taken)
        if self._is_exhausted or (self._index_of and room * REFILL_SHARE < self._size):
            return []
        taken = [self._template.encode((item,), {}) for item in islice(self._inputs, room)]
        self._is_exhausted = len(taken) < room
        return taken

    async def next_page(self, client: AsyncClient, inputs: list[bytes], deadline: Deadline) -> list[Ended]:
        if inputs:
            ids = await self._template.submit(client, inputs)
            self._index_of.update({job_id: self._submitted + place for place, job_id in enumerate(ids)})
            self._submitted += len(ids)
            self._ends.add(ids)
        if not self._index_of:
            return []
        results = await self._ends.take(deadline)
        if not results:
            raise _timed_out(deadline)
        return [Ended(self._index_of.pop(result.id), result) for result in results]


def _timed_out(deadline: Deadline) -> WaitTimedOut:
    return WaitTimedOut(f"the map has not ended after {deadline.seconds:g} s; its jobs go on")


class InOrder:
    """Gives ended calls in the order of the inputs, keeping what came early."""

    def __init__(self) -> None:
        self._early: dict[int, Ended] = {}
        self._expected = 0

    def sort(self, page: list[Ended]) -> Iterator[Ended]:
        self._early.update((item.index, item) for item in page)
        while (item := self._early.pop(self._expected, None)) is not None:
            self._expected += 1
            yield item


class AsTheyCome:
    def sort(self, page: list[Ended]) -> Iterator[Ended]:
        return iter(page)


def check_window(size: object) -> int:
    """Return ``max_in_flight`` if it can be one. Raises ``InvalidRequest``."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_IN_FLIGHT:
        raise InvalidRequest(
            f"max_in_flight is {size!r}; a whole number from 1 to {MAX_IN_FLIGHT} is allowed",
            field="max_in_flight",
            hint="leave it out to submit all inputs at once",
        )
    return size


def check_timeout(timeout: object) -> None:
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0:
        raise InvalidRequest(
            f"timeout is {timeout!r}; seconds as a number, 0 or more, are allowed",
            field="timeout",
            hint="leave it out to wait without end",
        )

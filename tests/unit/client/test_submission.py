"""A batch goes in bounded requests, a bounded number of them at once, and the first failure ends it."""

from __future__ import annotations

import asyncio
from typing import cast

import msgspec
import pytest

from blixard.client.contract import AsyncClient
from blixard.client.submission import REQUEST_BYTES, REQUESTS_UNDER_WAY, submit_batch
from blixard.domain.batch import batch_job_id
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_BATCH_JOBS
from blixard.domain.payload import CommandPayload
from blixard.domain.spec import JobSpec
from blixard.errors import StoreFull
from blixard.protocol.jobs import BatchView, SubmitReply, SubmitRequest

SPEC = msgspec.convert({"name": "n", "payload": CommandPayload(argv=("true",))}, JobSpec)


class Store:
    """Stores requests when ``release`` lets one through; ``fail_at`` is the index whose request is refused."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.stored: list[str] = []
        self.requests: list[int] = []
        self.under_way = 0
        self.most = 0
        self.release = asyncio.Semaphore(0)
        self.busy = asyncio.Event()
        """Set once as many requests are under way as may be."""
        self._fail_at = fail_at

    async def submit_many(self, request: SubmitRequest) -> SubmitReply:
        assert request.batch is not None
        assert request.first_index is not None
        self.requests.append(request.first_index)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        if self.under_way == REQUESTS_UNDER_WAY:
            self.busy.set()
        try:
            await self.release.acquire()
        finally:
            self.under_way -= 1
        if request.first_index == self._fail_at:
            raise StoreFull("the disk is full")
        ids = [batch_job_id(request.batch, request.first_index + place) for place in range(len(request.jobs))]
        self.stored += ids
        return SubmitReply(ids=ids, created=len(ids))


def view(total: int, submitted: int = 0) -> BatchView:
    fields = {"id": "map_x_1", "name": "n", "identity": "x", "generation": 1, "counts": {}}
    return msgspec.convert(
        {**fields, "total": total, "submitted": submitted, "created_at": "2026-01-01T00:00:00Z"}, BatchView
    )


async def submit(store: Store, batch: BatchView, size: int = 10) -> None:
    async def make(numbers: range) -> list[NewJob]:
        return [NewJob(arguments=msgspec.Raw(b"[[%d],{}]" % number)) for number in numbers]

    await submit_batch(cast("AsyncClient", store), SPEC, batch, lambda _: size, make)


async def test_every_job_is_submitted_once_and_only_so_many_requests_are_under_way() -> None:
    store = Store()
    total = MAX_BATCH_JOBS * 7 + 3
    sending = asyncio.create_task(submit(store, view(total, submitted=MAX_BATCH_JOBS)))
    await store.busy.wait()
    for _ in range(7):
        store.release.release()
    await sending
    assert store.stored == [batch_job_id("map_x_1", index) for index in range(MAX_BATCH_JOBS, total)]
    assert store.most == REQUESTS_UNDER_WAY


async def test_large_arguments_go_in_smaller_requests() -> None:
    store = Store()
    for _ in range(10):
        store.release.release()
    await submit(store, view(20), size=REQUEST_BYTES // 2)
    assert store.requests == list(range(0, 20, 2))


async def test_the_first_failure_ends_it_and_leaves_no_request_behind() -> None:
    store = Store(fail_at=MAX_BATCH_JOBS)
    sending = asyncio.create_task(submit(store, view(MAX_BATCH_JOBS * 9)))
    store.release.release()
    store.release.release()
    with pytest.raises(StoreFull):
        await sending
    assert store.under_way == 0
    assert len(store.stored) == MAX_BATCH_JOBS
    assert len(store.requests) <= 2 + REQUESTS_UNDER_WAY


async def test_a_cancelled_submission_leaves_no_request_behind() -> None:
    store = Store()
    sending = asyncio.create_task(submit(store, view(MAX_BATCH_JOBS * 9)))
    await store.busy.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert (store.under_way, store.stored) == (0, [])

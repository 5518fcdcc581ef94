from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from blixard import App, JobFailed
from blixard.client.submission import REQUEST_BYTES
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_ARGUMENTS_BYTES, MAX_BATCH_JOBS, MAX_INLINE_ARGUMENTS_BYTES
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.errors import InvalidRequest, StoreFull
from blixard.protocol.jobs import BatchResults, SubmitReply, SubmitRequest
from tests.unit.cli.fake_client import Ending, FakeClient
from tests.unit.sdk import jobs
from tests.unit.sdk.conftest import Store


class Backwards(FakeClient):
    """Tells the results of a page last first."""

    async def batch_results(
        self, batch_id: str, *, after: int = 0, limit: int = 1000, wait: float = 0.0
    ) -> BatchResults:
        page = await super().batch_results(batch_id, after=after, limit=limit, wait=wait)
        return BatchResults(results=page.results[::-1], position=page.position, done=page.done)


class Full(FakeClient):
    """Has a disk for one request."""

    async def submit_many(self, request: SubmitRequest) -> SubmitReply:
        if self.requests:
            raise StoreFull("the disk is full", hint="free some space")
        return await super().submit_many(request)


def sizes(client: FakeClient) -> list[int]:
    return [len(request.jobs) for request in client.requests]


def test_results_come_in_the_order_of_the_inputs(app: App) -> None:
    assert list(app.job(jobs.double).map(range(20))) == list(range(0, 40, 2))


def test_no_inputs_are_no_results(app: App) -> None:
    assert list(app.job(jobs.double).map([])) == []


@pytest.mark.parametrize("total", [MAX_BATCH_JOBS - 1, MAX_BATCH_JOBS, MAX_BATCH_JOBS + 1, 2 * MAX_BATCH_JOBS + 500])
def test_a_map_of_several_pages_is_complete_and_in_order(app: App, client: FakeClient, total: int) -> None:
    assert list(app.job(jobs.double).map(range(total))) == list(range(0, 2 * total, 2))
    assert sum(sizes(client)) == total
    assert max(sizes(client)) <= MAX_BATCH_JOBS


class TestBackwards:
    @pytest.fixture
    def client(self, store: Store) -> FakeClient:
        return Backwards(store, store.run)

    def test_ordered_results_wait_for_those_before_them(self, app: App) -> None:
        assert list(app.job(jobs.double).map(range(50))) == list(range(0, 100, 2))

    def test_unordered_results_come_as_they_end(self, app: App) -> None:
        found = list(app.job(jobs.double).map(range(50), ordered=False))
        assert found == list(range(98, -1, -2))


def test_the_first_failed_call_raises_after_the_results_before_it(app: App) -> None:
    results = app.job(jobs.fail_on_odd).map([0, 2, 3, 4])
    assert [next(results), next(results)] == [0, 2]
    with pytest.raises(JobFailed, match="3 is odd") as caught:
        next(results)
    assert caught.value.hint == "take even ones"


def test_errors_may_stand_among_the_results(app: App) -> None:
    found = list(app.job(jobs.fail_on_odd).map([0, 1, 2], return_exceptions=True))
    assert [found[0], found[2]] == [0, 2]
    assert isinstance(found[1], JobFailed)


def test_requests_are_bounded_by_bytes_as_well(app: App, client: FakeClient) -> None:
    size = REQUEST_BYTES // 64  # 64 KiB with its frame: just above what travels inline
    assert list(app.job(jobs.measure).map(["x" * size] * 100)) == [size] * 100
    assert max(sizes(client)) < 64
    assert sum(sizes(client)) == 100


def test_large_arguments_travel_as_blobs_and_small_ones_inline(app: App, client: FakeClient, store: Store) -> None:
    frame = len('[[""],{}]')
    measure = app.job(jobs.measure)
    texts = ["x" * (MAX_INLINE_ARGUMENTS_BYTES - frame), "y" * (MAX_INLINE_ARGUMENTS_BYTES - frame + 1)]
    assert list(measure.map(texts)) == [len(text) for text in texts]
    inline, blob = client.requests[-1].jobs
    assert (inline.arguments_blob, bytes(blob.arguments)) == (None, b"[]")
    assert blob.arguments_blob in store.blobs
    assert measure.submit("z" * (MAX_ARGUMENTS_BYTES - frame)).result() == MAX_ARGUMENTS_BYTES - frame
    assert client.requests[-1].jobs[0].arguments_blob in store.blobs


def test_an_input_that_does_not_serialise_submits_nothing(app: App, client: FakeClient) -> None:
    with pytest.raises(InvalidRequest, match=r"argument 0 \(object\)"):
        list(app.job(jobs.double).map([1, object()]))
    assert client.requests == []


def test_every_map_is_a_new_one_unless_it_is_to_resume(app: App, client: FakeClient, store: Store) -> None:
    double = app.job(jobs.double)
    assert list(double.map([1, 2])) == list(double.map([1, 2])) == [2, 4]
    assert len(client.requests) == 2
    assert list(double.map([1, 2], resume=True)) == [2, 4]
    assert len(client.requests) == 2
    assert len(store.batches) == 2


def test_resuming_runs_only_what_has_not_completed(app: App, store: Store, client: FakeClient) -> None:
    ran: list[bytes] = []

    def run(spec: JobSpec, job: NewJob) -> Ending:
        ran.append(bytes(job.arguments))
        return store.run(spec, job)

    client.runner = run
    results = app.job(jobs.fail_on_odd).map([0, 1, 2], return_exceptions=True)
    assert isinstance(list(results)[1], JobFailed)
    ran.clear()

    def repaired(spec: JobSpec, job: NewJob) -> Ending:
        ran.append(bytes(job.arguments))
        return Ending(result=1)

    client.runner = repaired
    assert list(app.job(jobs.fail_on_odd).map([0, 1, 2], resume=True)) == [0, 1, 2]
    assert ran == [b"[[1],{}]"]


def test_other_inputs_or_options_are_another_map(app: App, store: Store) -> None:
    double = app.job(jobs.double)
    list(double.map([1, 2]))
    list(double.map([2, 1], resume=True))
    list(double.options(timeout=5).map([1, 2], resume=True))
    assert len(store.batches) == 3


def test_leaving_the_loop_leaves_the_jobs_and_the_client_usable(app: App, store: Store) -> None:
    results = app.job(jobs.double).map(range(3 * MAX_BATCH_JOBS))
    assert next(results) == 0
    assert isinstance(results, Iterator)
    results.close()  # type: ignore[attr-defined]  # a generator, of which the signature promises less
    assert MAX_BATCH_JOBS <= len(store.jobs) <= 3 * MAX_BATCH_JOBS
    assert all(job.state in {JobState.COMPLETED, JobState.PENDING} for job in store.jobs.values())
    assert app.job(jobs.add).submit(1).result() == 2


class TestFull:
    @pytest.fixture
    def client(self, store: Store) -> FakeClient:
        return Full(store, store.run)

    def test_an_error_of_submitting_reaches_the_caller(self, app: App) -> None:
        with pytest.raises(StoreFull, match="the disk is full"):
            list(app.job(jobs.double).map(range(3 * MAX_BATCH_JOBS)))


class Stuck(FakeClient):
    """Takes one request and never answers the next."""

    async def submit_many(self, request: SubmitRequest) -> SubmitReply:
        if self.requests:
            await asyncio.Event().wait()
        return await super().submit_many(request)


class TestStuck:
    @pytest.fixture
    def client(self, store: Store) -> FakeClient:
        return Stuck(store, store.run)

    def test_closing_the_app_amid_a_map_is_told(self, app: App) -> None:
        results = app.job(jobs.double).map(range(3 * MAX_BATCH_JOBS))
        assert next(results) == 0
        app.close()
        with pytest.raises(InvalidRequest, match="closed while its map was under way"):
            list(results)

    def test_leaving_the_loop_ends_the_submission(self, app: App, store: Store) -> None:
        for value in app.job(jobs.double).map(range(3 * MAX_BATCH_JOBS)):
            assert value == 0
            break
        assert len(store.jobs) == MAX_BATCH_JOBS

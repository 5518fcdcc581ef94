from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator, Sequence

import pytest

from blixard import App, JobFailed
from blixard.client.submission import REQUEST_BYTES
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_ARGUMENTS_BYTES, MAX_BATCH_JOBS, MAX_INLINE_ARGUMENTS_BYTES
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.errors import InvalidRequest, ServerUnreachable, StoreFull, WaitTimedOut
from blixard.protocol.jobs import (
    BatchResults,
    BatchView,
    OpenBatchRequest,
    SubmitReply,
    SubmitRequest,
    WaitReply,
)
from blixard.sdk.mapping import MAX_IN_FLIGHT
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


class Windowed(FakeClient):
    """Ends at once what is waited for, the last submitted first, and notes how many were under way."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, store.run)
        self.most = 0
        self.taken = 0

    async def wait(self, ids: Sequence[str], *, wait: float) -> WaitReply:
        self._work()
        self.most = max(self.most, len(self.store.jobs) - self.taken)
        return WaitReply(ended=[self._result(job_id) for job_id in reversed(ids)])


class TestWindow:
    @pytest.fixture
    def client(self, store: Store) -> Windowed:
        return Windowed(store)

    @pytest.mark.parametrize("size", [1, 2, 7, 100, 1_500, MAX_IN_FLIGHT])
    def test_results_come_in_order_with_so_many_under_way_at_most(self, app: App, client: Windowed, size: int) -> None:
        total = 2_100 if size >= 100 else 200
        for number, value in enumerate(app.job(jobs.double).map(iter(range(total)), max_in_flight=size)):
            assert value == 2 * number
            client.taken += 1
        assert client.taken == total
        assert client.most == min(size, total)
        assert client.store.batches == {}

    def test_unordered_results_come_as_they_end(self, app: App) -> None:
        found = list(app.job(jobs.double).map(range(4), max_in_flight=4, ordered=False))
        assert found == [6, 4, 2, 0]

    def test_inputs_may_be_without_end(self, app: App, store: Store) -> None:
        results = app.job(jobs.double).map(itertools.count(), max_in_flight=10)
        assert list(itertools.islice(results, 50)) == list(range(0, 100, 2))
        results.close()  # type: ignore[attr-defined]  # a generator, of which the signature promises less
        assert len(store.jobs) <= 60

    def test_nothing_is_taken_before_the_first_result_is_asked_for(self, app: App) -> None:
        inputs = iter(range(5))
        results = app.job(jobs.double).map(inputs, max_in_flight=2)
        assert next(inputs) == 0
        assert list(results) == [2, 4, 6, 8]

    def test_inputs_are_taken_in_the_thread_of_the_caller(self, app: App) -> None:
        add = app.job(jobs.add)

        def inputs() -> Iterator[int]:
            assert threading.current_thread() is threading.main_thread()
            yield add.submit(1).result()

        assert list(app.job(jobs.double).map(inputs(), max_in_flight=2)) == [4]

    def test_an_error_of_the_inputs_reaches_the_caller(self, app: App) -> None:
        def inputs() -> Iterator[int]:
            yield 1
            raise OSError("the file ends here")

        with pytest.raises(OSError, match="ends here"):
            list(app.job(jobs.double).map(inputs(), max_in_flight=2))

    def test_failures_raise_or_stand_among_the_results(self, app: App) -> None:
        odd = app.job(jobs.fail_on_odd)
        found = list(odd.map([0, 1, 2], max_in_flight=2, return_exceptions=True))
        assert [found[0], type(found[1]), found[2]] == [0, JobFailed, 2]
        with pytest.raises(JobFailed, match="1 is odd"):
            list(odd.map([0, 1, 2], max_in_flight=2))

    async def test_the_same_in_an_event_loop(self, app: App) -> None:
        double = app.job(jobs.double)
        assert [value async for value in double.map_async(range(50), max_in_flight=7)] == list(range(0, 100, 2))


@pytest.mark.parametrize("size", [0, -1, MAX_IN_FLIGHT + 1, True, 1.5, "7"])
def test_a_wrong_window_is_refused_at_once(app: App, size: object) -> None:
    with pytest.raises(InvalidRequest, match="max_in_flight is") as caught:
        app.job(jobs.double).map([1], max_in_flight=size)  # type: ignore[arg-type]  # that is the mistake
    assert (caught.value.field, "all inputs at once" in (caught.value.hint or "")) == ("max_in_flight", True)


def test_a_window_and_resume_are_in_conflict(app: App) -> None:
    with pytest.raises(InvalidRequest, match="known again by all of its inputs") as caught:
        app.job(jobs.double).map([1], max_in_flight=2, resume=True)
    assert caught.value.field == "resume"


@pytest.mark.parametrize("timeout", [-1, True, "3", float("nan")])
def test_a_wrong_timeout_is_refused_at_once(app: App, timeout: object) -> None:
    with pytest.raises(InvalidRequest, match="timeout is") as caught:
        app.job(jobs.double).map([1], timeout=timeout)  # type: ignore[arg-type]  # that is the mistake
    assert caught.value.field == "timeout"


async def test_a_map_in_an_event_loop(app: App, client: FakeClient) -> None:
    double = app.job(jobs.double)
    total = MAX_BATCH_JOBS + 10
    assert [value async for value in double.map_async(range(total))] == list(range(0, 2 * total, 2))
    assert [value async for value in double.map_async(range(3), resume=True)] == [0, 2, 4]
    assert [value async for value in double.map_async([])] == []
    with pytest.raises(JobFailed):
        await anext(app.job(jobs.fail_on_odd).map_async([1]))


class Endless(FakeClient):
    """Runs nothing."""

    async def batch_results(
        self, batch_id: str, *, after: int = 0, limit: int = 1000, wait: float = 0.0
    ) -> BatchResults:
        await asyncio.sleep(min(wait, 0.05))  # sleep: what a server that has nothing to tell does
        return BatchResults(results=[], position=after, done=False)

    async def wait(self, ids: Sequence[str], *, wait: float) -> WaitReply:
        await asyncio.Event().wait()
        raise AssertionError


class TestEndless:
    @pytest.fixture
    def client(self, store: Store) -> FakeClient:
        return Endless(store, store.run)

    @pytest.mark.parametrize("size", [None, 2])
    def test_a_map_has_a_timeout(self, app: App, size: int | None) -> None:
        results = app.job(jobs.double).map(range(3), timeout=0.3, max_in_flight=size)
        with pytest.raises(WaitTimedOut, match=r"after 0\.3 s; its jobs go on"):
            next(results)

    @pytest.mark.parametrize("size", [None, 2])
    async def test_the_same_in_an_event_loop(self, app: App, size: int | None) -> None:
        results = app.job(jobs.double).map_async(range(3), timeout=0.3, max_in_flight=size)
        with pytest.raises(WaitTimedOut):
            await anext(results)


class Restarting(FakeClient):
    """Is away for two calls of every kind, once it has answered."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, store.run)
        self.left = None
        self.away = {"submit_many": 2, "batch_results": 2, "open_batch": 2}

    def _go_away(self, call: str) -> None:
        if self.store.jobs and self.away[call]:
            self.away[call] -= 1
            raise ServerUnreachable("no answer")

    async def submit_many(self, request: SubmitRequest) -> SubmitReply:
        self._go_away("submit_many")
        return await super().submit_many(request)

    async def open_batch(self, request: OpenBatchRequest) -> BatchView:
        self._go_away("open_batch")
        return await super().open_batch(request)

    async def batch_results(
        self, batch_id: str, *, after: int = 0, limit: int = 1000, wait: float = 0.0
    ) -> BatchResults:
        self._go_away("batch_results")
        return await super().batch_results(batch_id, after=after, limit=limit, wait=wait)


class TestRestarting:
    @pytest.fixture
    def client(self, store: Store) -> FakeClient:
        return Restarting(store)

    def test_a_map_goes_on_when_the_server_is_back(self, app: App, client: Restarting, store: Store) -> None:
        app.job(jobs.add).submit(1)
        assert list(app.job(jobs.double).map(range(2_500), resume=True)) == list(range(0, 5_000, 2))
        assert client.away == {"submit_many": 0, "batch_results": 0, "open_batch": 0}
        assert len(store.jobs) == 2_501


class Gone(FakeClient):
    """Never answers."""

    async def submit_many(self, request: SubmitRequest) -> SubmitReply:
        raise ServerUnreachable("no answer")


class TestGone:
    @pytest.fixture
    def client(self, store: Store) -> FakeClient:
        return Gone(store, store.run)

    def test_a_server_that_never_answered_is_an_error_at_once(self, app: App) -> None:
        with pytest.raises(ServerUnreachable):
            app.job(jobs.add).submit(1)

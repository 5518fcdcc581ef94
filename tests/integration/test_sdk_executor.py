"""The rules of ``concurrent.futures``, as its documentation and CPython's own tests state them.

Each test runs on ``ThreadPoolExecutor``, the oracle, and on ours: with workers of its own, and within the process of a test.
Where the oracle is older than a rule (``buffersize``) or does not know it (``chunksize``), ours is held to the documented words.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import pytest

from blixard import App, Executor, JobFailed, JobFuture, JobState, RetryPolicy
from blixard.errors import InvalidRequest
from blixard.protocol.jobs import JobFilter
from blixard.testing import inline
from tests.integration import sdk_calls as calls

DEADLINE = 90.0
MakeExecutor = Callable[[], futures.Executor]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    app = App("suite", data_dir=tmp_path_factory.mktemp("data"))
    try:
        yield app
    finally:
        app.close()


@pytest.fixture
def ours(embedded: App) -> Iterator[Executor]:
    with Executor(embedded, isolation="minimal") as executor:
        yield executor


@pytest.fixture(params=["threads", "embedded", "inline"])
def make(request: pytest.FixtureRequest, embedded: App) -> Iterator[MakeExecutor]:
    if request.param == "inline":
        with inline(embedded):
            yield lambda: Executor(embedded)
    elif request.param == "embedded":
        yield lambda: Executor(embedded, isolation="minimal")
    else:
        yield lambda: futures.ThreadPoolExecutor(2)


@pytest.fixture
def pool(make: MakeExecutor) -> Iterator[futures.Executor]:
    with make() as executor:
        yield executor


@pytest.fixture(params=["threads", "embedded"])
def slow_pool(request: pytest.FixtureRequest, embedded: App) -> Iterator[futures.Executor]:
    """What runs in the background; within a test every call is done when ``submit`` returns."""
    made = futures.ThreadPoolExecutor(2) if request.param == "threads" else Executor(embedded, isolation="minimal")
    with made as executor:
        yield executor


# submit


def test_submit_returns_a_future_of_the_value(pool: futures.Executor) -> None:
    future = pool.submit(pow, 2, 8)
    assert isinstance(future, futures.Future)
    assert future.result(DEADLINE) == 256
    assert (future.done(), future.cancelled(), future.running(), future.exception()) == (True, False, False, None)


def test_submit_takes_named_arguments_also_those_that_look_like_its_own(pool: futures.Executor) -> None:
    assert pool.submit(calls.capture, 1, self=2, fn=3).result(DEADLINE) == [[1], {"self": 2, "fn": 3}]


def test_builtin_functions_partials_and_coroutines_of_methods_can_be_called(pool: futures.Executor) -> None:
    assert pool.submit(math.sqrt, 16).result(DEADLINE) == 4
    assert pool.submit(functools.partial(pow, 2, mod=5), 3).result(DEADLINE) == 3
    assert pool.submit(calls.Counter.start_at, 3).result(DEADLINE) == 3


def test_an_exception_is_raised_by_result_and_returned_by_exception(pool: futures.Executor) -> None:
    future = pool.submit(calls.fail, "bread")
    with pytest.raises(ValueError, match="no bread"):
        future.result(DEADLINE)
    assert isinstance(future.exception(DEADLINE), ValueError)
    assert future.done()


@pytest.mark.parametrize("kind", ["KeyError", "OSError", "ZeroDivisionError", "TimeoutError", "RecursionError"])
def test_exceptions_of_python_keep_their_type(pool: futures.Executor, kind: str) -> None:
    error = pool.submit(calls.raise_builtin, kind).exception(DEADLINE)
    assert type(error).__mro__[0].__name__ in {kind, "JobFailed"}
    assert kind in {cls.__name__ for cls in type(error).__mro__}


def test_a_wait_for_a_result_can_end_before_it(slow_pool: futures.Executor) -> None:
    future = slow_pool.submit(time.sleep, 0.5)
    with pytest.raises(futures.TimeoutError):
        future.result(timeout=0)
    with pytest.raises(TimeoutError):
        future.exception(timeout=0)
    assert future.result(DEADLINE) is None


def test_callbacks_are_called_with_the_future_once_it_is_done(pool: futures.Executor) -> None:
    called: list[object] = []
    rung = threading.Event()
    future = pool.submit(pow, 2, 3)
    future.add_done_callback(lambda found: (called.append(found.result()), rung.set()))  # type: ignore[func-returns-value]  # run for what they do
    assert rung.wait(DEADLINE)
    future.add_done_callback(called.append)
    assert called == [8, future]


def test_a_callback_may_submit(pool: futures.Executor) -> None:
    followers: list[futures.Future[int]] = []
    rung = threading.Event()

    def follow(found: futures.Future[int]) -> None:
        followers.append(pool.submit(pow, found.result(), 2))
        rung.set()

    pool.submit(pow, 3, 1).add_done_callback(follow)
    assert rung.wait(DEADLINE)
    assert followers[0].result(DEADLINE) == 9


def test_threads_may_share_it(pool: futures.Executor) -> None:
    with futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: pool.submit(pow, number, 2).result(DEADLINE), range(24)))
    assert found == [number**2 for number in range(24)]


# shutdown


def test_nothing_is_taken_after_shutdown(make: MakeExecutor) -> None:
    executor = make()
    executor.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(pow, 2, 5)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.map(pow, [2], [5])
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)


def test_shutdown_waits_for_all(make: MakeExecutor) -> None:
    executor = make()
    found = [executor.submit(time.sleep, 0.05) for _ in range(6)]
    executor.shutdown()
    assert all(future.done() and not future.cancelled() for future in found)


def test_leaving_with_waits_for_all_and_takes_no_more(make: MakeExecutor) -> None:
    with make() as executor:
        results = executor.map(abs, range(-5, 5))
    with pytest.raises(RuntimeError):
        executor.submit(abs, -1)
    assert list(results) == [5, 4, 3, 2, 1, 0, 1, 2, 3, 4]


def test_shutdown_without_waiting_lets_all_end(make: MakeExecutor) -> None:
    executor = make()
    found = [executor.submit(calls.slow_double, number) for number in range(4)]
    executor.shutdown(wait=False)
    assert [future.result(DEADLINE) for future in found] == [0, 2, 4, 6]


def test_shutdown_can_cancel_what_has_not_started(embedded: App, tmp_path: Path) -> None:
    for executor in (futures.ThreadPoolExecutor(1), Executor(embedded, isolation="minimal", labels={"zone": "none"})):
        gate = threading.Event()
        if isinstance(executor, futures.ThreadPoolExecutor):
            executor.submit(gate.wait, DEADLINE)
        waiting = [executor.submit(pow, 2, number) for number in range(20)]
        executor.shutdown(wait=False, cancel_futures=True)
        gate.set()
        executor.shutdown()
        assert [future.cancelled() for future in waiting] == [True] * 20
        with pytest.raises(futures.CancelledError):
            waiting[0].result()


def test_shutdown_does_not_cancel_what_runs(embedded: App) -> None:
    executor = Executor(embedded, isolation="minimal")
    future = executor.submit(time.sleep, 1.0)
    while not future.running():
        assert not future.done()
        time.sleep(0.01)  # nothing rings when a worker starts a job
    executor.shutdown(cancel_futures=True)
    assert future.result(0) is None


def test_an_executor_that_is_dropped_lets_its_calls_end(make: MakeExecutor) -> None:
    executor = make()
    future = executor.submit(calls.slow_double, 4)
    del executor
    assert future.result(DEADLINE) == 8


# map


def test_map_calls_with_items_side_by_side_up_to_the_shortest(pool: futures.Executor) -> None:
    assert list(pool.map(pow, range(10), range(10))) == [number**number for number in range(10)]
    assert list(pool.map(pow, range(10), range(3))) == [1, 1, 4]
    assert list(pool.map(abs, [])) == []
    assert list(pool.map(pow, range(7), range(7), chunksize=3)) == [number**number for number in range(7)]


def test_map_gives_results_in_order_though_they_end_in_another(slow_pool: futures.Executor) -> None:
    assert list(slow_pool.map(calls.sleep, [0.3, 0.0])) == [0.3, 0.0]


def test_map_takes_all_inputs_and_submits_before_the_first_result_is_asked_for(pool: futures.Executor) -> None:
    taken: list[int] = []
    results = pool.map(abs, (taken.append(number) or number for number in range(5)))  # type: ignore[func-returns-value]  # run for what it does
    assert taken == list(range(5))
    assert iter(results) is results
    assert [next(results), *results] == list(range(5))


def test_map_raises_the_exception_when_its_place_comes(pool: futures.Executor) -> None:
    results = pool.map(divmod, [1, 1, 1], [2, 0, 5])
    assert tuple(next(results)) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_map_has_a_timeout_that_counts_from_the_call(slow_pool: futures.Executor) -> None:
    results = slow_pool.map(calls.sleep, [0.0, 2.0], timeout=1.0)
    with pytest.raises(futures.TimeoutError):
        list(results)
    assert list(results) == []


def test_leaving_a_map_cancels_the_rest(embedded: App) -> None:
    with Executor(embedded, isolation="minimal", tags=["left"]) as executor:
        results = executor.map(calls.sleep, [0.0, *[600.0] * 50])
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]  # a generator, as in the standard library
    page = embedded.client.jobs(JobFilter(tag="left"))
    assert len(page.jobs) == 51
    assert [job.state for job in page.jobs if not job.cancel_requested] == [JobState.COMPLETED]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_map_in_chunks_makes_one_job_of_several_calls(embedded: App, size: int) -> None:
    with inline(embedded) as jobs, Executor(embedded) as executor:
        assert list(executor.map(pow, range(10), itertools.repeat(2), chunksize=size)) == [n * n for n in range(10)]
        assert list(executor.map(functools.partial(int, base=8), ["11"] * 3, chunksize=size)) == [9, 9, 9]
        assert list(executor.map(calls.double_later, range(3), chunksize=size)) == [0, 2, 4]
    assert len(jobs) == math.ceil(10 / size) + 2 * math.ceil(3 / size)


def test_a_chunk_size_below_one_is_refused(ours: Executor) -> None:
    with pytest.raises(ValueError, match="chunksize must be >= 1"):
        ours.map(abs, [1], chunksize=0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_buffer_bounds_how_far_inputs_are_taken_ahead(embedded: App, size: int) -> None:
    taken: list[int] = []

    def inputs() -> Iterator[int]:
        for number in range(10):
            taken.append(number)
            yield number

    with inline(embedded), Executor(embedded) as executor:
        results = executor.map(abs, inputs(), buffersize=size)
        assert len(taken) == min(size, 10)
        for number, value in enumerate(results):
            assert value == number
            assert len(taken) <= min(number + 1 + size, 10)


def test_a_buffer_makes_endless_inputs_possible(ours: Executor) -> None:
    results = ours.map(abs, itertools.count(), buffersize=4)
    assert list(itertools.islice(results, 9)) == list(range(9))
    results.close()  # type: ignore[attr-defined]  # a generator, as in the standard library


def test_a_wrong_buffer_is_refused_in_the_words_of_the_standard_library(ours: Executor) -> None:
    for size in ("1", 1.0):
        with pytest.raises(TypeError, match="buffersize must be an integer or None"):
            ours.map(abs, [1], buffersize=size)  # type: ignore[call-overload]  # that is the mistake
    for number in (0, -1):
        with pytest.raises(ValueError, match="buffersize must be None or > 0"):
            ours.map(abs, [1], buffersize=number)


# wait, as_completed, asyncio


def test_wait_returns_when_the_first_is_done_when_all_are_or_when_one_failed(slow_pool: futures.Executor) -> None:
    quick: futures.Future[float] = slow_pool.submit(calls.sleep, 0.0)
    slow: futures.Future[float] = slow_pool.submit(calls.sleep, 1.5)
    done, left = futures.wait([quick, slow], timeout=DEADLINE, return_when=futures.FIRST_COMPLETED)
    assert (done, left) == ({quick}, {slow})
    failed: futures.Future[float] = slow_pool.submit(calls.fail, "bread")
    done, _ = futures.wait([failed, slow], timeout=DEADLINE, return_when=futures.FIRST_EXCEPTION)
    assert failed in done
    done, left = futures.wait([quick, slow, failed], timeout=DEADLINE)
    assert (len(done), len(left)) == (3, 0)


def test_wait_sees_a_cancelled_future(embedded: App) -> None:
    with Executor(embedded, isolation="minimal", labels={"zone": "none"}) as executor:
        never = executor.submit(pow, 2, 2)
        threading.Timer(0.1, never.cancel).start()
        done, left = futures.wait([never], timeout=DEADLINE)
    assert (done, left) == ({never}, set())


def test_as_completed_gives_each_once_in_the_order_of_their_ends(slow_pool: futures.Executor) -> None:
    slow, quick = slow_pool.submit(calls.sleep, 1.5), slow_pool.submit(calls.sleep, 0.0)
    assert list(futures.as_completed([slow, quick, slow], timeout=DEADLINE)) == [quick, slow]
    with pytest.raises(futures.TimeoutError):
        list(futures.as_completed([slow_pool.submit(time.sleep, 0.5)], timeout=0))


async def test_an_event_loop_can_await_it(pool: futures.Executor) -> None:
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(pool, pow, 2, 10) == 1024
    assert await asyncio.wrap_future(pool.submit(pow, 2, 5)) == 32
    found = await asyncio.gather(*(loop.run_in_executor(pool, abs, -number) for number in range(8)))
    assert found == list(range(8))
    with pytest.raises(ValueError, match="no bread"):
        await loop.run_in_executor(pool, calls.fail, "bread")


async def test_cancelling_what_an_event_loop_awaits_cancels_the_job(ours: Executor) -> None:
    future = ours.submit(time.sleep, 600)
    waiting = asyncio.wrap_future(future)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    done, _ = await asyncio.to_thread(futures.wait, [future], DEADLINE)
    assert done == {future}
    assert future.cancelled()


# cancel


def test_a_pending_call_can_be_cancelled_and_stays_so(embedded: App) -> None:
    with futures.ThreadPoolExecutor(1) as threads, Executor(embedded, labels={"zone": "none"}) as ours:
        gate = threading.Event()
        threads.submit(gate.wait, DEADLINE)
        for executor in (threads, ours):
            future = executor.submit(pow, 2, 2)
            called: list[object] = []
            future.add_done_callback(called.append)
            assert future.cancel()
            assert future.cancel()
            assert (future.cancelled(), future.done(), future.running()) == (True, True, False)
            assert called == [future]
            with pytest.raises(futures.CancelledError):
                future.result()
            with pytest.raises(futures.CancelledError):
                future.exception()
        gate.set()


def test_a_finished_call_cannot_be_cancelled(pool: futures.Executor) -> None:
    future = pool.submit(pow, 2, 2)
    assert future.result(DEADLINE) == 4
    assert not future.cancel()
    assert future.result() == 4


def test_cancelling_a_running_job_ends_it(ours: Executor) -> None:
    """A thread cannot be ended: here the oracle only says no."""
    future = ours.submit(time.sleep, 600)
    while not future.running():
        time.sleep(0.01)  # nothing rings when a worker starts a job
    assert future.cancel()
    deadline = time.monotonic() + DEADLINE
    while not future.handle.done():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # nor when it ends: this future has its end already
    assert future.handle.state() is JobState.CANCELLED


def test_a_job_that_somebody_else_cancels_is_a_cancelled_future(ours: Executor, embedded: App) -> None:
    future = ours.submit(time.sleep, 600)
    embedded.handle(future.job_id).cancel()
    with pytest.raises(futures.CancelledError):
        future.result(DEADLINE)


# what only jobs have


def test_every_future_knows_its_durable_job(ours: Executor, embedded: App) -> None:
    future = ours.submit(pow, 2, 6)
    assert isinstance(future, JobFuture)
    assert future.job_id == future.handle.id
    assert future.result(DEADLINE) == 64
    assert embedded.handle(future.job_id).result(DEADLINE) == 64
    assert future.handle.detail().name == "suite.pow"


def test_an_error_has_the_remote_traceback(ours: Executor) -> None:
    error = ours.submit(calls.fail, "bread").exception(DEADLINE)
    assert isinstance(error, JobFailed)
    assert isinstance(error, ValueError)
    assert error.traceback is not None
    assert "sdk_calls.py" in error.traceback
    assert error.traceback in str(error)


def test_options_are_those_of_the_executor_and_a_job_function_keeps_its_own(embedded: App) -> None:
    declared = embedded.job(priority=9, timeout=7)(calls.slow_double)
    with inline(embedded) as jobs, Executor(embedded, priority=3, retry=RetryPolicy(retries=1)) as executor:
        assert executor.submit(calls.slow_double, 1).result() == 2
        assert executor.submit(declared, 2).result() == 4
        assert executor.submit(declared.options(priority=8), 2).result() == 4
    assert [job.options.priority for job in jobs] == [3, 9, 8]
    assert [job.options.timeout for job in jobs] == [None, 7.0, 7.0]


def test_pickle_carries_any_object(embedded: App) -> None:
    with inline(embedded), Executor(embedded, encoding="pickle") as executor:
        assert executor.submit(divmod, 7, 2).result() == (3, 1)
        assert executor.submit(calls.Counter(3).add, 4).result() == 7
        assert list(executor.map(complex, [1, 2], [3, 4])) == [1 + 3j, 2 + 4j]


def test_what_a_worker_could_not_find_is_refused_at_once(ours: Executor) -> None:
    def inner() -> None: ...

    with pytest.raises(InvalidRequest, match="lambda"):
        ours.submit(lambda: 1)
    with pytest.raises(InvalidRequest, match="defined inside"):
        ours.submit(inner)
    with pytest.raises(InvalidRequest, match="cannot be called"):
        ours.submit(3)  # type: ignore[call-overload]  # that is the mistake
    with pytest.raises(InvalidRequest, match="not the function that was passed"):
        ours.submit(calls.HIDDEN, 3)
    with pytest.raises(InvalidRequest, match=r"argument 0 .*Counter"):
        ours.submit(calls.Counter(3).add, 4)
    with pytest.raises(InvalidRequest) as caught:
        Executor(retrys=3)  # type: ignore[call-arg]  # that is the mistake
    assert caught.value.field == "retrys"


def test_closing_the_app_ends_the_wait_with_an_error_and_leaves_the_jobs(tmp_path: Path) -> None:
    app = App("suite", data_dir=tmp_path)
    executor = Executor(app, isolation="minimal")
    never = app.job(isolation="minimal", labels={"zone": "none"})(calls.sleep)
    future = executor.submit(never, 0.0)
    app.close()
    with pytest.raises(InvalidRequest, match="the app was closed"):
        future.result(DEADLINE)
    try:
        assert not app.handle(future.job_id).done()
        assert executor.submit(pow, 2, 2).result(DEADLINE) == 4
        executor.shutdown()
    finally:
        app.close()


def test_without_an_app_it_opens_one_by_the_configuration_and_closes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIXARD_STORAGE__DATA_DIR", str(tmp_path / "data"))
    with Executor(isolation="minimal") as executor:
        assert executor.submit(pow, 2, 3).result(DEADLINE) == 8
    assert not list((tmp_path / "data" / "submitters").iterdir())


def test_thousands_of_futures_are_given_their_results(embedded: App) -> None:
    total = 12_000
    with Executor(embedded, isolation="minimal") as executor:
        assert sum(executor.map(abs, range(total))) == sum(range(total))

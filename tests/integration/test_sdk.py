"""The SDK with real workers: embedded, and against a server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from blixard import App, JobCancelled, JobFailed, JobState, JobTimedOut, RetryPolicy, WaitTimedOut
from blixard.domain.limits import MAX_ARGUMENTS_BYTES, MAX_INLINE_ARGUMENTS_BYTES, MAX_INLINE_RESULT_BYTES
from blixard.errors import InvalidRequest, LimitExceeded
from tests.integration import sdk_jobs as jobs
from tests.integration.serve_rig import running

DEADLINE = 90.0
ENCODINGS = ("json", "msgpack", "pickle")
WAYS = ("embedded", "server")


@contextlib.contextmanager
def leaving_nothing() -> Iterator[contextlib.ExitStack]:
    """Yield a stack of apps to close; a process that is left behind then is a failure."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with contextlib.ExitStack() as stack:
        yield stack
    children = psutil.Process().children(recursive=True)
    _, left = psutil.wait_procs([child for child in children if child.pid not in before], timeout=DEADLINE)
    assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []


def open_app(stack: contextlib.ExitStack, way: str, directory: Path) -> App:
    """Return an app with workers of its own."""
    if way == "server":
        server = stack.enter_context(running(directory, worker=True))
        app = App("suite", server=server.url)
    else:
        app = App("suite", data_dir=directory)
    stack.callback(app.close)
    return app


@pytest.fixture(scope="module", params=WAYS)
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with leaving_nothing() as stack:
        yield open_app(stack, request.param, tmp_path_factory.mktemp("data"))


def test_a_job_runs_and_returns_its_value(app: App) -> None:
    add = app.job(isolation="minimal")(jobs.add)
    handle = add.submit(2, b=3)
    assert handle.result(timeout=DEADLINE) == 5
    assert (handle.state(), handle.done()) == (JobState.COMPLETED, True)
    assert handle.detail().name == "suite.add"
    assert add(2, b=3) == 5


def test_without_options_a_job_runs_in_the_sandbox(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP", "mine")
    see = app.job(jobs.see)
    seen = see.submit(__file__).result(timeout=DEADLINE)
    assert (seen["exists"], seen["directory"], seen["variable"]) == (False, "/work", None)
    processes = seen["processes"]
    assert isinstance(processes, int)
    assert processes < 5
    assert see.options(env={"SHOP": "open"}).submit(__file__).result(timeout=DEADLINE)["variable"] == "open"


def test_a_failing_job_shows_its_own_traceback_and_no_frame_of_ours(app: App) -> None:
    for isolation in ("minimal", "standard"):
        handle = app.job(isolation=isolation)(jobs.fail).submit("bread")
        with pytest.raises(JobFailed, match="ValueError: no bread today") as caught:
            handle.result(timeout=DEADLINE)
        trace = caught.value.traceback or ""
        frames = [line for line in trace.splitlines() if line.lstrip().startswith("File ")]
        assert len(frames) == 2, trace
        assert all("sdk_jobs.py" in frame for frame in frames), trace
        assert trace in str(caught.value)
        assert caught.value.exit_code == 1
        assert caught.value.job_id == handle.id


def test_an_exit_code_is_told(app: App) -> None:
    with pytest.raises(JobFailed) as caught:
        app.job(isolation="minimal")(jobs.end_with).submit(7).result(timeout=DEADLINE)
    assert caught.value.exit_code == 7


def test_a_timeout_ends_the_job(app: App) -> None:
    with pytest.raises(JobTimedOut):
        app.job(isolation="minimal", timeout=0.5)(jobs.sleep).submit(600).result(timeout=DEADLINE)


def test_a_cancelled_job_raises_for_whoever_waits(app: App) -> None:
    handle = app.job(isolation="minimal")(jobs.sleep).submit(600)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(handle.result, DEADLINE)
        handle.cancel()
        with pytest.raises(JobCancelled):
            waiting.result(DEADLINE)


def test_a_failed_attempt_is_tried_again(app: App) -> None:
    policy = RetryPolicy(retries=2, delay=0.05, jitter=0)
    handle = app.job(isolation="minimal", retry=policy)(jobs.fail_until_third).submit()
    assert handle.result(timeout=DEADLINE) == 3
    assert [attempt.attempt for attempt in handle.detail().attempts] == [1, 2, 3]


def test_waiting_can_end_before_the_job(app: App) -> None:
    handle = app.job(isolation="minimal")(jobs.sleep).submit(600)
    with pytest.raises(WaitTimedOut, match="it goes on"):
        handle.result(timeout=0.2)
    assert not handle.done()
    handle.cancel()


def test_why_tells_of_labels_that_nobody_has(app: App) -> None:
    handle = app.job(isolation="minimal", labels={"zone": "nowhere"})(jobs.add).submit(1)
    with pytest.raises(WaitTimedOut):
        handle.result(timeout=1.0)
    assert "zone" in "".join(f"{reason.text} {reason.unblock}" for reason in handle.why().reasons)
    assert handle.cancel() is JobState.CANCELLED


async def test_an_event_loop_stays_free_while_it_waits(app: App) -> None:
    ticks = 0
    job = app.job(isolation="minimal")(jobs.sleep)
    handle = await job.submit_async(1.0)
    waiting = asyncio.create_task(handle.result_async(timeout=DEADLINE))
    while not waiting.done():
        ticks += 1
        await asyncio.sleep(0.01)  # sleep: this is the loop that must go on turning
    assert await waiting == "slept"
    assert ticks > 10


async def test_cancelling_the_wait_leaves_the_job(app: App) -> None:
    handle = await app.job(isolation="minimal")(jobs.sleep).submit_async(600)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await handle.result_async()
    assert not handle.done()
    handle.cancel()


def test_a_map_of_thousands(app: App) -> None:
    total = 3_000
    add = app.job(isolation="minimal")(jobs.add)
    assert list(add.map(range(total))) == list(range(1, total + 1))
    assert sorted(add.map(range(500), ordered=False)) == list(range(1, 501))


def test_a_map_in_the_sandbox(app: App) -> None:
    assert list(app.job(jobs.add).map(range(10))) == list(range(1, 11))


def test_a_map_resumes_what_was_left(app: App) -> None:
    add = app.job(isolation="minimal", name="resumed")(jobs.add)
    first = add.map(range(50), resume=True)
    assert next(first) == 1
    first.close()  # type: ignore[attr-defined]  # a generator, of which the signature promises less
    assert list(add.map(range(50), resume=True)) == list(range(1, 51))
    ids = [job.id for job in app.client.jobs(limit=1000).jobs if job.name == "resumed"]
    assert len(ids) == len(set(ids)) == 50


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings_carry_values_both_ways(app: App, encoding: str) -> None:
    value = {"text": "zäh", "numbers": [1, -2.5, None, True], "nested": {"a": {"b": []}}}
    assert app.job(isolation="minimal", encoding=encoding)(jobs.identity).submit(value).result(DEADLINE) == value


def test_bytes_travel_in_msgpack_and_any_object_in_pickle(app: App) -> None:
    packed = app.job(isolation="minimal", encoding="msgpack")(jobs.identity).submit(b"\0\xff")
    assert packed.result(DEADLINE) == b"\0\xff"
    pickled = app.job(isolation="minimal", encoding="pickle")(jobs.identity).submit({1, 2, 3j})
    assert pickled.result(DEADLINE) == {1, 2, 3j}
    assert app.handle(pickled.id, encoding="pickle").result(DEADLINE) == {1, 2, 3j}


def test_a_result_that_json_cannot_hold_is_an_error_and_no_other_value(app: App) -> None:
    for function, words in ((jobs.unwritable, "object"), (jobs.lost_number, "NaN")):
        with pytest.raises(JobFailed, match=rf"ResultNotSerializable.*{words}"):
            app.job(isolation="minimal")(function).submit().result(DEADLINE)


def test_a_coroutine_function_is_awaited_in_the_job(app: App) -> None:
    job = app.job(isolation="minimal")(jobs.double_later)
    assert asyncio.run(job(4)) == 8
    handle: object = job.submit(21).result(DEADLINE)
    assert handle == 42


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_arguments_and_results_larger_than_a_row(app: App, encoding: str) -> None:
    job = app.job(isolation="minimal", encoding=encoding)
    size = MAX_INLINE_ARGUMENTS_BYTES + 1
    handle = job(jobs.measure).submit("x" * size)
    assert handle.result(DEADLINE) == size
    assert handle.detail().arguments_blob is not None
    for size in (MAX_INLINE_RESULT_BYTES + 1, 5_000_000):
        assert job(jobs.make_text).submit(size).result(DEADLINE) == "x" * size


def test_a_map_of_large_arguments(app: App) -> None:
    texts = ["x" * (MAX_INLINE_ARGUMENTS_BYTES + number) for number in range(100)]
    assert list(app.job(isolation="minimal")(jobs.measure).map(texts)) == [len(text) for text in texts]


def test_what_cannot_be_sent_is_refused_before_anything_is_stored(app: App) -> None:
    measure = app.job(isolation="minimal", name="refused")(jobs.measure)
    with pytest.raises(LimitExceeded, match="MAX_ARGUMENTS_BYTES"):
        measure.submit("x" * MAX_ARGUMENTS_BYTES)
    with pytest.raises(InvalidRequest, match=r"argument 0 \(object\)"):
        measure.submit(object())  # type: ignore[arg-type]  # that is the mistake
    assert "refused" not in {job.name for job in app.client.jobs().jobs}


def test_threads_share_an_app(app: App) -> None:
    add = app.job(isolation="minimal")(jobs.add)

    def work(number: int) -> list[int]:
        single = add.submit(number).result(DEADLINE)
        return [single, *add.map([number, number + 1])]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(16)))
    assert found == [[number + 1, number + 1, number + 2] for number in range(16)]


def test_a_grant_that_is_missing_is_named(app: App, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = Path("/var/tmp") / tmp_path_factory.mktemp("shop").name
    directory.mkdir()
    try:
        file = directory / "data.txt"
        file.write_text("bread")
        directory.chmod(0o755)
        read = app.job(jobs.read)
        with pytest.raises(JobFailed, match="FileNotFoundError") as caught:
            read.submit(str(file)).result(DEADLINE)
        assert "--allow-read" in (caught.value.hint or "")
        assert read.options(allow_read=[directory]).submit(str(file)).result(DEADLINE) == "bread"
    finally:
        (directory / "data.txt").unlink()
        directory.rmdir()


def test_many_apps_at_once(tmp_path: Path) -> None:
    """Each with a directory and a worker of its own; one that is closed opens again."""
    with leaving_nothing() as stack:
        apps = [open_app(stack, "embedded", tmp_path / str(number)) for number in range(3)]
        adders = [app.job(isolation="minimal")(jobs.add) for app in apps]
        handles = [add.submit(number) for number, add in enumerate(adders)]
        assert [handle.result(DEADLINE) for handle in handles] == [1, 2, 3]
        apps[0].close()
        assert adders[0].submit(5).result(DEADLINE) == 6
        assert handles[0].result(DEADLINE) == 1


def test_two_apps_share_a_directory(tmp_path: Path) -> None:
    with leaving_nothing() as stack:
        one, other = (open_app(stack, "embedded", tmp_path) for _ in range(2))
        handle = one.job(isolation="minimal")(jobs.add).submit(1)
        assert other.job(isolation="minimal")(jobs.add).submit(2).result(DEADLINE) == 3
        assert handle.result(DEADLINE) == 2
        assert other.handle(handle.id).result(DEADLINE) == 2


def test_no_thread_is_left_when_an_app_is_closed(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with leaving_nothing() as stack:
        app = open_app(stack, "embedded", tmp_path)
        assert app.job(isolation="minimal")(jobs.add).submit(1).result(DEADLINE) == 2
    for thread in set(threading.enumerate()) - before:
        thread.join(DEADLINE)
    assert set(threading.enumerate()) - before == set()

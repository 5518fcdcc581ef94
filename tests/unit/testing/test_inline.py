"""``inline`` and ``submitted``: the tests that users write, and what these promise."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from blixard import Executor, JobFailed, JobState, RetryPolicy, as_completed, gather
from blixard.domain.limits import MAX_INLINE_ARGUMENTS_BYTES, MAX_INLINE_RESULT_BYTES
from blixard.errors import InvalidRequest, ServerUnreachable
from blixard.testing import FakeClock, inline, submitted
from tests.unit.testing import shop


def test_a_job_has_run_when_submit_returns() -> None:
    with inline(shop.app) as jobs:
        handle = shop.send.submit("a@b")
        assert handle.state() is JobState.COMPLETED
        assert handle.result() == "hello to a@b"
    assert len(jobs) == 1


def test_it_runs_in_the_thread_that_submits_with_its_variables() -> None:
    with inline(shop.app):
        handle = shop.where.submit()
        assert handle.result() == [threading.current_thread().name, os.getpid(), "nobody", handle.id]
        assert shop.environment.submit().result() == ["test", "1", "default"]
    assert "BLIXARD_JOB_ID" not in os.environ
    assert "MODE" not in os.environ


def test_what_a_test_replaces_is_replaced_in_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.testing.shop.os.getpid", lambda: 42)
    token = shop.visitor.set("me")
    try:
        with inline(shop.app):
            assert shop.where.submit().result()[1:3] == [42, "me"]
    finally:
        shop.visitor.reset(token)


def test_values_travel_as_they_do_in_reality() -> None:
    with inline(shop.app) as jobs:
        assert shop.place.submit(shop.Order(3, ("bread",))).result() == {"id": 3, "items": ["bread"]}
        assert shop.double_set.submit({1, 2}).result() == {2, 4}
        with pytest.raises(InvalidRequest, match=r"argument 0 \(set\)"):
            shop.double_set.options(encoding="msgpack").submit({object()})  # type: ignore[arg-type]  # that is the mistake
        with pytest.raises(JobFailed, match="ResultNotSerializable"):
            shop.unwritable.submit().result()
        size = max(MAX_INLINE_ARGUMENTS_BYTES, MAX_INLINE_RESULT_BYTES) + 1
        assert shop.text_of.submit(size).result() == "x" * size
        shop.send.submit("@" * size)
    assert jobs[-1].args == ("@" * size,)


def test_a_failed_job_raises_what_it_raises_in_reality() -> None:
    with inline(shop.app) as jobs:
        handle = shop.send.submit("nowhere")
        with pytest.raises(JobFailed, match="ValueError: nowhere is no address") as caught:
            handle.result()
        assert (handle.state(), caught.value.exit_code, caught.value.job_id) == (JobState.FAILED, 1, handle.id)
        trace = caught.value.traceback or ""
        frames = [line for line in trace.splitlines() if line.lstrip().startswith("File ")]
        assert len(frames) == 1
        assert "shop.py" in frames[0]
        assert "During handling" not in trace
        assert [attempt.attempt for attempt in handle.detail().attempts] == [1, 2, 3]
        assert jobs.clock.monotonic() == pytest.approx(60 + 120, abs=0.01)


def test_retries_move_the_clock_instead_of_waiting() -> None:
    clock = FakeClock()
    with inline(shop.app, clock=clock):
        policy = RetryPolicy(retries=5, delay=200, factor=1, jitter=0)
        assert shop.steady_third.options(retry=policy).submit().result() == 3
    assert clock.monotonic() == pytest.approx(400, abs=0.01)


def test_every_way_to_submit_works() -> None:
    with inline(shop.app) as jobs:
        assert list(shop.later.map(range(30))) == list(range(1, 31))
        assert list(shop.later.map(iter(range(30)), max_in_flight=4)) == list(range(1, 31))
        assert gather(*(shop.later.submit(number) for number in range(3))) == [1, 2, 3]
        assert len(list(as_completed([shop.later.submit(number) for number in range(3)]))) == 3
        with Executor(shop.app) as executor:
            assert executor.submit(shop.later, 4).result() == 5
            assert list(executor.map(pow, [2, 3], [3, 2])) == [8, 9]
        assert shop.both.submit("a@b").result() == ["hello to a@b", "again to a@b"]
    assert len(jobs) == 30 + 30 + 3 + 3 + 1 + 2 + 3


async def test_in_an_event_loop_too() -> None:
    with inline(shop.app):
        handles = await asyncio.gather(*(shop.later.submit_async(number) for number in range(5)))
        assert [await handle.result_async() for handle in handles] == [1, 2, 3, 4, 5]
        assert shop.later.submit(9).result() == 10
        assert [value async for value in shop.later.map_async(range(5), max_in_flight=2)] == [1, 2, 3, 4, 5]


def test_placement_grants_and_isolation_do_not_matter() -> None:
    with inline(shop.app) as jobs:
        far = shop.later.options(labels={"zone": "moon"}, cpus=64, memory_mb=100_000, isolation="maximum", queue="far")
        assert far.submit(1).result() == 2
        assert shop.later.submit(2).result() == 3
    assert jobs[0].options.labels == {"zone": "moon"}


def test_input_files_lie_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("bread")
    here = Path.cwd()
    with inline(shop.app):
        job = shop.read.options(input={"in/note.txt": tmp_path / "note.txt"})
        assert job.submit("in/note.txt").result() == "bread"
        assert list(job.map(["in/note.txt"])) == ["bread"]
    assert Path.cwd() == here


def test_nothing_is_left_and_the_app_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BLIXARD_STORAGE__DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    before = set(threading.enumerate())
    with inline(shop.app):
        shop.send.submit("a@b")
    assert list(tmp_path.iterdir()) == []
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) - before == set()
    with pytest.raises(ServerUnreachable):
        shop.send.submit("a@b")


def test_it_may_be_nested_and_each_has_its_own_jobs() -> None:
    with inline(shop.app) as outer:
        shop.later.submit(1)
        with submitted(shop.app) as inner:
            shop.later.submit(2)
        assert shop.later.submit(3).result() == 4
    assert [job.args for job in outer] == [(1,), (3,)]
    assert [job.args for job in inner] == [(2,)]


def test_what_reality_refuses_is_refused() -> None:
    @shop.app.job
    def inner() -> None: ...

    with inline(shop.app), pytest.raises(InvalidRequest, match="defined inside of a function"):
        inner.submit()


def test_submissions_are_recorded_with_arguments_and_options() -> None:
    with submitted(shop.app) as jobs:
        handle = shop.send.options(priority=5).submit("a@b", subject="hi")
        assert handle.state() is JobState.PENDING
    assert (len(jobs), jobs[0].id, jobs[0].args, jobs[0].kwargs) == (1, handle.id, ("a@b",), {"subject": "hi"})
    options = jobs[0].options
    assert (options.priority, options.queue, options.timeout, options.tags) == (5, "mail", 30.0, ("mail",))
    assert options.retry.retries == 2
    assert (options.name, str(jobs[0])) == ("shop.send", "send('a@b', subject='hi')")
    assert repr(jobs) == "<submissions: send('a@b', subject='hi')>"


def test_assert_submitted_finds_the_call_however_it_was_written() -> None:
    with submitted(shop.app) as jobs:
        shop.later.submit(1)
        shop.send.submit("a@b")
        shop.place.submit(shop.Order(3, ("bread",)))
    assert jobs.assert_submitted(shop.send, address="a@b") is jobs[1]
    assert jobs.assert_submitted(shop.send, "a@b", "hello") is jobs[1]
    assert jobs.assert_submitted(shop.place, shop.Order(3, ("bread",))) is jobs[2]
    assert jobs.of(shop.later) == [jobs[0]]
    jobs.assert_not_submitted(shop.read)
    with pytest.raises(AssertionError, match=r"send\('b@c'\) was not submitted; submitted were\n  later\(1\)"):
        jobs.assert_submitted(shop.send, "b@c")
    with pytest.raises(AssertionError, match=r"later\(1\) was submitted"):
        jobs.assert_not_submitted(shop.later)
    with submitted(shop.app) as none, pytest.raises(AssertionError, match="nothing was"):
        none.assert_submitted(shop.send, "a@b")


def test_recorded_jobs_run_nothing_and_waiting_for_one_is_refused_at_once() -> None:
    with submitted(shop.app) as jobs:
        handle = shop.send.submit("a@b")
        with pytest.raises(InvalidRequest, match="recorded and not run") as caught:
            handle.result()
        assert "inline(app)" in (caught.value.hint or "")
        with pytest.raises(InvalidRequest, match="recorded and not run"):
            gather(handle)
        with pytest.raises(InvalidRequest, match="recorded and not run"):
            list(shop.later.map(range(3)))
        assert handle.cancel() is JobState.CANCELLED
    assert len(jobs) == 4

"""Waiting for several handles, on a client whose jobs end when the test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence

import msgspec
import pytest

from blixard import (
    App,
    JobFailed,
    JobHandle,
    WaitTimedOut,
    as_completed,
    as_completed_async,
    gather,
    gather_async,
)
from blixard.client.blocking import Client
from blixard.domain.outcome import OutcomeKind
from blixard.domain.state_machine import JobState
from blixard.errors import InvalidRequest, JobNotFound, ServerUnreachable
from blixard.protocol.jobs import JobResult, WaitReply
from blixard.sdk.waiting import MAX_GROUP, MAX_GROUPS
from tests.unit.cli.fake_client import FakeClient
from tests.unit.sdk import jobs
from tests.unit.sdk.conftest import Store

DEADLINE = 60.0


class Steered(FakeClient):
    """Ends a job when ``end`` is called, from any thread. ``away`` makes it unreachable for so many waits."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, store.run)
        self.results: dict[str, JobResult] = {}
        self.asked: list[list[str]] = []
        self.away = 0
        self.is_parked = threading.Event()
        self._changed = asyncio.Event()

    async def wait(self, ids: Sequence[str], *, wait: float) -> WaitReply:
        assert 1 <= len(ids) <= MAX_GROUP
        self.asked.append(list(ids))
        if self.away:
            self.away -= 1
            raise ServerUnreachable("no answer")
        if unknown := [job_id for job_id in ids if job_id not in self.store.jobs]:
            return WaitReply(ended=[], unknown=unknown)
        while wait > 0 and not self.results.keys() & set(ids):
            self.is_parked.set()
            await self._changed.wait()
        return WaitReply(ended=[self.results[job_id] for job_id in ids if job_id in self.results])

    async def ring(self, results: Sequence[JobResult]) -> None:
        self.results.update({result.id: result for result in results})
        self._changed.set()
        self._changed = asyncio.Event()


def completed(job_id: str, value: object) -> JobResult:
    result = msgspec.Raw(msgspec.json.encode(value))
    return JobResult(id=job_id, state=JobState.COMPLETED, outcome=OutcomeKind.COMPLETED, exit_code=0, result=result)


def failed(job_id: str) -> JobResult:
    return JobResult(id=job_id, state=JobState.FAILED, outcome=OutcomeKind.FAILED, exit_code=3)


@pytest.fixture
def client(store: Store) -> Steered:
    return Steered(store)


End = Callable[..., None]


@pytest.fixture
def end(app: App, client: Steered) -> End:
    """Let jobs end, in one go."""

    def act(*results: JobResult) -> None:
        app.client.call(lambda _: client.ring(results))

    return act


@pytest.fixture
def handles(app: App) -> list[JobHandle[int]]:
    add = app.job(jobs.add)
    return [add.submit(number) for number in range(3)]


def test_handles_come_in_the_order_of_their_ends(handles: list[JobHandle[int]], end: End) -> None:
    found = as_completed(handles, timeout=DEADLINE)
    end(completed(handles[2].id, 30))
    assert next(found) is handles[2]
    end(completed(handles[0].id, 10))
    assert next(found) is handles[0]
    end(failed(handles[1].id))
    assert list(found) == [handles[1]]
    assert handles[2].result() == 30
    with pytest.raises(JobFailed):
        handles[1].result()


def test_none_are_none(app: App) -> None:
    assert list(as_completed([])) == []
    assert gather() == []


def test_a_handle_given_twice_comes_once_and_two_handles_of_a_job_both(
    app: App, handles: list[JobHandle[int]], end: End
) -> None:
    other = app.handle(handles[0].id)
    end(completed(handles[0].id, 1))
    assert list(as_completed([handles[0], handles[0], other])) == [handles[0], other]
    assert gather(handles[0], handles[0]) == [1, 1]


def test_gather_returns_in_the_order_of_its_arguments(handles: list[JobHandle[int]], end: End) -> None:
    for place in (2, 0, 1):
        end(completed(handles[place].id, place))
    assert gather(*handles, timeout=DEADLINE) == [0, 1, 2]


def test_gather_raises_at_the_first_failure_without_waiting_for_the_rest(
    handles: list[JobHandle[int]], end: End
) -> None:
    end(failed(handles[1].id))
    with pytest.raises(JobFailed, match="exit code 3"):
        gather(*handles, timeout=DEADLINE)


def test_gather_may_put_errors_among_the_results(handles: list[JobHandle[int]], end: End) -> None:
    end(completed(handles[0].id, 5), failed(handles[1].id), completed(handles[2].id, 7))
    first, second, third = gather(*handles, return_exceptions=True)
    assert (first, type(second), third) == (5, JobFailed, 7)


def test_a_timeout_ends_the_wait_and_leaves_the_jobs(handles: list[JobHandle[int]], end: End) -> None:
    end(completed(handles[0].id, 1))
    with pytest.raises(WaitTimedOut, match=r"2 jobs have not ended after 0\.2 s"):
        gather(*handles, timeout=0.2)
    found = as_completed(handles, timeout=0)
    assert next(found) is handles[0]
    with pytest.raises(WaitTimedOut):
        next(found)
    with pytest.raises(InvalidRequest, match="timeout is -1"):
        as_completed(handles, timeout=-1)


def test_only_handles_of_one_app_can_be_waited_for_together(
    app: App, handles: list[JobHandle[int]], store: Store
) -> None:
    with Client(lambda: Steered(store)) as client:
        stranger = App("other", client=client).handle(handles[0].id)
        with pytest.raises(InvalidRequest, match="different apps"):
            gather(handles[0], stranger)
    with pytest.raises(InvalidRequest, match="no job handle"):
        as_completed([3])  # type: ignore[arg-type]  # that is the mistake


def test_an_unknown_job_is_told(app: App) -> None:
    with pytest.raises(JobNotFound, match="job_nowhere"):
        gather(app.handle("job_nowhere"))


@pytest.mark.parametrize("total", [MAX_GROUP, MAX_GROUP + 1, MAX_GROUP * MAX_GROUPS + 1])
def test_more_jobs_than_a_request_can_name_are_waited_for(app: App, client: Steered, end: End, total: int) -> None:
    add = app.job(jobs.add)
    handles = list(map(app.handle, app.client.call(lambda c: add.template.submit(c, [b"[[1],{}]"] * total))))
    found = as_completed(handles, timeout=DEADLINE)
    end(completed(handles[0].id, 0))
    assert next(found) is handles[0]
    assert len({tuple(ids) for ids in client.asked}) >= min(-(-total // MAX_GROUP), MAX_GROUPS)
    end(*(completed(handle.id, 1) for handle in handles[1:]))
    assert len(list(found)) == total - 1


def test_a_server_that_is_away_for_a_while_is_waited_for(
    handles: list[JobHandle[int]], client: Steered, end: End
) -> None:
    client.away = 2
    end(*(completed(handle.id, 1) for handle in handles))
    assert gather(*handles, timeout=DEADLINE) == [1, 1, 1]
    assert client.away == 0


def test_closing_the_app_ends_the_wait(app: App, handles: list[JobHandle[int]], client: Steered) -> None:
    errors: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(InvalidRequest, match="the app was closed") as caught:
            gather(*handles)
        errors.append(caught.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert client.is_parked.wait(DEADLINE)
    app.close()
    waiting.join(DEADLINE)
    assert len(errors) == 1


async def test_the_same_in_an_event_loop(app: App, client: Steered) -> None:
    add = app.job(jobs.add)
    handles = [await add.submit_async(number) for number in range(3)]
    found = as_completed_async(handles, timeout=DEADLINE)
    await app.client.call_async(lambda _: client.ring([completed(handles[1].id, 1)]))
    assert await anext(found) is handles[1]
    await app.client.call_async(lambda _: client.ring([completed(handles[n].id, n) for n in (0, 2)]))
    assert {handle.id async for handle in found} == {handles[0].id, handles[2].id}
    assert await gather_async(*handles) == [0, 1, 2]
    assert [await handle.result_async() for handle in handles] == [0, 1, 2]
    with pytest.raises(WaitTimedOut):
        await gather_async(await add.submit_async(9), timeout=0.1)


async def test_cancelling_the_wait_in_an_event_loop_leaves_the_client_usable(app: App, client: Steered) -> None:
    handle = await app.job(jobs.add).submit_async(1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await gather_async(handle)
    await app.client.call_async(lambda _: client.ring([completed(handle.id, 2)]))
    assert await gather_async(handle) == [2]


def test_retrying_a_job_forgets_its_end(app: App, client: Steered, end: End) -> None:
    handle = app.job(jobs.add).submit(1)
    end(failed(handle.id))
    assert isinstance(gather(handle, return_exceptions=True)[0], JobFailed)
    client.store.jobs[handle.id].state = JobState.FAILED
    handle.retry()
    assert handle.result() == 2


def test_a_generator_may_be_the_handles(handles: list[JobHandle[int]], end: End) -> None:
    def given() -> Iterator[JobHandle[int]]:
        yield from handles

    end(*(completed(handle.id, 1) for handle in handles))
    assert len(list(as_completed(given()))) == 3

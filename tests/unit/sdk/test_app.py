from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pytest

import blixard
from blixard import App, JobFailed
from blixard.client.blocking import Client
from blixard.domain.state_machine import JobState
from blixard.errors import ConfigError, InvalidRequest, InvalidTransition, JobNotFound
from tests.unit.cli.fake_client import FakeClient
from tests.unit.sdk import jobs
from tests.unit.sdk.conftest import Store


def test_a_job_is_still_the_function_that_it_was(app: App, client: FakeClient) -> None:
    add = app.job(jobs.add)
    assert add(2, b=3) == 5
    assert (add.__name__, add.__doc__, add.__module__) == ("add", "Return the sum.", jobs.__name__)
    assert inspect.signature(add) == inspect.signature(jobs.add)
    assert repr(add) == "<job function shop.add>"
    assert client.requests == []


def test_submit_returns_a_handle_whose_result_is_the_value(app: App, client: FakeClient) -> None:
    handle = app.job(jobs.add).submit(2, b=3)
    assert handle.result() == 5
    assert (handle.state(), handle.done()) == (JobState.COMPLETED, True)
    assert handle.detail().name == "shop.add"
    assert repr(handle) == f"<job {handle.id}>"
    assert app.handle(handle.id).result() == 5


async def test_the_same_in_an_event_loop(app: App) -> None:
    add = app.job(jobs.add)
    handles = await asyncio.gather(*(add.submit_async(number) for number in range(10)))
    assert await asyncio.gather(*(handle.result_async() for handle in handles)) == list(range(1, 11))


def test_a_failed_job_raises_with_all_that_is_known(app: App) -> None:
    with pytest.raises(JobFailed) as caught:
        app.job(jobs.fail_on_odd).submit(3).result()
    assert (caught.value.exit_code, caught.value.hint) == (1, "take even ones")
    assert "ValueError: 3 is odd" in str(caught.value)


def test_a_pending_job_can_be_cancelled_and_retried(app: App, client: FakeClient) -> None:
    client.left = 0
    handle = app.job(jobs.add).submit(1)
    assert not handle.done()
    assert handle.cancel() is JobState.CANCELLED
    assert handle.retry() is JobState.PENDING
    client.left = None
    assert handle.result() == 2
    with pytest.raises(InvalidTransition):
        handle.retry()


def test_first_calls_of_many_threads_open_one_client(store: Store) -> None:
    opened: list[FakeClient] = []

    class Slow(FakeClient):
        async def __aenter__(self) -> Self:
            opened.append(self)
            await asyncio.sleep(0)  # sleep: lets the other first calls in
            return self

    with Client(lambda: Slow(store, store.run)) as client:
        client.close()
        opened.clear()
        add = App("shop", client=client).job(jobs.add)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda number: add.submit(number).result(), range(32))) == list(range(1, 33))
    assert len(opened) == 1


def test_an_unknown_id_is_told(app: App) -> None:
    with pytest.raises(JobNotFound, match="job_nowhere"):
        app.handle("job_nowhere").result()
    with pytest.raises(InvalidRequest, match="yaml") as caught:
        app.handle("job_nowhere", encoding="yaml")
    assert "msgpack" in (caught.value.hint or "")


def test_code_is_uploaded_once(app: App, client: FakeClient, store: Store) -> None:
    add = app.job(jobs.add)
    for number in range(3):
        add.submit(number)
    assert len(store.blobs) == len(client.uploads) == 1


@pytest.mark.parametrize("name", ["", "a\nb"])
def test_an_app_needs_a_name(name: str) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        App(name)


def test_a_function_inside_of_another_is_refused_with_the_way_out(app: App) -> None:
    @app.job
    def inner() -> None: ...

    with pytest.raises(InvalidRequest, match="defined inside of a function") as caught:
        inner.submit()
    assert "top level" in (caught.value.hint or "")
    with pytest.raises(InvalidRequest, match="lambda"):
        app.job(lambda: 1).submit()


def test_a_wrong_setting_is_told_at_the_first_use_and_not_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIXARD_WORKER__SLOTS", "many")
    app = App("shop")
    with pytest.raises(ConfigError, match="BLIXARD_WORKER__SLOTS"):
        app.job(jobs.add).submit(1)


def test_closing_twice_and_before_use_is_allowed(tmp_path: Path) -> None:
    app = App("shop", data_dir=tmp_path / "data")
    app.close()
    app.close()
    assert not (tmp_path / "data").exists()


def test_importing_the_package_or_declaring_jobs_loads_no_store_and_no_server_code() -> None:
    program = (
        "import sys, blixard\n"
        "light = set(sys.modules)\n"
        "assert not {'msgspec', 'apsw', 'httpx', 'litestar', 'asyncio'} & light, light\n"
        "app = blixard.App('x')\n"
        "def f(): pass\n"
        "app.job(f)\n"
        "assert not {'apsw', 'httpx', 'litestar', 'wasmtime'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_every_public_name_is_there_and_no_other() -> None:
    assert sorted(blixard.__all__) == blixard.__all__
    assert {name for name in blixard.__all__ if getattr(blixard, name) is None} == set()
    assert set(dir(blixard)) == {*blixard.__all__, "__version__"}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = blixard.nonsense

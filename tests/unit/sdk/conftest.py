"""An app whose jobs are run here and now by a client that keeps them in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest

from blixard import App
from blixard.client.blocking import Client
from blixard.domain.job import NewJob
from blixard.domain.outcome import AttemptError, OutcomeKind
from blixard.domain.payload import FunctionPayload
from blixard.domain.spec import JobSpec
from tests.unit.cli.fake_client import Ending, FakeClient, FakeStore
from tests.unit.sdk import jobs


class Store(FakeStore):
    """Runs functions of ``jobs`` at isolation none at all."""

    def run(self, spec: JobSpec, job: NewJob) -> Ending:
        assert isinstance(spec.payload, FunctionPayload)
        data = self.blobs[job.arguments_blob] if job.arguments_blob else bytes(job.arguments)
        args, kwargs = msgspec.json.decode(data)
        function: Callable[..., object] = getattr(jobs, spec.payload.function.partition(":")[2])
        try:
            return Ending(result=function(*args, **kwargs))
        except ValueError as error:
            text = f"Traceback (most recent call last):\nValueError: {error}\n"
            found = AttemptError(type="ValueError", message=str(error), traceback=text, hint="take even ones")
            return Ending(outcome=OutcomeKind.FAILED, exit_code=1, error=found)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def client(store: Store) -> FakeClient:
    return FakeClient(store, store.run)


@pytest.fixture
def app(client: FakeClient) -> Iterator[App]:
    with Client(lambda: client) as opened:
        yield App("shop", client=opened)

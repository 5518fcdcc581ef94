"""Waits end with their clients and with the server, and leave nothing behind."""

from __future__ import annotations

import asyncio

import pytest
from litestar.types import HTTPReceiveMessage

from blixard.api.waits import ClientGone, Waits
from blixard.domain.limits import MAX_WAIT_SECONDS

DEADLINE = 30.0


class Client:
    """A connection that can be closed."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def receive(self) -> HTTPReceiveMessage:
        await self.closed.wait()
        return {"type": "http.disconnect"}


class Service:
    """A call that waits for its event and records with which waits it was called."""

    def __init__(self) -> None:
        self.calls: list[float] = []
        self.entered = asyncio.Event()
        self.happened = asyncio.Event()

    async def call(self, seconds: float) -> str:
        self.calls.append(seconds)
        self.entered.set()
        if not seconds > 0:
            return "nothing yet"
        await self.happened.wait()
        return "it happened"


async def test_a_wait_is_cut_to_the_limit() -> None:
    service = Service()
    service.happened.set()

    assert await Waits().run(Client().receive, service.call, 1e9) == "it happened"
    assert service.calls == [MAX_WAIT_SECONDS]


@pytest.mark.parametrize("seconds", [0.0, -1.0])
async def test_without_a_wait_the_service_judges_the_number(seconds: float) -> None:
    service = Service()

    await Waits().run(Client().receive, service.call, seconds)

    assert service.calls == [seconds]


async def test_a_wait_ends_when_its_client_goes_away() -> None:
    waits, client, service = Waits(), Client(), Service()
    task = asyncio.create_task(waits.run(client.receive, service.call, 60.0))
    await service.entered.wait()
    assert waits.parked == 1

    client.closed.set()

    with pytest.raises(ClientGone):
        await asyncio.wait_for(task, DEADLINE)
    assert waits.parked == 0
    await waits.stop()
    assert waits.watchers == 0


async def test_every_wait_is_answered_when_the_server_stops() -> None:
    waits = Waits()
    services = [Service() for _ in range(20)]
    tasks = [asyncio.create_task(waits.run(Client().receive, service.call, 60.0)) for service in services]
    for service in services:
        await service.entered.wait()

    await waits.stop()

    assert await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE) == ["nothing yet"] * 20
    assert all(service.calls == [60.0, 0.0] for service in services)
    assert (waits.parked, waits.watchers) == (0, 0)


async def test_a_stopping_server_does_not_begin_to_wait() -> None:
    waits, service = Waits(), Service()
    await waits.stop()
    await waits.stop()

    assert await waits.run(Client().receive, service.call, 60.0) == "nothing yet"


async def test_somebody_else_s_cancel_passes_through() -> None:
    waits, service = Waits(), Service()
    task = asyncio.create_task(waits.run(Client().receive, service.call, 60.0))
    await service.entered.wait()

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert waits.parked == 0


async def test_an_error_of_the_service_passes_through() -> None:
    async def fail(seconds: float) -> str:
        raise LookupError

    waits = Waits()
    with pytest.raises(LookupError):
        await waits.run(Client().receive, fail, 60.0)
    assert waits.parked == 0

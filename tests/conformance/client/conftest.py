"""Every way to a client, each passing the same suite: ``client`` with nobody who runs jobs, ``working_client`` with real workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blixard.api.local_worker import LocalWorker
from blixard.api.server import Server
from blixard.client.contract import AsyncClient
from blixard.client.embedded import EmbeddedClient
from blixard.client.http import HttpClient
from blixard.client.http_link import ServerAddress
from blixard.config.settings import ServerSettings, Settings, StorageSettings, WorkerSettings
from blixard.protocol.workers import CreateTokenRequest, Scope
from blixard.worker.program import program_config

WAYS = ("embedded", "http", "served directory")


class IdleWorker(LocalWorker):
    """Stands where a server's worker stands, and is none."""

    def start(self) -> None:
        return


@asynccontextmanager
async def open_way(way: str, data_dir: Path, *, works: bool) -> AsyncIterator[AsyncClient]:
    settings = Settings(
        storage=StorageSettings(data_dir=data_dir),
        server=ServerSettings(port=0),
        worker=WorkerSettings(slots=2, types=("process",)),
    )
    if way == "embedded":
        async with EmbeddedClient(settings) as embedded:
            yield embedded
        return
    idle = None if works else IdleWorker(program_config(settings), grace_seconds=1.0)
    server = Server(settings, worker=idle)
    listening = await server.start()
    try:
        owner = EmbeddedClient(settings)
        async with owner:
            if way == "served directory":
                yield owner
                return
            # The first token closes the door for those without one, so this client has one from the start.
            made = await owner.create_token(CreateTokenRequest(name="suite", scopes=(Scope.ADMIN,)))
        async with HttpClient(ServerAddress(url=listening.url, token=made.secret)) as client:
            yield client
    finally:
        await server.stop()


@pytest.fixture(params=WAYS)
async def client(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    """Jobs stay pending. An embedded client must not be waited on: that would start its worker."""
    async with open_way(request.param, tmp_path / "data", works=False) as opened:
        yield opened


@pytest.fixture(params=WAYS)
async def working_client(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    async with open_way(request.param, tmp_path / "data", works=True) as opened:
        yield opened

"""The API on real services in memory, with or without a socket."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from blixard.api.access import Gatekeeper
from blixard.api.application import create_application
from blixard.api.door import Door
from blixard.api.metrics import ApiMetrics
from blixard.api.operation import ApiContext
from blixard.services.control_plane import ControlPlane, ControlPlaneConfig, build_control_plane
from blixard.storage.blobs import LocalBlobStore
from blixard.storage.logs import LocalLogStore
from blixard.testing.storage import memory_database

SPEC = {"name": "greet", "payload": {"kind": "command", "argv": ["true"]}}
OFFER = {"capabilities": {"process": ["minimal", "standard"]}, "slots": 4, "cpus": 4, "memory_mb": 4096}


@dataclass(frozen=True)
class Api:
    """``client`` comes over TCP on loopback, ``trusted`` over the Unix socket."""

    plane: ControlPlane
    context: ApiContext
    public: Door
    local: Door
    client: httpx.AsyncClient
    trusted: httpx.AsyncClient

    async def submit(self, count: int = 1, **spec: object) -> list[str]:
        body = {"spec": {**SPEC, **spec}, "jobs": [{} for _ in range(count)]}
        response = await self.trusted.post("/jobs", json=body)
        assert response.status_code == 201, response.text
        ids: list[str] = response.json()["ids"]
        return ids

    async def register(self, session: str = "worker_1") -> str:
        body = {"name": "w", "offer": OFFER, "session": session}
        response = await self.trusted.post("/workers", json=body)
        assert response.status_code == 201, response.text
        return session

    async def token(self, *scopes: str) -> dict[str, str]:
        """Return the headers of a fresh token."""
        response = await self.trusted.post("/tokens", json={"name": "t", "scopes": scopes})
        assert response.status_code == 201, response.text
        return {"Authorization": f"Bearer {response.json()['secret']}"}


@contextlib.asynccontextmanager
async def open_api(directory: Path, *, host: str = "127.0.0.1") -> AsyncIterator[Api]:
    plane = build_control_plane(
        memory_database(), LocalBlobStore(directory / "blobs"), LocalLogStore(directory / "logs"), ControlPlaneConfig()
    )
    await plane.open()
    context = ApiContext(plane=plane, gate=Gatekeeper(plane.tokens, host), metrics=ApiMetrics())
    application = create_application(context)
    public, local = Door(application, context, trusted=False), Door(application, context, trusted=True)
    try:
        async with _client(public) as client, _client(local) as trusted:
            yield Api(plane, context, public, local, client, trusted)
    finally:
        await public.waits.stop()
        await local.waits.stop()
        await plane.close()


def _client(door: Door) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=door)  # type: ignore[arg-type]  # an ASGI application in another library's words
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:3020/api/v1")

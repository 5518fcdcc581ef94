"""The API behind real sockets: what only a transport can show."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest

from blixard.api.listeners import Listener, bind_tcp, bind_unix
from blixard.domain.limits import MAX_BLOB_BYTES, MAX_REQUEST_BYTES
from blixard.protocol.workers import Problem
from tests.integration.serve_rig import DEADLINE, until
from tests.unit.api.harness import SPEC, Api, open_api


@dataclass
class Live:
    api: Api
    port: int
    socket: Path
    client: httpx.AsyncClient

    async def raw(self, content: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(content)
        await writer.drain()
        return reader, writer


@asynccontextmanager
async def live_api(directory: Path) -> AsyncIterator[Live]:
    async with open_api(directory) as api:
        bound = bind_tcp("127.0.0.1", 0)
        port = bound.getsockname()[1]
        listeners = [Listener(api.public, bound), Listener(api.local, bind_unix(directory / "s.sock"))]
        for listener in listeners:
            await listener.start()
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=DEADLINE) as client:
                yield Live(api, port, directory / "s.sock", client)
        finally:
            await api.public.waits.stop()
            await asyncio.gather(*(listener.stop() for listener in listeners))


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Live]:
    async with live_api(tmp_path) as opened:
        yield opened


def post(path: str, body: bytes) -> bytes:
    head = f"POST /api/v1{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def test_a_client_that_goes_away_frees_what_waited_for_it(live: Live) -> None:
    (job,) = await live.api.submit()
    session = await live.api.register()
    waits = [post("/jobs/wait", msgspec.json.encode({"ids": [job], "wait": 60})) for _ in range(30)]
    sync = post(f"/workers/{session}/sync", msgspec.json.encode({"session": session, "number": 1, "wait": 3}))
    results = f"GET /api/v1/jobs/{job}/logs?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    connections = [await live.raw(content) for content in [*waits, sync, results]]
    await until(lambda: live.api.public.waits.parked == len(connections))

    for _, writer in connections:
        writer.close()

    await until(lambda: live.api.public.waits.parked == 0)
    await until(lambda: live.api.public.waits.watchers == 0)
    # and the session is as it was: its next sync is served
    again = await live.client.post(f"/workers/{session}/sync", json={"session": session, "number": 2})
    assert again.status_code == 200


async def test_a_wait_is_answered_as_soon_as_its_job_ends(live: Live) -> None:
    (job,) = await live.api.submit()
    waiting = asyncio.create_task(live.client.post("/jobs/wait", json={"ids": [job], "wait": 60}))
    await until(lambda: live.api.public.waits.parked == 1)

    await live.client.post(f"/jobs/{job}/cancel")

    answer = await asyncio.wait_for(waiting, DEADLINE)
    assert [ended["state"] for ended in answer.json()["ended"]] == ["cancelled"]


async def chunks(size: int) -> AsyncIterator[bytes]:
    piece = b" " * (1 << 20)
    while size > 0:
        yield piece[: min(size, len(piece))]
        size -= len(piece)


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_is_refused_while_it_is_read(live: Live, *, announced: bool) -> None:
    size = MAX_REQUEST_BYTES + 1
    headers = {"content-type": "application/json"} | ({"content-length": str(size)} if announced else {})

    answer = await live.client.post("/jobs", content=chunks(size), headers=headers)

    problem = msgspec.json.decode(answer.content, type=Problem)
    assert (answer.status_code, problem.code) == (413, "limit_exceeded")
    assert (await live.client.get("/health/live")).status_code == 200


async def test_a_blob_that_is_announced_too_large_is_refused_at_once(live: Live) -> None:
    head = f"PUT /api/v1/blobs/{'0' * 64} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MAX_BLOB_BYTES + 1}\r\n\r\n"
    reader, writer = await live.raw(head.encode())

    line = await asyncio.wait_for(reader.readline(), DEADLINE)

    assert b" 413 " in line
    writer.close()


async def test_an_upload_that_breaks_off_leaves_no_blob(live: Live) -> None:
    content = b"x" * 3_000_000
    digest = hashlib.sha256(content).hexdigest()
    head = f"PUT /api/v1/blobs/{digest} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    _, writer = await live.raw(head.encode() + content[:-1])
    writer.close()
    await writer.wait_closed()

    answered = 'blixard_http_requests_total{route="put_blob",status="499"} 1.0'
    async with asyncio.timeout(DEADLINE):
        while answered not in (await live.client.get("/metrics")).text:
            pass
    assert (await live.client.head(f"/blobs/{digest}")).status_code == 404
    assert (await live.client.put(f"/blobs/{digest}", content=content)).status_code == 201


async def test_the_socket_is_trusted_and_the_port_is_not(live: Live) -> None:
    await live.api.token("read")
    transport = httpx.AsyncHTTPTransport(uds=str(live.socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://blixard/api/v1") as local:
        assert (await local.get("/tokens")).status_code == 200
    assert (await live.client.get("/stats")).status_code == 401


async def test_hundreds_of_requests_at_once_are_all_answered(live: Live) -> None:
    body = {"spec": SPEC, "jobs": [{}]}
    answers = await asyncio.gather(*(live.client.post("/jobs", json=body) for _ in range(200)))

    assert {answer.status_code for answer in answers} == {201}
    assert (await live.client.get("/stats")).json()["jobs"] == {"pending": 200}


@pytest.mark.parametrize(
    "garbage", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"POST /api/v1/jobs HTTP/1.1\r\nContent-Length: x\r\n\r\n"]
)
async def test_what_is_no_http_is_refused_and_harms_nobody(live: Live, garbage: bytes) -> None:
    reader, writer = await live.raw(garbage)
    assert b" 400 " in await asyncio.wait_for(reader.readline(), DEADLINE)
    writer.close()

    assert (await live.client.get("/health/live")).status_code == 200

"""`blixard serve` as a process: it starts, refuses, stops, is killed and taken over."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from blixard.api.access import is_loopback
from blixard.api.local_worker import LocalWorker
from blixard.api.server import Server
from blixard.client.http import HttpClient
from blixard.client.http_link import ServerAddress
from blixard.config.settings import Settings
from blixard.domain.payload import CommandPayload
from blixard.domain.spec import JobSpec
from blixard.errors import ConfigError, Conflict, StoreUnavailable, Unauthenticated
from blixard.protocol.workers import CreateTokenRequest, Scope
from blixard.worker.program import program_config
from tests.integration.serve_rig import DEADLINE, IDLE_WORKER, command, running, until

SPEC = JobSpec(name="greet", payload=CommandPayload(argv=("true",)))
ROOT = Path(__file__).parents[2]


def settings_for(data_dir: Path, **server: object) -> Settings:
    return Settings.model_validate({"storage": {"data_dir": str(data_dir)}, "server": {"port": 0, **server}})


def idle_server(settings: Settings) -> Server:
    return Server(settings, worker=LocalWorker(program_config(settings), grace_seconds=5, command=IDLE_WORKER))


def fails(data_dir: Path, **server: object) -> str:
    """Start a server that must refuse, and return what it says."""
    ended = subprocess.run(
        command(data_dir, server), capture_output=True, text=True, timeout=DEADLINE, cwd=ROOT, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


async def test_a_server_answers_on_its_port_and_on_a_private_socket(tmp_path: Path) -> None:
    server = idle_server(settings_for(tmp_path))
    listening = await server.start()
    try:
        assert stat.S_IMODE(listening.socket.stat().st_mode) == 0o600
        async with HttpClient(ServerAddress(url=listening.url)) as over_tcp:
            job = await over_tcp.submit(SPEC)
        async with HttpClient(ServerAddress(socket=listening.socket)) as over_socket:
            assert (await over_socket.job(job)).id == job
            assert (await over_socket.health()).checks == {"store": "ok"}
    finally:
        await server.stop()
    assert not listening.socket.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(tmp_path: Path, number: int) -> None:
    with running(tmp_path) as server:
        server.signal(number)

        assert server.end() == 0
        assert not server.socket.exists()


def test_a_second_server_on_the_directory_is_refused_by_name(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        said = fails(tmp_path)

    assert f"pid {server.process.pid}" in said
    assert "BLIXARD_STORAGE__DATA_DIR" in said


def test_a_port_in_use_is_named_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = fails(tmp_path, port=port)

    assert f"port {port} on 127.0.0.1 is in use" in said
    assert "BLIXARD_SERVER__PORT" in said


def test_killed_it_leaves_a_directory_that_the_next_one_takes_over_at_once(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        with httpx.Client(base_url=first.url) as client:
            body = {"spec": {"name": "x", "payload": {"kind": "command", "argv": ["true"]}}, "jobs": [{"id": "kept"}]}
            assert client.post("/api/v1/jobs", json=body).status_code == 201
        first.signal(signal.SIGKILL)
        first.end()
        assert first.socket.exists()
    with running(tmp_path) as second, httpx.Client(base_url=second.url) as client:
        assert client.get("/api/v1/jobs/kept").status_code == 200
        transport = httpx.HTTPTransport(uds=str(second.socket))
        with httpx.Client(transport=transport, base_url="http://blixard") as local:
            assert local.get("/api/v1/jobs/kept").status_code == 200


async def test_an_address_that_others_reach_needs_a_token_first(tmp_path: Path) -> None:
    exposed = settings_for(tmp_path, host="0.0.0.0")
    with pytest.raises(ConfigError, match="no token") as caught:
        await idle_server(exposed).start()
    assert "blixard token create" in (caught.value.hint or "")

    local = idle_server(settings_for(tmp_path))
    listening = await local.start()
    async with HttpClient(ServerAddress(socket=listening.socket)) as client:
        made = await client.create_token(CreateTokenRequest(name="t", scopes=(Scope.READ,)))
    await local.stop()

    server = idle_server(exposed)
    listening = await server.start()
    url = listening.url.replace("0.0.0.0", "127.0.0.1")
    try:
        async with HttpClient(ServerAddress(url=url, token=made.secret)) as client:
            assert (await client.stats()).jobs == {}
        async with HttpClient(ServerAddress(url=url)) as client:
            with pytest.raises(Unauthenticated):
                await client.stats()
    finally:
        await server.stop()


async def test_a_body_over_the_limit_of_the_settings_is_refused(tmp_path: Path) -> None:
    limit = 2 * 1024 * 1024
    server = idle_server(settings_for(tmp_path, request_limit=limit))
    listening = await server.start()
    try:
        async with httpx.AsyncClient(base_url=listening.url) as client:
            refused = await client.post(
                "/api/v1/jobs", content=b" " * (limit + 1), headers={"content-type": "application/json"}
            )
            at_limit = await client.post(
                "/api/v1/jobs", content=b" " * limit, headers={"content-type": "application/json"}
            )
    finally:
        await server.stop()
    assert (refused.status_code, at_limit.status_code) == (413, 400)


async def test_it_speaks_https_with_the_files_given(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_certificate(certificate, key)
    server = idle_server(settings_for(tmp_path / "data", tls_certificate=str(certificate), tls_key=str(key)))
    listening = await server.start()
    try:
        assert listening.url.startswith("https://")
        async with HttpClient(ServerAddress(url=listening.url, ca_file=certificate)) as client:
            assert (await client.health()).status == "ok"
        async with HttpClient(ServerAddress(socket=listening.socket)) as client:
            assert (await client.health()).status == "ok"
    finally:
        await server.stop()


def make_certificate(certificate: Path, key: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.mark.parametrize("wrong", ["missing", "garbage", "foreign key"])
async def test_wrong_tls_files_are_named(tmp_path: Path, wrong: str) -> None:
    certificate, key, other = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "other.pem"
    make_certificate(certificate, key)
    if wrong == "missing":
        key.unlink()
    elif wrong == "garbage":
        key.write_text("not a key")
    else:
        make_certificate(other, key)
    server = idle_server(settings_for(tmp_path / "data", tls_certificate=str(certificate), tls_key=str(key)))
    with pytest.raises(ConfigError, match="tls_key"):
        await server.start()


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot be written") as caught:
        await idle_server(settings_for(tmp_path / "file" / "data")).start()
    assert "BLIXARD_STORAGE__DATA_DIR" in (caught.value.hint or "")


async def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long for a Unix socket"):
        await idle_server(settings_for(tmp_path / ("x" * 120))).start()


async def test_a_start_that_failed_gives_everything_back(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ConfigError):
        await idle_server(settings_for(tmp_path, port=other.getsockname()[1])).start()
    server = idle_server(settings_for(tmp_path))
    await server.start()
    await server.stop()


async def test_stop_before_start_and_twice_and_start_after_stop(tmp_path: Path) -> None:
    never = idle_server(settings_for(tmp_path))
    await never.stop()
    await never.stop()
    with pytest.raises(Conflict):
        await never.start()

    server = idle_server(settings_for(tmp_path))
    await server.start()
    await asyncio.gather(server.stop(), server.stop())
    await server.stop()


async def test_stop_at_any_moment_of_the_start_leaves_the_directory_free(tmp_path: Path) -> None:
    interrupted = 0
    for turns in range(0, 400, 20):
        server = idle_server(settings_for(tmp_path))
        starting = asyncio.create_task(server.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        interrupted += not starting.done()
        await server.stop()
        await asyncio.gather(starting, return_exceptions=True)
    assert interrupted > 3
    last = idle_server(settings_for(tmp_path))
    await last.start()
    await last.stop()


async def test_a_stopping_server_answers_parked_calls(tmp_path: Path) -> None:
    server = idle_server(settings_for(tmp_path))
    listening = await server.start()
    async with httpx.AsyncClient(base_url=f"{listening.url}/api/v1", timeout=DEADLINE) as client:
        body = {"spec": {"name": "x", "payload": {"kind": "command", "argv": ["true"]}}, "jobs": [{"id": "one"}]}
        assert (await client.post("/jobs", json=body)).status_code == 201
        waiting = asyncio.create_task(client.post("/jobs/wait", json={"ids": ["one"], "wait": 50}))
        await until(lambda: any(door.waits.parked for door in server._doors))

        await asyncio.wait_for(server.stop(), 30)

        answer = await waiting
        assert (answer.status_code, answer.json()) == (200, {"ended": [], "unknown": []})


async def test_a_worker_that_dies_is_started_again(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    worker = LocalWorker(program_config(settings), grace_seconds=5, command=IDLE_WORKER)
    server = Server(settings, worker=worker)
    await server.start()
    try:
        killed: set[int] = set()
        for _ in range(3):
            await until(lambda: worker.pid is not None and worker.pid not in killed)
            assert worker.pid is not None
            killed.add(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
        assert worker.starts == 3
    finally:
        await server.stop()
    assert worker.pid is None


async def test_a_worker_that_ignores_the_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blixard.api.local_worker.KILL_SECONDS", 0.2)
    deaf = (IDLE_WORKER[0], "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); signal.pause()")
    worker = LocalWorker(program_config(settings_for(tmp_path)), grace_seconds=0.1, command=deaf)
    worker.start()
    await until(lambda: worker.pid is not None)
    await worker.stop()
    assert worker.pid is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_addresses(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", ""])
def test_other_addresses(host: str) -> None:
    assert not is_loopback(host)


def python_job(code: str, **spec: object) -> dict[str, object]:
    """Return the body that submits one command at isolation minimal, with the id ``one``."""
    payload = {"kind": "command", "argv": [sys.executable, "-c", code]}
    requirements = {"isolation": "minimal"}
    return {
        "spec": {"name": "x", "payload": payload, "requirements": requirements, **spec},
        "jobs": [{"id": "one"}],
    }


async def state_of(client: httpx.AsyncClient) -> str:
    return str((await client.get("/jobs/one")).json()["state"])


async def wait_for_state(url: str, state: str) -> None:
    async with httpx.AsyncClient(base_url=f"{url}/api/v1", timeout=DEADLINE) as client, asyncio.timeout(DEADLINE):
        while await state_of(client) != state:  # noqa: ASYNC110 - the server is another process
            await asyncio.sleep(0.05)


async def test_a_running_job_is_finished_within_the_grace_time(tmp_path: Path) -> None:
    """Given a job that runs until it sees a file; when the server is told to stop and then the file appears, it completes."""
    go = tmp_path / "go"
    code = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.02)"
    with running(tmp_path / "data", {"shutdown_grace": 30.0}, worker=True) as server:
        async with httpx.AsyncClient(base_url=f"{server.url}/api/v1", timeout=DEADLINE) as client:
            assert (await client.post("/jobs", json=python_job(code))).status_code == 201
        await wait_for_state(server.url, "in_progress")
        server.signal(signal.SIGTERM)
        go.touch()
        assert await asyncio.to_thread(server.end) == 0
    with running(tmp_path / "data") as server:
        await wait_for_state(server.url, "completed")


async def test_a_job_that_outlasts_the_grace_time_is_given_back_at_no_cost(tmp_path: Path) -> None:
    with running(tmp_path / "data", {"shutdown_grace": 0.2}, worker=True) as server:
        async with httpx.AsyncClient(base_url=f"{server.url}/api/v1", timeout=DEADLINE) as client:
            assert (await client.post("/jobs", json=python_job("import time; time.sleep(600)"))).status_code == 201
        await wait_for_state(server.url, "in_progress")
        server.signal(signal.SIGINT)
        assert await asyncio.to_thread(server.end) == 0
    with running(tmp_path / "data") as server:
        await wait_for_state(server.url, "pending")
        async with httpx.AsyncClient(base_url=f"{server.url}/api/v1") as client:
            assert (await client.get("/jobs/one")).json()["failures"] == 0


async def test_a_second_signal_ends_it_at_once_with_its_worker(tmp_path: Path) -> None:
    with running(tmp_path / "data", {"shutdown_grace": 600.0}, worker=True) as server:
        async with httpx.AsyncClient(base_url=f"{server.url}/api/v1", timeout=DEADLINE) as client:
            assert (await client.post("/jobs", json=python_job("import time; time.sleep(600)"))).status_code == 201
        await wait_for_state(server.url, "in_progress")
        (worker,) = psutil.Process(server.process.pid).children()
        server.signal(signal.SIGINT)
        await until(lambda: not port_answers(server.url))
        server.signal(signal.SIGINT)
        assert await asyncio.to_thread(server.end) == 130
        await until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def port_answers(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=1).close()
    except OSError:
        return False
    return True


async def test_a_killed_server_takes_its_worker_along(tmp_path: Path) -> None:
    with running(tmp_path / "data", worker=True) as server:
        await until(lambda: bool(psutil.Process(server.process.pid).children()))
        (worker,) = psutil.Process(server.process.pid).children()
        server.signal(signal.SIGKILL)
        server.end()
        await until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)

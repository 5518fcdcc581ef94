"""What only sandboxes have: hints on denied access, grants that are refused, who a job is, limits, and leaving nothing behind."""

# ruff: noqa: E501 -- programs of jobs are easier to read in one line
from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from blixard.backends.contract import BackendSettings, Execution, StopReason
from blixard.backends.sandbox.backend import SandboxBackend
from blixard.backends.sandbox.cgroups import find_hierarchies
from blixard.domain.grants import Grants, InputFile
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import CommandPayload, FunctionPayload, Payload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec
from tests.conformance.backends.harness import DEADLINE, Recorder, wait_until


@pytest.fixture
def place() -> Iterator[Path]:
    """A closed directory outside of /tmp, which a sandbox has for itself."""
    with tempfile.TemporaryDirectory(prefix="blixard-backend-", dir="/var/tmp") as name:  # the test's own
        yield Path(name)


@pytest.fixture
async def backend(place: Path) -> AsyncIterator[SandboxBackend]:
    made = SandboxBackend(settings_of(place))
    await made.start()
    yield made
    await made.stop()


def settings_of(place: Path, *, lock_fd: int | None = None) -> BackendSettings:
    scratch = place / "scratch"
    scratch.mkdir(exist_ok=True)
    return BackendSettings(scratch=scratch, slots=2, grace_seconds=1.0, processes=32, disk_mb=32, lock_fd=lock_fd)


def execution_of(
    payload: Payload, blobs: dict[str, Path], number: int = 1, inputs: tuple[InputFile, ...] = (), **options: object
) -> Execution:
    needs = JobRequirements(isolation=Isolation.STANDARD, memory_mb=options.pop("memory_mb", None))  # type: ignore[arg-type]  # the options of a test
    spec = JobSpec(name="test", payload=payload, requirements=needs, **options)  # type: ignore[arg-type]  # the same
    return Execution(
        ref=AttemptRef("default", f"job_{number}", 1), spec=spec, blobs=blobs, arguments=b"[[],{}]", inputs=inputs
    )


def function(place: Path, body: str, **options: object) -> Execution:
    code = place / "code"
    code.mkdir(exist_ok=True)
    (code / "jobs.py").write_text(f"def job():\n    {body}\n")
    return execution_of(FunctionPayload(function="jobs:job", bundle="code"), {"code": code}, **options)  # type: ignore[arg-type]  # the same


async def run(backend: SandboxBackend, execution: Execution) -> tuple[Outcome, Recorder]:
    observer = Recorder()
    async with asyncio.timeout(DEADLINE):
        return await backend.execute(execution, observer), observer


def is_sandboxed(pid: int) -> bool:
    """Say whether the process has a network namespace of its own."""
    try:
        return Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    except OSError:
        return False  # it has ended


def sandboxed_below(pid: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(pid).children(recursive=True) if is_sandboxed(p.pid)]


async def hint_of(backend: SandboxBackend, execution: Execution) -> str:
    outcome, _ = await run(backend, execution)
    assert outcome.kind is OutcomeKind.FAILED, outcome
    assert outcome.error is not None
    assert outcome.error.hint is not None, outcome.error
    return outcome.error.hint


async def test_a_hidden_file_names_the_grant_that_was_missing(backend: SandboxBackend, place: Path) -> None:
    data = place / "data.csv"
    data.write_text("1,2")
    hint = await hint_of(backend, function(place, f"open({str(data)!r})"))
    assert hint.startswith(f"the sandbox hides {data}; grant it with --allow-read {data}")
    outcome, _ = await run(
        backend, function(place, f"return open({str(data)!r}).read()", grants=Grants(read=(str(data),)))
    )
    assert outcome.result is not None, outcome.error
    assert json.loads(bytes(outcome.result)) == "1,2"


async def test_writing_to_what_is_granted_for_reading_names_the_grant(backend: SandboxBackend, place: Path) -> None:
    data = place / "data.csv"
    data.write_text("1,2")
    grants = Grants(read=(str(data),))
    hint = await hint_of(backend, function(place, f"open({str(data)!r}, 'a')", grants=grants))
    assert hint.endswith(f"--allow-write {data}")


@pytest.mark.parametrize(
    "body",
    [
        "import socket; socket.create_connection(('192.0.2.1', 80), 5)",
        "import socket; socket.getaddrinfo('example.org', 80)",
        "import urllib.request; urllib.request.urlopen('http://example.org', timeout=5)",
    ],
)
async def test_a_job_without_network_is_told_how_to_get_it(backend: SandboxBackend, place: Path, body: str) -> None:
    assert "--allow-net" in await hint_of(backend, function(place, body))


async def test_a_granted_network_is_the_host_s(backend: SandboxBackend, place: Path) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    body = f"import socket; return socket.create_connection(('127.0.0.1', {port}), 30).recv(5).decode()"
    outcome, _ = await run(backend, function(place, body, grants=Grants(network=True)))
    server.close()
    assert outcome.result is not None, outcome.error
    assert json.loads(bytes(outcome.result)) == "hello"


@pytest.mark.parametrize(
    ("grants", "words"),
    [
        (Grants(read=("/proc",)), "/proc"),
        (Grants(write=("/dev/sda",)), "/dev"),
        (Grants(read=("/nowhere/at/all",)), "no such file"),
    ],
)
async def test_what_cannot_be_granted_is_one_clear_error(
    backend: SandboxBackend, place: Path, grants: Grants, words: str
) -> None:
    outcome, _ = await run(backend, function(place, "pass", grants=grants))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error is not None
    assert outcome.error.type == "GrantRefused"
    assert words in outcome.error.message
    assert outcome.error.hint
    assert not outcome.error.retryable


async def test_files_closed_to_everybody_but_the_worker_can_be_given_to_a_job(
    backend: SandboxBackend, place: Path
) -> None:
    (place / "blob").write_text("input")
    (place / "blob").chmod(0o600)
    (place / "granted").mkdir(mode=0o700)
    (place / "granted" / "data").write_text("granted")
    (place / "granted" / "data").chmod(0o600)
    target = str(place / "granted")
    body = f"open({target!r} + '/new', 'w').write('x'); return open('in/put.txt').read() + open({target!r} + '/data').read()"
    execution = function(
        place, body, grants=Grants(write=(target,)), inputs=(InputFile(path="in/put.txt", digest="blob"),)
    )
    execution.blobs["blob"] = place / "blob"  # type: ignore[index]  # a dict here
    (place / "code").chmod(0o700)
    outcome, _ = await run(backend, execution)
    assert outcome.result is not None, outcome.error
    assert json.loads(bytes(outcome.result)) == "inputgranted"
    assert (place / "granted" / "new").stat().st_uid == os.geteuid()


async def test_an_input_can_lie_at_an_absolute_path(backend: SandboxBackend, place: Path) -> None:
    (place / "blob").write_text("input")
    execution = function(
        place, "return open('/data/in.txt').read()", inputs=(InputFile(path="/data/in.txt", digest="blob"),)
    )
    execution.blobs["blob"] = place / "blob"  # type: ignore[index]  # a dict here
    outcome, _ = await run(backend, execution)
    assert outcome.result is not None, outcome.error
    assert json.loads(bytes(outcome.result)) == "input"


@pytest.mark.parametrize(
    "payload",
    [FunctionPayload(function="time:sleep"), CommandPayload(argv=("sleep",))],
    ids=["function", "command"],
)
async def test_a_job_is_never_root_on_the_host(backend: SandboxBackend, payload: Payload) -> None:
    execution = execution_of(payload, {})
    arguments = b"[[600],{}]" if isinstance(payload, FunctionPayload) else b'["600"]'
    execution = Execution(ref=execution.ref, spec=execution.spec, arguments=arguments)
    observer = Recorder()
    task = asyncio.create_task(backend.execute(execution, observer))
    await observer.wait(lambda: observer.started_at is not None)

    def job() -> list[psutil.Process]:
        return [p for p in sandboxed_below(os.getpid()) if not p.children()]

    await wait_until(lambda: len(job()) == 1, "the job to be in its own network namespace")
    (process,) = job()
    await wait_until(lambda: process.uids().real != 0, "the job to have become an ordinary user")
    assert set(process.uids()) == {65534 if os.geteuid() == 0 else os.geteuid()}
    backend.interrupt(execution.ref, StopReason.KILL)
    assert (await task).kind is OutcomeKind.LOST


async def test_a_command_that_is_not_there_fails_with_127(backend: SandboxBackend, place: Path) -> None:
    (place / "file").write_text("x")
    for argv, code in ((("no-such-program",), 127), ((str(place / "file"),), 126)):
        execution = execution_of(CommandPayload(argv=argv), {}, grants=Grants(read=(str(place),)))
        execution = Execution(ref=execution.ref, spec=execution.spec)
        outcome, _ = await run(backend, execution)
        assert outcome.kind is OutcomeKind.FAILED
        assert outcome.exit_code == code
        assert outcome.error is not None
        assert argv[0] in outcome.error.message


async def test_a_job_can_import_us_and_start_interpreters(backend: SandboxBackend, place: Path) -> None:
    body = "import blixard.domain.job, subprocess, sys; return subprocess.run([sys.executable, '-c', 'import blixard.errors, msgspec; print(1)'], capture_output=True, text=True).stdout"
    outcome, _ = await run(backend, function(place, body))
    assert outcome.result is not None, outcome.error
    assert json.loads(bytes(outcome.result)) == "1\n"


async def test_running_out_of_memory_is_told_as_such(backend: SandboxBackend, place: Path) -> None:
    outcome, _ = await run(backend, function(place, "return len(bytes(b'x') * 2_000_000_000)", memory_mb=128))
    assert outcome.error is not None
    assert outcome.error.type == "MemoryLimit"
    assert "128 MB" in outcome.error.message
    assert outcome.error.hint is not None
    again, _ = await run(backend, function(place, "import os; os.kill(os.getpid(), 9)", memory_mb=128))
    assert again.error is not None
    assert again.error.type == "KilledBySignal", "an earlier job's end must not be taken for this one's"


async def test_groups_of_the_host_are_removed(place: Path) -> None:
    def groups() -> list[Path]:
        return [path for h in find_hierarchies() for path in h.directory.glob(f"blixard-{os.getpid()}-*")]

    before = groups()
    backend = SandboxBackend(settings_of(place))
    await backend.start()
    await asyncio.gather(*(run(backend, function(place, "return 1", number=number)) for number in range(4)))
    if find_hierarchies():
        assert len(groups()) > len(before)
    await backend.stop()
    assert set(groups()) <= set(before)


WORKER = """
import asyncio, os, sys
from pathlib import Path
from tests.integration.test_sandbox_backend import execution_of, settings_of
from tests.conformance.backends.harness import Recorder
from blixard.backends.sandbox.backend import SandboxBackend
from blixard.domain.payload import CommandPayload, FunctionPayload
from blixard.backends.contract import Execution
async def main():
    lock = int(sys.argv[2])
    os.set_inheritable(lock, False)
    backend = SandboxBackend(settings_of(Path(sys.argv[1]), lock_fd=lock))
    await backend.start()
    jobs = []
    for number, (payload, words) in enumerate(((FunctionPayload(function="time:sleep"), b"[[600],{}]"), (CommandPayload(argv=("sleep",)), b'["600"]'))):
        made = execution_of(payload, {}, number=number)
        seen = Recorder()
        jobs.append((asyncio.create_task(backend.execute(Execution(ref=made.ref, spec=made.spec, arguments=words), seen)), seen))
    for task, seen in jobs:
        await seen.wait(lambda: seen.started_at is not None)
    print("running", flush=True)
    await asyncio.gather(*(task for task, _ in jobs))
asyncio.run(main())
"""


async def start_and_stop(place: Path) -> None:
    backend = SandboxBackend(settings_of(place))
    await backend.start()
    await backend.stop()


def test_when_the_worker_is_killed_the_lock_is_free_only_once_its_jobs_are_gone(
    place: Path, request: pytest.FixtureRequest
) -> None:
    lock = place / "lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    words = [sys.executable, "-c", WORKER, str(place), str(descriptor)]
    worker = subprocess.Popen(words, stdout=subprocess.PIPE, pass_fds=[descriptor])
    request.addfinalizer(worker.kill)
    os.close(descriptor)
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"running\n"
    end = time.monotonic() + DEADLINE
    while (
        len(sandboxed := sandboxed_below(worker.pid)) < 4
    ):  # an init and a job each; nothing tells when they are inside
        assert time.monotonic() < end, sandboxed
    groups = [group for h in find_hierarchies() for group in h.directory.glob(f"blixard-{worker.pid}-*")]
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        alive = [p for p in sandboxed if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert alive == []
    assert bool(groups) is bool(find_hierarchies())
    asyncio.run(start_and_stop(place))
    assert [group for group in groups if group.exists()] == [], "the next worker clears away what a killed one has left"
    worker.stdout.close()

"""The embedded client with real backends: a data directory, a child worker, and what remains when processes die."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from blixard.bundling.archive import pack
from blixard.client.embedded import EmbeddedClient
from blixard.config.settings import Settings
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_INLINE_RESULT_BYTES
from blixard.domain.outcome import OutcomeKind
from blixard.domain.payload import CommandPayload, FunctionPayload, Payload, ScriptPayload, WasmPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.errors import JobNotFound, NotSupportedHere, StoreUnavailable, WaitTimedOut, WorkerError
from tests.integration.embedded_program import settings_for

DEADLINE = 60.0
PROGRAM = Path(__file__).with_name("embedded_program.py")
FORTY_TWO = bytes.fromhex(  # (module (func (export "answer") (result i32) i32.const 42))
    "0061736d010000000105016000017f03020100070a0106616e7377657200000a06010400412a0b"
)


def spec(payload: Payload, **fields: object) -> JobSpec:
    return msgspec.convert(
        {"name": "job", "payload": payload, "requirements": JobRequirements(isolation=Isolation.MINIMAL), **fields},
        JobSpec,
    )


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that other processes do."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.02)  # nothing rings for the death of somebody else's child


async def until_async(condition: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(until, condition, what)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_for(tmp_path / "data")


async def test_a_function_returns_its_value_and_a_script_its_exit_code_and_output(settings: Settings) -> None:
    async with EmbeddedClient(settings) as client:
        code = pack(
            {"shop.py": b"def total(*prices):\n    print('adding', len(prices))\n    return {'sum': sum(prices)}\n"}
        )
        bundle = await client.put_blob(code)
        job = await client.submit(
            spec(FunctionPayload(function="shop:total", bundle=bundle)),
            NewJob(arguments=msgspec.Raw(b"[[1,2,3],{}]")),
        )
        result = await client.result(job, timeout=DEADLINE)
        assert result.error is None
        assert msgspec.json.decode(result.result or b"null") == {"sum": 6}
        page = await client.logs(job)
        assert b"".join(entry.data for entry in page.entries) == b"adding 3\n"
        assert page.ended

        script = await client.put_blob(pack({"main.py": b"import sys\nprint(sys.argv[1:])\nsys.exit(3)\n"}))
        job = await client.submit(
            spec(ScriptPayload(path="main.py", bundle=script)), NewJob(arguments=msgspec.Raw(b'["--n","3"]'))
        )
        result = await client.result(job, timeout=DEADLINE)
        assert (result.state, result.exit_code) == (JobState.FAILED, 3)
        page = await client.logs(job)
        assert b"".join(entry.data for entry in page.entries) == b"['--n', '3']\n"


async def test_a_command_and_a_wasm_function(settings: Settings) -> None:
    settings = settings.model_copy(update={"worker": settings.worker.model_copy(update={"types": ()})})
    async with EmbeddedClient(settings) as client:
        module = await client.put_blob(FORTY_TWO)
        wasm = await client.submit(spec(WasmPayload(module=module, function="answer")))
        command = await client.submit(spec(CommandPayload(argv=("sh", "-c", "echo out; echo err >&2; exit 7"))))
        result = await client.result(wasm, timeout=DEADLINE)
        assert result.error is None
        assert msgspec.json.decode(result.result or b"null") in (42, [42])
        result = await client.result(command, timeout=DEADLINE)
        assert result.exit_code == 7
        entries = (await client.logs(command)).entries
        assert {(entry.stream, entry.data) for entry in entries} == {("stdout", b"out\n"), ("stderr", b"err\n")}


async def test_a_large_result_comes_as_a_blob(settings: Settings) -> None:
    async with EmbeddedClient(settings) as client:
        code = await client.put_blob(pack({"big.py": b"def make(n):\n    return 'x' * n\n"}))
        job = await client.submit(
            spec(FunctionPayload(function="big:make", bundle=code)),
            NewJob(arguments=msgspec.Raw(b"[[%d],{}]" % MAX_INLINE_RESULT_BYTES)),
        )
        result = await client.result(job, timeout=DEADLINE)
        assert result.result is None
        assert result.result_blob is not None
        content = await client.get_blob(result.result_blob)
        assert len(msgspec.json.decode(content)) == MAX_INLINE_RESULT_BYTES
        assert b"".join([piece async for piece in client.stream_blob(result.result_blob)]) == content


async def test_cancel_ends_a_running_job_within_a_second(settings: Settings) -> None:
    async with EmbeddedClient(settings) as client:
        job = await client.submit(spec(CommandPayload(argv=("sleep", "1000"))))
        waiting = asyncio.create_task(client.result(job, timeout=DEADLINE))
        async with asyncio.timeout(DEADLINE):
            while (await client.job(job)).state is not JobState.IN_PROGRESS:
                await client.wait([job], wait=0.05)
        started = time.monotonic()
        await client.cancel(job)
        result = await waiting
        assert time.monotonic() - started < 5.0, "a second, and some for a loaded machine"
        assert (result.state, result.outcome) == (JobState.CANCELLED, OutcomeKind.CANCELLED)


async def test_submitting_starts_nothing_and_leaves_the_job_to_the_next_process(settings: Settings) -> None:
    async with EmbeddedClient(settings) as client:
        job = await client.submit(spec(CommandPayload(argv=("true",))))
        assert client.worker_pid is None
        with pytest.raises(JobNotFound):
            await client.job("no-such-job")
    async with EmbeddedClient(settings) as client:
        assert (await client.result(job, timeout=DEADLINE)).state is JobState.COMPLETED


async def test_a_wait_that_is_over_says_so_and_the_job_goes_on(settings: Settings) -> None:
    async with EmbeddedClient(settings) as client:
        job = await client.submit(spec(CommandPayload(argv=("sleep", "0.5"))))
        with pytest.raises(WaitTimedOut):
            await client.result(job, timeout=0.01)
        assert (await client.result(job, timeout=DEADLINE)).state is JobState.COMPLETED


async def test_a_killed_worker_is_started_again_and_the_job_runs_again(settings: Settings, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    script = f"echo run >> {marks}; [ $(wc -l < {marks}) -gt 1 ] || exec sleep 1000"
    async with EmbeddedClient(settings) as client:
        job = await client.submit(spec(CommandPayload(argv=("sh", "-c", script))))
        waiting = asyncio.create_task(client.result(job, timeout=DEADLINE))
        await until_async(marks.exists, "the job starts")
        # The store must know of the start, too.
        while (await client.job(job)).state is not JobState.IN_PROGRESS:  # noqa: ASYNC110 - another process reports it
            await asyncio.sleep(0.05)
        first = client.worker_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert (await waiting).state is JobState.COMPLETED
        assert marks.read_text() == "run\nrun\n"
        assert client.worker_pid not in {first, None}
        attempts = (await client.job(job)).attempts
        assert [attempt.outcome for attempt in attempts] == [OutcomeKind.LOST, OutcomeKind.COMPLETED]


async def test_a_worker_that_cannot_start_is_an_error_with_its_words(settings: Settings, tmp_path: Path) -> None:
    async with EmbeddedClient(settings) as client:
        job = await client.submit(spec(CommandPayload(argv=("true",))))
        scratch = settings.storage.data_dir / "scratch"
        scratch.write_text("a file where a directory must be")
        with pytest.raises(WorkerError, match="scratch"):
            await client.result(job, timeout=DEADLINE)


async def test_a_job_that_the_own_worker_can_never_run_is_an_error_and_not_a_wait_for_ever(settings: Settings) -> None:
    """Such as one at isolation standard on a host without user namespaces: here, a label that no worker has."""
    needs = JobRequirements(isolation=Isolation.MINIMAL, labels={"zone": "moon"})
    async with EmbeddedClient(settings) as client:
        job = await client.submit(spec(CommandPayload(argv=("true",)), requirements=needs))
        for waiting in (client.result(job, timeout=DEADLINE), client.wait([job], wait=DEADLINE)):
            with pytest.raises(NotSupportedHere, match="it lacks the label zone=moon") as caught:
                await waiting
        assert job in caught.value.message
        assert "doctor" in (caught.value.hint or "")
        assert (await client.job(job)).state is JobState.PENDING, "nothing is lost"


async def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    with pytest.raises(StoreUnavailable, match="blocked"):
        async with EmbeddedClient(settings_for(blocked / "data")):
            raise AssertionError("opened")


async def test_closing_leaves_no_process_no_lock_and_no_scratch(settings: Settings) -> None:
    async with EmbeddedClient(settings) as client:
        job = await client.submit(spec(CommandPayload(argv=("true",))))
        await client.result(job, timeout=DEADLINE)
        pid = client.worker_pid
    data_dir = settings.storage.data_dir
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert list((data_dir / "sessions").iterdir()) == []
    assert list((data_dir / "submitters").iterdir()) == []
    assert list((data_dir / "scratch").iterdir()) == []


def start(data_dir: Path, total: int, seconds: str, marks: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), str(data_dir), "batch", str(total), seconds, str(marks)]
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def descendants_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_kill_9_of_the_parent_leaves_no_process_and_the_next_one_goes_on_at_once(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    total = 40
    first = start(tmp_path / "data", total, "0.05", marks)
    assert first.stdout is not None
    lines = [first.stdout.readline() for _ in range(5)]
    assert lines[0].startswith("created")
    family = descendants_of(first.pid)
    first.kill()
    first.wait()
    first.stdout.close()
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), "all are gone")
    assert family, "there was a worker"

    started = time.monotonic()
    second = start(tmp_path / "data", total, "0.05", marks)
    output, _ = second.communicate(timeout=DEADLINE)
    assert second.returncode == 0
    assert time.monotonic() - started < 30.0
    found, *results = output.splitlines()
    assert found.startswith("found")
    assert sorted(int(line.split()[0]) for line in results) == list(range(total))
    assert {line.split()[1] for line in results} == {"completed"}
    runs = sum(len(mark.read_text().splitlines()) for mark in marks.iterdir())
    assert total <= runs <= total + 2, "only what ran when the parent was killed ran twice"

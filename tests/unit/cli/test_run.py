"""`run` and `submit`: which words submit what, what is streamed where, and which exit code comes back."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import signal
import threading
from pathlib import Path

import msgspec
import pytest

from blixard.cli.main import run_command_line
from blixard.cli.output import ReaderGone
from blixard.cli.signals import SIGNALS, catch_signals
from blixard.domain.outcome import AttemptError, OutcomeKind
from blixard.domain.payload import CommandPayload, FunctionPayload, ScriptPayload, WasmPayload
from blixard.domain.requirements import Isolation
from blixard.domain.state_machine import JobState
from blixard.errors import ServerUnreachable, StoreUnavailable
from blixard.protocol.jobs import CancelReply
from tests.unit.cli.conftest import Shell
from tests.unit.cli.fake_client import Ending, FakeClient, FakeStore

WASM = hashlib.sha256(b"\0asm\x01\0\0\0rest").hexdigest()


@pytest.mark.parametrize(
    ("words", "kind", "name", "arguments"),
    [
        (["hello.py"], ScriptPayload, "hello.py", []),
        (["hello.py", "--", "--n", "3"], ScriptPayload, "hello.py", ["--n", "3"]),
        (["hello.py", "--", "a", "--", "b"], ScriptPayload, "hello.py", ["a", "--", "b"]),
        (["--name", "mine", "hello.py"], ScriptPayload, "mine", []),
        (["hello.py", "--name", "mine"], ScriptPayload, "mine", []),
        (["facts.py:measure"], FunctionPayload, "facts.py:measure", [[], {}]),
        (
            ["facts.py:measure", "a b", "3", "[1]", "null", '"3"'],
            FunctionPayload,
            "facts.py:measure",
            [["a b", 3, [1], None, "3"], {}],
        ),
        (["facts.py:measure", "--", "-3", "--x"], FunctionPayload, "facts.py:measure", [[-3, "--x"], {}]),
        (["tool.wasm", "--", "x"], WasmPayload, "tool.wasm", ["x"]),
        (["tool.wasm:add", "1", "2.5"], WasmPayload, "tool.wasm:add", [1, 2.5]),
        (["--", "/bin/ls", "-l"], CommandPayload, "ls", []),
        (["--", "hello.py"], CommandPayload, "hello.py", []),
    ],
)
def test_words_name_what_is_submitted(shell: Shell, words: list[str], kind: type, name: str, arguments: object) -> None:
    said = shell.run("submit", *words)
    assert said.code == 0
    (request,) = shell.client.requests
    assert type(request.spec.payload) is kind
    assert request.spec.name == name
    assert msgspec.json.decode(request.jobs[0].arguments) == arguments
    assert said.out == f"{next(iter(shell.store.jobs))}\n"


def test_the_payload_refers_to_blobs_that_are_stored(shell: Shell) -> None:
    for words in (["hello.py"], ["facts.py:measure"], ["tool.wasm"]):
        shell.run("submit", *words)
        payload = shell.client.requests[0].spec.payload
        match payload:
            case ScriptPayload(path=path, bundle=digest):
                assert path == "hello.py"
            case FunctionPayload(function=function, bundle=bundle):
                assert function == "facts:measure"
                digest = str(bundle)
            case WasmPayload(module=digest):
                assert digest == WASM
        assert digest in shell.store.blobs
    shell.run("submit", "--", "ls", "-l", "a b")
    assert shell.client.requests[0].spec.payload == CommandPayload(argv=("ls", "-l", "a b"))


def test_every_option_reaches_the_job(shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_SHELL", "inherited")
    (here / "sub").mkdir()
    (here / "sub/in.csv").write_text("1,2")
    said = shell.run(
        "submit", "--isolation", "minimal", "--timeout", "5m", "--retries", "2", "--name", "report", "--tag", "a", "--tag", "b",
        "--queue", "night", "--priority", "7", "--cpus", "1.5", "--memory", "2GiB", "--label", "zone=a", "--allow-read", "sub",
        "--allow-write", "/tmp", "--allow-net", "--env", "LEVEL=2", "--env", "FROM_SHELL", "--env", "EMPTY=",
        "--input", "sub/in.csv", "--input", str(here / "facts.py"), "--id", "my-job", "hello.py",
    )  # fmt: skip
    assert said.out == "my-job\n"
    (request,) = shell.client.requests
    spec, job = request.spec, request.jobs[0]
    assert spec.requirements.isolation is Isolation.MINIMAL
    assert (spec.timeout, spec.retry.retries, spec.name, spec.tags, spec.queue) == (
        300.0,
        2,
        "report",
        ("a", "b"),
        "night",
    )
    assert (spec.requirements.cpus, spec.requirements.memory_mb, spec.requirements.labels) == (1.5, 2048, {"zone": "a"})
    assert (spec.grants.read, spec.grants.write, spec.grants.network) == ((str(here / "sub"),), ("/tmp",), True)
    assert spec.environment == {"LEVEL": "2", "FROM_SHELL": "inherited", "EMPTY": ""}
    assert (job.id, job.priority) == ("my-job", 7)
    assert [item.path for item in job.inputs] == ["facts.py", "sub/in.csv"]
    assert shell.store.blobs[job.inputs[1].digest] == b"1,2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to run"),
        (["--"], "nothing to run"),
        (["ls"], "neither a .py nor a .wasm file"),
        (["missing.py"], "there is no file missing.py"),
        (["missing.wasm"], "there is no file missing.wasm"),
        (["hello.py", "x"], "'x' stands between the file and `--`"),
        (["hello.py", "--n", "3"], "no such option: --n"),
        (["facts.py:"], "no function is named"),
        (["facts.py:mesure"], "has no function 'mesure'"),
        (["facts.py:measure", "[1,"], "not valid JSON"),
        (["tool.wasm:add", "x"], "not a number"),
        (["text.wasm"], "not a WebAssembly module"),
        (["component.wasm"], "is a WebAssembly component"),
        (["--timeout", "-1", "hello.py"], "--timeout: '-1'"),
        (["--timeout", "0", "hello.py"], "timeout is 0 s"),
        (["--timeout", "1y", "hello.py"], "no unit 'y'"),
        (["--retries", "-1", "hello.py"], "retries is -1"),
        (["--retries", "many", "hello.py"], "--retries"),
        (["--isolation", "none", "hello.py"], "'none'"),
        (["--memory", "lots", "hello.py"], "--memory: 'lots'"),
        (["--cpus", "0", "hello.py"], "cpus is 0"),
        (["--env", "NOT_SET_ANYWHERE", "hello.py"], "NOT_SET_ANYWHERE is not set in this shell"),
        (["--env", "=x", "hello.py"], "cannot be the name of an environment variable"),
        (["--label", "zone", "hello.py"], "not of the form NAME=VALUE"),
        (["--allow-read", "nowhere", "hello.py"], "there is no file or directory"),
        (["--allow-read", "/", "hello.py"], "whole file system"),
        (["--input", "nowhere", "hello.py"], "there is no file nowhere"),
        (["--input", "facts.py", "--input", "./facts.py", "hello.py"], "would both be facts.py"),
        (["--include", "x", "--", "ls"], "--include is for Python code"),
        (["--id", "", "hello.py"], "id has 0 characters"),
        (["--id", "x" * 256, "hello.py"], "id has 256 characters"),
        (["--id", "a b", "hello.py"], "not an id"),
        (["--name", "x" * 256, "hello.py"], "name has 256 characters"),
        (["facts.py:measure", "x" * 1024 * 1024], "MAX_ARGUMENTS_BYTES"),
        (["--", "ls", "a\0b"], "command"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
@pytest.mark.parametrize("command", ["run", "submit"])
def test_a_mistake_submits_nothing_and_is_told_in_one_error(
    shell: Shell, here: Path, command: str, words: list[str], message: str
) -> None:
    (here / "text.wasm").write_text("(module)")
    (here / "component.wasm").write_bytes(b"\0asm\x0d\0\x01\0")
    said = shell.run(command, *words)
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err
    assert "Traceback" not in said.err
    assert shell.store.jobs == {}


def test_output_is_streamed_to_its_own_streams_and_the_result_comes_last(shell: Shell) -> None:
    output = (("stdout", b"one\n"), ("stderr", b"warning\n"), ("stdout", b"tw"), ("stdout", b"o\n"))
    shell.runner = lambda spec, job: Ending(result={"size": 3}, output=output)
    said = shell.run("run", "facts.py:measure", "abc")
    assert (said.code, said.out, said.err) == (0, 'one\ntwo\n{"size":3}\n', "warning\n")


@pytest.mark.usefixtures("here")
def test_output_that_is_no_text_passes_through(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    client = FakeClient(FakeStore(), lambda spec, job: Ending(output=(("stdout", b"\xff\x00\xfe"),)))
    assert run_command_line(["run", "hello.py"], connect=lambda config: client) == 0
    assert capsysbinary.readouterr().out == b"\xff\x00\xfe"


FAILED = OutcomeKind.FAILED


@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        (Ending(exit_code=0), 0, ""),
        (Ending(exit_code=None), 0, ""),
        (Ending(outcome=FAILED, exit_code=3), 3, "failed: exit code 3"),
        (Ending(outcome=FAILED, exit_code=137), 137, "failed: killed by SIGKILL"),
        (Ending(outcome=FAILED, exit_code=None), 1, "failed"),
        (Ending(outcome=FAILED, exit_code=0), 1, "failed"),
        (Ending(outcome=OutcomeKind.TIMED_OUT, exit_code=137), 124, "ran longer than its timeout"),
        (Ending(outcome=OutcomeKind.LOST, exit_code=None), 125, "lost its worker"),
        (Ending(outcome=OutcomeKind.CANCELLED, exit_code=None), 130, "was cancelled"),
    ],
)
def test_the_exit_code_tells_how_the_job_ended(shell: Shell, ending: Ending, code: int, message: str) -> None:
    shell.runner = lambda spec, job: ending
    said = shell.run("run", "hello.py")
    assert said.code == code
    assert message in said.err
    assert bool(message) == said.err.startswith("error: job ")


TRACEBACK = 'Traceback (most recent call last):\n  File "facts.py", line 2, in measure\nValueError: no good\n'


@pytest.mark.parametrize("written", [b"", TRACEBACK.encode()], ids=["not written by the job", "written by the job"])
def test_a_traceback_is_shown_once(shell: Shell, written: bytes) -> None:
    error = AttemptError(type="ValueError", message="no good", traceback=TRACEBACK, hint="try another")
    output = (("stderr", written),) if written else ()
    shell.runner = lambda spec, job: Ending(outcome=FAILED, exit_code=1, error=error, output=output)
    said = shell.run("run", "facts.py:measure")
    assert said.code == 1
    assert said.err.count("Traceback (most recent call last)") == 1
    assert "error: job " in said.err
    assert "failed: ValueError: no good\nhint: try another" in said.err


def test_an_error_starts_on_a_line_of_its_own(shell: Shell) -> None:
    shell.runner = lambda spec, job: Ending(outcome=FAILED, exit_code=1, output=(("stderr", b"no end of line"),))
    assert "no end of line\nerror: job" in shell.run("run", "hello.py").err


@pytest.mark.parametrize(
    "error", [ServerUnreachable("no answer from http://x"), StoreUnavailable("cannot open blixard.db")]
)
def test_no_store_is_125(shell: Shell, error: ServerUnreachable) -> None:
    shell.on_connect = lambda client: setattr(client, "open_error", error)
    said = shell.run("run", "hello.py")
    assert (said.code, said.out, said.err) == (125, "", f"error: {error.message}\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_cancels_the_job_and_waits_for_it(shell: Shell, number: signal.Signals, code: int) -> None:
    shell.runner = lambda spec, job: None
    shell.on_connect = lambda client: _send_when_waiting(client, number)
    said = shell.run("run", "hello.py")
    assert said.code == code
    assert "once more leaves at once" in said.err
    assert [job.state for job in shell.store.jobs.values()] == [JobState.CANCELLED]


def test_a_signal_that_our_caller_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    async def numbers() -> list[int]:
        with catch_signals():
            loop = asyncio.get_running_loop()
            return [number for number in SIGNALS if loop.remove_signal_handler(number)]

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert asyncio.run(numbers()) == [signal.SIGINT, signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def _send_when_waiting(client: FakeClient, number: int) -> None:
    real = client.waiting.set

    def send() -> None:
        if not client.waiting.is_set():
            real()
            threading.Timer(0, os.kill, (os.getpid(), number)).start()

    client.waiting.set = send  # type: ignore[method-assign]  # the moment at which somebody waits


def test_submit_says_how_the_job_will_run(shell: Shell) -> None:
    said = shell.run("submit", "hello.py")
    assert said.err == (
        "pending; no server owns this data directory: `blixard serve` or any waiting command will run it\n"
    )
    assert shell.run("-q", "submit", "hello.py").err == ""
    assert "no worker is online" in shell.run("--server", "http://127.0.0.1:1", "submit", "hello.py").err


def test_a_signal_that_comes_as_the_job_ends_is_no_mistake(shell: Shell) -> None:
    class Late(FakeClient):
        async def cancel(self, job_id: str) -> CancelReply:
            self._end(job_id, Ending(result="in time"))
            return await super().cancel(job_id)

    client = Late(shell.store, lambda spec, job: None)
    _send_when_waiting(client, signal.SIGINT)
    assert run_command_line(["run", "hello.py"], connect=lambda config: client) == 130


def test_large_arguments_travel_as_a_blob(shell: Shell) -> None:
    shell.run("submit", "facts.py:measure", "x" * 70_000)
    (job,) = shell.client.requests[0].jobs
    assert job.arguments_blob is not None
    assert msgspec.json.decode(shell.store.blobs[job.arguments_blob]) == [["x" * 70_000], {}]


def test_a_grant_is_not_looked_for_here_when_the_job_runs_elsewhere(shell: Shell) -> None:
    assert shell.run("--server", "http://127.0.0.1:1", "submit", "--allow-read", "/srv/there", "hello.py").code == 0


@pytest.mark.parametrize(
    ("error", "code"), [(ReaderGone(), 141), (OSError(errno.ENOSPC, "No space left on device", "standard output"), 125)]
)
def test_output_that_cannot_be_written_cancels_the_job(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def broken(data: bytes) -> None:
        raise error

    monkeypatch.setattr("blixard.cli.running.write_out", broken)

    class Slow(FakeClient):
        async def result(self, job_id: str, *, timeout: float | None = None):  # type: ignore[no-untyped-def]  # noqa: ANN202, ASYNC109  as the base
            job = self.store.jobs[job_id]
            job.ending = Ending(output=(("stdout", b"x"),))
            job.attempt, job.state = 1, JobState.IN_PROGRESS
            await asyncio.Event().wait()

    clients: list[FakeClient] = []

    def connect(config: object) -> FakeClient:
        clients.append(Slow(shell.store))
        return clients[-1]

    assert run_command_line(["run", "hello.py"], connect=connect) == code
    assert [job.state for job in shell.store.jobs.values()] == [JobState.CANCELLED]

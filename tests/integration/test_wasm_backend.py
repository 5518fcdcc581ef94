"""WasmBackend with guests of every kind, well-behaved and hostile, at both isolations."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from blixard.backends.contract import StopReason
from blixard.backends.wasm import compilation as compilation_module
from blixard.domain.grants import Grants
from blixard.domain.outcome import AttemptError, Outcome, OutcomeKind
from blixard.domain.payload import ScriptPayload
from blixard.domain.requirements import Isolation
from tests.conformance.backends.harness import wait_until
from tests.integration.wasm_rig import BOTH, DATA, INTERPRETER, Recorder, WasmRig

both = pytest.mark.parametrize("isolation", BOTH)


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="blixard-wasm-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
async def rig(root: Path) -> AsyncIterator[WasmRig]:
    rig = WasmRig(root)
    await rig.backend.start()
    yield rig
    await rig.backend.stop()


def error_of(outcome: Outcome) -> AttemptError:
    assert outcome.error is not None, outcome
    return outcome.error


def value_of(outcome: Outcome) -> object:
    assert outcome.kind is OutcomeKind.COMPLETED, outcome
    assert outcome.result is not None
    return msgspec.json.decode(outcome.result)


async def still_works(rig: WasmRig) -> None:
    assert value_of(await rig.call("hostile.wat", "fine")) == 42


# --- commands and functions


@both
async def test_a_command_writes_and_ends(rig: WasmRig, isolation: Isolation) -> None:
    observer = Recorder()
    outcome = await rig.execute(rig.execution(rig.module("hello.wat"), isolation=isolation), observer)
    assert (outcome.kind, outcome.exit_code, outcome.result) == (OutcomeKind.COMPLETED, 0, None)
    assert observer.text == "hello from wasm\n"
    assert outcome.output_bytes == 16


@both
async def test_python_for_wasi_computes(rig: WasmRig, isolation: Isolation) -> None:
    outcome, heard = await rig.python("print(6*7)", isolation=isolation)
    assert outcome.kind is OutcomeKind.COMPLETED, heard.data()
    assert heard.text == "42\n"


@pytest.mark.parametrize("code", [0, 1, 125, 126, 200, 255, 256, -1])
async def test_every_exit_code_is_passed_on(rig: WasmRig, code: int) -> None:
    outcome = await rig.call("hostile.wat", "exit", code)
    assert outcome.kind is (OutcomeKind.COMPLETED if code == 0 else OutcomeKind.FAILED)
    assert outcome.exit_code == {256: 1, -1: 255}.get(code, code)


@pytest.mark.parametrize(
    ("function", "values", "expected"),
    [
        ("add", [2, 3], 5),
        ("add", [2**31 - 1, 1], -(2**31)),
        ("add", [2**32 - 1, 1], 0),
        ("add64", [2**63 - 1, 0], 2**63 - 1),
        ("add64", [2**64 - 1, 2], 1),
        ("half", [3], 1.5),
        ("half", ["Infinity"], "Infinity"),
        ("divide", [0.0, 0.0], "NaN"),
        ("divide", [-1, 0], "-Infinity"),
        ("single", [0.5], 0.5),
        ("swap", [1, 2.5], [2.5, 1]),
        ("nothing", [], None),
        ("ready", [], 7),
    ],
)
async def test_an_exported_function_returns_its_values(
    rig: WasmRig, function: str, values: list[object], expected: object
) -> None:
    assert value_of(await rig.call("functions.wat", function, *values)) == expected


@pytest.mark.parametrize(
    ("function", "values", "kind", "words"),
    [
        ("add", [1], "InvalidArguments", "takes 2 arguments; 1 were given"),
        ("add", [1, 2, 3], "InvalidArguments", "3 were given"),
        ("add", [1, 2.5], "InvalidArguments", "argument 2 of add(i32, i32) -> (i32) is 2.5, which is no i32"),
        ("add", [1, 2**32], "InvalidArguments", "no i32"),
        ("add", [1, True], "InvalidArguments", "no i32"),
        ("add", [1, "2"], "InvalidArguments", "no i32"),
        ("add64", [1, 2**64], "InvalidArguments", "no i64"),
        ("single", [1e39], "InvalidArguments", "no f32"),
        ("half", ["half"], "InvalidArguments", "no f64"),
        ("half", [None], "InvalidArguments", "no f64"),
        ("missing", [], "FunctionNotFound", "exports no function 'missing'"),
        ("memory", [], "FunctionNotFound", "exports no function 'memory'"),
        ("reference", [1], "UnsupportedSignature", "JSON cannot carry"),
    ],
)
async def test_a_call_that_cannot_be_made_says_why(
    rig: WasmRig, function: str, values: list[object], kind: str, words: str
) -> None:
    outcome = await rig.call("functions.wat", function, *values)
    assert outcome.kind is OutcomeKind.FAILED
    assert error_of(outcome).type == kind
    assert words in error_of(outcome).message
    assert not error_of(outcome).retryable


@pytest.mark.parametrize("raw", [b"", b"{}", b"[1", b"3", b'[["nested"]]', b'["a\\u0000b"]'])
async def test_arguments_of_a_command_must_be_strings(rig: WasmRig, raw: bytes) -> None:
    outcome = await rig.execute(rig.execution(rig.module("hello.wat"), raw=raw))
    assert error_of(outcome).type == "InvalidArguments"


async def test_a_module_without_start_is_no_command(rig: WasmRig) -> None:
    outcome = await rig.execute(rig.execution(rig.module("functions.wat")))
    assert error_of(outcome).type == "NotACommand"
    assert "add" in (error_of(outcome).hint or "")


# --- modules that cannot run

COMPONENT = b"\0asm\x0d\0\x01\0"


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        (b"", "InvalidModule", "not a WebAssembly module"),
        (b"\0as", "InvalidModule", "not a WebAssembly module"),
        (b"#!/bin/sh\necho hello\n", "InvalidModule", "not a WebAssembly module"),
        (b"\0asm\x02\0\0\0", "InvalidModule", "unknown version"),
        (COMPONENT, "InvalidModule", "component"),
        (b"\0asm\x01\0\0\0\x01\x05", "InvalidModule", "offset"),
        (b"\0asm\x01\0\0\0" + b"\xff" * 4096, "InvalidModule", "not a valid"),
        ('(module (import "env" "foo" (func)))', "MissingImport", "env::foo"),
        ('(module (import "wasi_snapshot_preview1" "fd_write" (func)))', "MissingImport", "fd_write"),
        ('(module (import "wasi_unstable" "fd_write" (func)))', "MissingImport", "wasi_unstable"),
        ('(module (import "env" "memory" (memory 1)))', "MissingImport", "env::memory"),
        ('(module (memory 1) (memory 1) (func (export "_start")))', "InstantiationFailed", "memory"),
        ('(module (memory 60000) (func (export "_start")))', "MemoryLimit", "memory"),
        ("(module (memory 1 1 shared))", "InvalidModule", "threads"),
    ],
)
async def test_what_is_no_runnable_module_is_refused_with_its_reason(
    rig: WasmRig, source: str | bytes, kind: str, words: str
) -> None:
    outcome = await rig.execute(rig.execution(rig.module(source)))
    assert outcome.kind is OutcomeKind.FAILED
    assert error_of(outcome).type == kind, outcome
    assert words in error_of(outcome).message, outcome
    assert outcome.started_at is None or kind in {"InstantiationFailed", "MemoryLimit"}
    await still_works(rig)


async def test_webassembly_text_is_named_as_such(rig: WasmRig) -> None:
    outcome = await rig.execute(rig.execution(DATA / "hello.wat"))
    assert error_of(outcome).type == "InvalidModule"


async def test_a_module_that_is_not_there_is_an_outcome(rig: WasmRig) -> None:
    outcome = await rig.execute(rig.execution(rig.root / "none.wasm"))
    assert error_of(outcome).type == "ModuleMissing"


async def test_another_runtime_s_payload_is_refused(rig: WasmRig) -> None:
    execution = rig.execution(rig.module("hello.wat"))
    spec = msgspec.structs.replace(execution.spec, payload=ScriptPayload(path="a.py", bundle="b"))
    outcome = await rig.execute(msgspec.structs.replace(execution, spec=spec))
    assert error_of(outcome).type == "NotSupportedHere"


async def test_isolation_maximum_is_never_quietly_less(rig: WasmRig) -> None:
    outcome = await rig.execute(rig.execution(rig.module("hello.wat"), isolation=Isolation.MAXIMUM))
    assert error_of(outcome).type == "NotSupportedHere"


# --- hostile guests


@both
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("unreachable", "unreachable"),
        ("read_outside", "out of bounds memory access"),
        ("call_null", "uninitialized element"),
        ("recurse", "call stack exhausted"),
    ],
)
async def test_a_trap_is_told_with_its_backtrace(rig: WasmRig, isolation: Isolation, function: str, words: str) -> None:
    values = [1] if function == "recurse" else []
    outcome = await rig.call("hostile.wat", function, *values, isolation=isolation)
    assert (outcome.kind, outcome.exit_code) == (OutcomeKind.FAILED, 134)
    error = error_of(outcome)
    assert error.type == "WasmTrap"
    assert words in error.message
    assert "Wasm backtrace" in (error.traceback or "")
    assert len(error.traceback or "") < 8192
    await still_works(rig)


async def test_a_host_call_with_pointers_outside_the_memory_harms_nobody(rig: WasmRig) -> None:
    outcome = await rig.call("hostile.wat", "host_call_outside")
    assert outcome.kind in {OutcomeKind.FAILED, OutcomeKind.COMPLETED}
    if outcome.kind is OutcomeKind.COMPLETED:
        assert value_of(outcome) == 21  # errno "fault"
    await still_works(rig)


@both
@pytest.mark.parametrize("function", ["spin", "sleep"])
async def test_an_endless_guest_is_ended_by_its_timeout(rig: WasmRig, isolation: Isolation, function: str) -> None:
    outcome = await rig.call("hostile.wat", function, isolation=isolation, timeout=0.5)
    assert (outcome.kind, outcome.exit_code) == (OutcomeKind.TIMED_OUT, 124)
    assert error_of(outcome).type == "TimedOut"
    assert "0.5 s" in error_of(outcome).message
    await still_works(rig)


@both
@pytest.mark.parametrize("function", ["spin", "sleep"])
@pytest.mark.parametrize(
    ("reason", "kind"), [(StopReason.CANCEL, OutcomeKind.CANCELLED), (StopReason.KILL, OutcomeKind.LOST)]
)
async def test_an_endless_guest_is_ended_when_asked(
    rig: WasmRig, isolation: Isolation, function: str, reason: StopReason, kind: OutcomeKind
) -> None:
    observer = Recorder()
    execution = rig.execution(rig.module("hostile.wat"), function=function, isolation=isolation)
    task = asyncio.create_task(rig.execute(execution, observer))
    await observer.wait_started()
    rig.backend.interrupt(execution.ref, StopReason.RELEASE)  # what runs goes on
    asked = time.monotonic()
    rig.backend.interrupt(execution.ref, reason)
    outcome = await task
    assert outcome.kind is kind
    assert time.monotonic() - asked < 5.0
    await still_works(rig)


async def test_a_spinning_guest_leaves_its_executor_warm(rig: WasmRig) -> None:
    await still_works(rig)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    outcome = await rig.call("hostile.wat", "spin", timeout=0.3)
    # On a starved machine the executor may be killed before it notices the epoch; then there is no backtrace.
    if error_of(outcome).traceback is not None:
        assert "wasm function" in (error_of(outcome).traceback or "")
        await still_works(rig)
        assert before <= {process.pid for process in psutil.Process().children(recursive=True)}


@both
async def test_memory_stops_growing_at_the_limit(rig: WasmRig, isolation: Isolation) -> None:
    pages = value_of(await rig.call("hostile.wat", "grow", isolation=isolation, memory_mb=64))
    assert isinstance(pages, int)
    assert 48 * 16 <= pages <= 64 * 16


async def test_the_worker_s_default_bounds_memory_too(root: Path) -> None:
    rig = WasmRig(root, memory_mb=32)
    await rig.backend.start()
    pages = value_of(await rig.call("hostile.wat", "grow"))
    await rig.backend.stop()
    assert isinstance(pages, int)
    assert pages <= 32 * 16


async def test_a_table_cannot_grow_without_bound(rig: WasmRig) -> None:
    assert value_of(await rig.call("hostile.wat", "grow_table")) == -1


async def test_a_guest_out_of_memory_is_told_about_the_limit(rig: WasmRig) -> None:
    outcome, heard = await rig.python("x = bytearray(200_000_000)", memory_mb=64)
    assert outcome.kind is OutcomeKind.FAILED
    assert b"MemoryError" in heard.data() or error_of(outcome).hint


@both
async def test_a_flood_of_output_is_cut_at_the_cap(rig: WasmRig, isolation: Isolation) -> None:
    observer = Recorder()
    execution = rig.execution(
        rig.module("hostile.wat"), [20_000], function="flood", isolation=isolation, max_output_bytes=10_000
    )
    outcome = await rig.execute(execution, observer)
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.output_truncated
    assert outcome.output_bytes == 20_000 * 64
    assert len(observer.data()) == 10_000


async def test_one_write_of_many_buffers_is_bounded(rig: WasmRig) -> None:
    outcome = await rig.call("hostile.wat", "one_huge_write", max_output_bytes=1_000_000)
    assert outcome.kind is OutcomeKind.COMPLETED
    await still_works(rig)


async def test_fuel_bounds_what_a_guest_computes(root: Path) -> None:
    rig = WasmRig(root, wasm_fuel=1_000_000)
    await rig.backend.start()
    outcome = await rig.call("hostile.wat", "spin")
    fine = await rig.call("hostile.wat", "fine")
    await rig.backend.stop()
    assert error_of(outcome).type == "FuelExhausted"
    assert value_of(fine) == 42


async def test_a_module_that_takes_too_long_to_compile_is_refused(
    rig: WasmRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation_module, "MAX_COMPILE_SECONDS", 0.05)
    body = "(i32.add (i32.const 1) " * 400 + "(i32.const 1)" + ")" * 400
    functions = "".join(f'(func (export "f{n}") (result i32) {body})' for n in range(300))
    outcome = await rig.call(f'(module {functions} (data "{rig.root.name}") (memory 1))', "f1")
    assert error_of(outcome).type == "CompileTimeout"
    monkeypatch.undo()
    await still_works(rig)


# --- files


@both
async def test_single_files_are_granted_without_their_neighbours(rig: WasmRig, isolation: Isolation) -> None:
    home = rig.root / "home"
    home.mkdir()
    for name in ("read.txt", "write.txt", "secret.txt"):
        (home / name).write_text(name)
        (home / name).chmod(0o666)
    program = (
        "import os, sys\nh = sys.argv[1]\n"
        "print(sorted(os.listdir(h)), open(h + '/read.txt').read(), open('/data/in.txt').read())\n"
        "with open(h + '/write.txt', 'r+') as f: f.write('WRITE')\n"
    )
    outcome, heard = await rig.python(
        program,
        [str(home)],
        isolation=isolation,
        grants=Grants(read=(str(home / "read.txt"),), write=(str(home / "write.txt"),)),
        inputs={"/data/in.txt": home / "secret.txt"},
    )
    assert outcome.kind is OutcomeKind.COMPLETED, heard.data()
    assert heard.text == "['read.txt', 'write.txt'] read.txt secret.txt\n"
    assert (home / "write.txt").read_text() == "WRITE.txt"
    assert (home / "secret.txt").read_text() == "secret.txt"


@both
async def test_a_file_cannot_grow_beyond_the_disk_limit(root: Path, isolation: Isolation) -> None:
    rig = WasmRig(root, disk_mb=4)
    await rig.backend.start()
    program = (
        "try:\n    with open('big', 'wb') as f:\n        for _ in range(64): f.write(b'x' * 262144)\n"
        "except OSError as e: print('refused')\n"
    )
    outcome, heard = await rig.python(program, isolation=isolation)
    await still_works(rig)
    await rig.backend.stop()
    assert outcome.kind is OutcomeKind.COMPLETED, heard.data()
    assert heard.text == "refused\n"


async def test_a_missing_grant_is_the_job_s_failure(rig: WasmRig) -> None:
    outcome, _ = await rig.python("pass", grants=Grants(read=("/no/such/place",)))
    assert error_of(outcome).type == "GrantMissing"
    assert "/no/such/place" in error_of(outcome).message


# --- processes that die


def child_processes() -> list[psutil.Process]:
    return [*psutil.Process().children(recursive=True)]


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@both
async def test_a_killed_executor_loses_its_job_and_no_other(rig: WasmRig, isolation: Isolation) -> None:
    observers = [Recorder(), Recorder()]
    executions = [rig.execution(rig.module("hostile.wat"), function="spin", isolation=isolation) for _ in observers]
    tasks = [
        asyncio.create_task(rig.execute(execution, observer))
        for execution, observer in zip(executions, observers, strict=True)
    ]
    for observer in observers:
        await observer.wait_started()
    zygote = rig.backend.host.pid
    victim = next(child for child in psutil.Process(zygote).children() if child.status() != psutil.STATUS_ZOMBIE)
    victim.kill()
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=30)
    assert len(done) == len(pending) == 1
    lost = done.pop().result()
    assert lost.kind is OutcomeKind.LOST
    assert "SIGKILL" in error_of(lost).message
    for execution in executions:
        rig.backend.interrupt(execution.ref, StopReason.CANCEL)
    assert (await pending.pop()).kind is OutcomeKind.CANCELLED
    await still_works(rig)


@both
async def test_a_killed_zygote_loses_its_jobs_and_is_replaced(rig: WasmRig, isolation: Isolation) -> None:
    observer = Recorder()
    execution = rig.execution(rig.module("hostile.wat"), function="spin", isolation=isolation)
    task = asyncio.create_task(rig.execute(execution, observer))
    await observer.wait_started()
    zygote = rig.backend.host.pid
    assert zygote is not None
    os.kill(zygote, signal.SIGKILL)
    assert (await task).kind is OutcomeKind.LOST
    await still_works(rig)
    assert rig.backend.host.pid != zygote


async def test_executors_are_reused(rig: WasmRig) -> None:
    await still_works(rig)
    before = {child.pid for child in child_processes()}
    for _ in range(20):
        await still_works(rig)
    assert {child.pid for child in child_processes()} == before


async def test_stop_leaves_no_process_no_file_and_no_descriptor(root: Path) -> None:
    descriptors = open_descriptors()
    rig = WasmRig(root, wasm_cache=None)
    await rig.backend.start()
    await still_works(rig)
    observer = Recorder()
    execution = rig.execution(rig.module("hostile.wat"), function="spin", isolation=Isolation.STANDARD)
    task = asyncio.create_task(rig.execute(execution, observer))
    await observer.wait_started()
    children = child_processes()
    assert children
    await rig.backend.stop()
    assert (await task).kind is OutcomeKind.LOST
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert list((root / "scratch").rglob("*")) == []
    assert open_descriptors() - descriptors == set()


async def test_a_stopped_backend_can_be_started_again(rig: WasmRig) -> None:
    await rig.backend.stop()
    outcome = await rig.call("hostile.wat", "fine")
    assert outcome.kind is OutcomeKind.LOST
    await rig.backend.start()
    await still_works(rig)


async def test_a_job_that_compiles_can_be_cancelled(root: Path) -> None:
    rig = WasmRig(root, wasm_cache=None)
    await rig.backend.start()
    execution = rig.execution(INTERPRETER, ["-c", "pass"])
    task = asyncio.create_task(rig.execute(execution))
    await wait_until(lambda: bool(list((root / "scratch").rglob("*.part"))), "the compile to begin")
    rig.backend.interrupt(execution.ref, StopReason.CANCEL)
    assert (await task).kind is OutcomeKind.CANCELLED
    await rig.backend.stop()


async def test_jobs_that_share_a_new_module_compile_it_once(root: Path) -> None:
    rig = WasmRig(root, wasm_cache=root / "cache", slots=8)
    await rig.backend.start()
    outcomes = await asyncio.gather(*(rig.call("hostile.wat", "fine") for _ in range(8)))
    assert [value_of(outcome) for outcome in outcomes] == [42] * 8
    assert rig.backend.cache.compiled == 1
    await rig.backend.stop()


async def test_a_spoiled_artefact_is_made_again(root: Path) -> None:
    rig = WasmRig(root, wasm_cache=root / "cache", slots=1)
    await rig.backend.start()
    await still_works(rig)
    (artefact,) = (root / "cache").glob("*.cwasm")
    artefact.write_bytes(artefact.read_bytes()[:-100])
    await still_works(rig)
    assert rig.backend.cache.compiled == 2
    await rig.backend.stop()


async def test_many_jobs_at_once_keep_their_outputs_apart(rig: WasmRig) -> None:
    async def one(number: int) -> None:
        isolation = BOTH[number % 2]
        outcome, heard = await rig.python(f"print({number})", isolation=isolation)
        assert outcome.kind is OutcomeKind.COMPLETED
        assert heard.text == f"{number}\n"

    await asyncio.gather(*(one(number) for number in range(12)))


WORKER = """
import asyncio, sys
from pathlib import Path
from blixard.domain.requirements import Isolation
from tests.integration.wasm_rig import Recorder, WasmRig

async def main():
    rig = WasmRig(Path(sys.argv[1]))
    await rig.backend.start()
    heard = Recorder()
    execution = rig.execution(rig.module("hostile.wat"), function="spin", isolation=Isolation(sys.argv[2]))
    task = asyncio.create_task(rig.execute(execution, heard))
    await heard.wait_started()
    print("started", flush=True)
    await task

asyncio.run(main())
"""


@both
def test_everything_ends_with_a_killed_worker(root: Path, isolation: Isolation) -> None:
    command = [sys.executable, "-c", WORKER, str(root), str(isolation)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent.parent) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"started\n"
        children = psutil.Process(worker.pid).children(recursive=True)
        assert len(children) >= 2
        worker.kill()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive

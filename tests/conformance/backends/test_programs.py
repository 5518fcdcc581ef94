"""Programs on every backend: exit codes, streams, surroundings, files, limits, cancelling. The plain process is the oracle."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from pathlib import Path

import psutil
import pytest

from blixard.backends.contract import StopReason, Stream
from blixard.domain.grants import Grants
from blixard.domain.outcome import OutcomeKind

from .harness import BackendHarness, Capability, Rig, wait_until


def processes_named(marker: str) -> list[psutil.Process]:
    """Return the live processes with ``marker`` among their arguments."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if marker in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_every_capability_is_had_or_its_lack_explained(harness: BackendHarness) -> None:
    assert harness.capabilities | set(harness.lacks) == set(Capability)
    assert not harness.capabilities & set(harness.lacks)
    assert all(harness.lacks.values())


@pytest.mark.parametrize("code", [0, 1, 3, 100])
async def test_the_exit_code_decides(rig: Rig, code: int) -> None:
    outcome, _ = await rig.run(rig.program(f"import sys; sys.exit({code})"))
    assert outcome.kind is (OutcomeKind.COMPLETED if code == 0 else OutcomeKind.FAILED)
    assert outcome.exit_code == code
    assert (outcome.error is None) is (code == 0)


async def test_an_outcome_tells_when_it_ran(rig: Rig) -> None:
    before = time.time_ns() // 1000
    outcome, _ = await rig.run(rig.program("pass"))
    after = time.time_ns() // 1000
    assert outcome.started_at is not None
    assert outcome.finished_at is not None
    assert before - 1000 <= outcome.started_at <= outcome.finished_at <= after + 1000


@pytest.mark.requires(Capability.SIGNALS)
@pytest.mark.parametrize("number", [6, 9, 11, 15])
async def test_death_by_signal_is_a_failure_with_128_and_its_number(rig: Rig, number: int) -> None:
    outcome, _ = await rig.run(
        rig.program(
            f"import os, signal; signal.signal({number}, 0) if {number} != 9 else 0; os.kill(os.getpid(), {number}); signal.pause()"
        )
    )
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.exit_code == 128 + number
    assert outcome.error is not None
    assert outcome.error.type == "KilledBySignal"


async def test_both_streams_arrive_complete_and_in_order(rig: Rig) -> None:
    source = "import sys\nfor i in range(300):\n    print('out', i)\n    print('err', i, file=sys.stderr)\n"
    outcome, heard = await rig.run(rig.program(source))
    assert heard.stdout == "".join(f"out {i}\n" for i in range(300))
    assert heard.stderr == "".join(f"err {i}\n" for i in range(300))
    assert outcome.output_bytes == len(heard.data())
    assert not outcome.output_truncated


async def test_output_without_a_final_newline_arrives(rig: Rig) -> None:
    _, heard = await rig.run(rig.program("print('no newline', end='')"))
    assert heard.stdout == "no newline"


async def test_bytes_that_are_not_text_arrive_untouched(rig: Rig) -> None:
    _, heard = await rig.run(rig.program("import sys; sys.stdout.buffer.write(bytes(range(256)))"))
    assert heard.data(Stream.STDOUT) == bytes(range(256))


async def test_output_is_told_while_the_program_runs(rig: Rig) -> None:
    source = "import time\nprint('first', flush=True)\nwhile True: time.sleep(0.05)\n"
    running = rig.begin(rig.program(source))
    await running.observer.wait_for_output("first")
    rig.backend.interrupt(running.ref, StopReason.KILL)
    assert (await running.end()).kind is OutcomeKind.LOST


async def test_an_uncaught_exception_prints_its_traceback_and_exits_with_1(rig: Rig) -> None:
    outcome, heard = await rig.run(rig.program("def deep():\n    raise ValueError('reason')\ndeep()\n"))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.exit_code == 1
    assert "ValueError: reason" in heard.stderr
    assert "in deep" in heard.stderr


@pytest.mark.requires(Capability.PROGRAM_TRACEBACK)
async def test_an_uncaught_exception_is_told_in_the_error(rig: Rig) -> None:
    outcome, _ = await rig.run(rig.program("def deep():\n    raise ValueError('reason')\ndeep()\n"))
    assert outcome.error is not None
    assert (outcome.error.type, outcome.error.message) == ("ValueError", "reason")
    assert outcome.error.traceback is not None
    assert "in deep" in outcome.error.traceback
    assert "blixard" not in outcome.error.traceback


async def test_arguments_arrive_as_given(rig: Rig) -> None:
    words = ["", "two words", "ünïcode", "--flag", "$HOME", "a\nb"]
    _, heard = await rig.run(rig.program("import json, sys; print(json.dumps(sys.argv[1:]))", words))
    assert json.loads(heard.stdout) == words


async def test_nothing_of_the_worker_s_environment_is_inherited(rig: Rig) -> None:
    execution = rig.program(
        "import json, os; print(json.dumps(dict(os.environ)))", environment={"GREETING": "hello=you"}
    )
    _, heard = await rig.run(execution)
    seen = json.loads(heard.stdout)
    assert seen["GREETING"] == "hello=you"
    assert seen["BLIXARD_JOB_ID"] == execution.ref.job_id
    assert seen["BLIXARD_ATTEMPT"] == "1"
    assert seen["BLIXARD_NAMESPACE"] == "default"
    assert "BLIXARD_TEST_SECRET" not in seen
    usual = {
        "PATH",
        "HOME",
        "TMPDIR",
        "LANG",
        "PWD",
        "GREETING",
        "LC_CTYPE",
        "PYTHONHOME",
        "PYTHONPATH",
        "PYTHONDONTWRITEBYTECODE",
    }
    assert {name for name in seen if not name.startswith("BLIXARD_")} <= usual


PRIVATE_DIRECTORIES = """
import os, tempfile
for name in ("HOME", "TMPDIR"):
    directory = os.environ[name]
    assert os.listdir(directory) == [], (name, os.listdir(directory))
    open(directory + "/x", "w").close()
assert os.environ["LANG"] == "C.UTF-8"
assert os.environ["PATH"]
with tempfile.NamedTemporaryFile() as file:
    assert file.name.startswith(os.environ["TMPDIR"])
"""


@pytest.mark.requires(Capability.ENVIRONMENT_PATHS)
async def test_home_and_tmpdir_are_private_and_writable(rig: Rig) -> None:
    source = PRIVATE_DIRECTORIES
    for _ in range(3):
        outcome, heard = await rig.run(rig.program(source))
        assert outcome.kind is OutcomeKind.COMPLETED, heard.stderr


async def test_the_working_directory_is_private_and_empty(rig: Rig) -> None:
    source = "import os\nprint(sorted(os.listdir('.')))\nos.mkdir('d'); open('d/left', 'w').write('x'); open('left', 'w').write('x')\n"
    for _ in range(3):
        outcome, heard = await rig.run(rig.program(source))
        assert outcome.kind is OutcomeKind.COMPLETED, heard.stderr
        assert heard.stdout == "[]\n"


async def test_inputs_lie_at_their_paths(rig: Rig) -> None:
    inputs = {"a.txt": b"first", "deep/er/b.bin": bytes(range(256))}
    source = "print(open('a.txt').read(), open('deep/er/b.bin', 'rb').read() == bytes(range(256)))"
    for _ in range(2):
        outcome, heard = await rig.run(rig.program(source, inputs=inputs))
        assert outcome.kind is OutcomeKind.COMPLETED, heard.stderr
        assert heard.stdout == "first True\n"


async def test_what_a_job_does_to_an_input_stays_with_the_job(rig: Rig) -> None:
    source = (
        "import os\ntry:\n    os.chmod('a.txt', 0o600); open('a.txt', 'w').write('changed')\nexcept OSError: pass\n"
    )
    execution = rig.program(source, inputs={"a.txt": b"first"})
    await rig.run(execution)
    (blob,) = (path for digest, path in execution.blobs.items() if digest == execution.inputs[0].digest)
    assert blob.read_bytes() == b"first"


async def test_files_can_be_read_and_written_where_granted(rig: Rig) -> None:
    given, taken = rig.root / "given", rig.root / "taken"
    given.mkdir()
    taken.mkdir()
    taken.chmod(0o777)
    (given / "in.txt").write_text("input")
    (given / "in.txt").chmod(0o644)
    source = f"text = open({str(given / 'in.txt')!r}).read(); open({str(taken / 'out.txt')!r}, 'w').write(text.upper())"
    grants = Grants(read=(str(given),), write=(str(taken),))
    outcome, heard = await rig.run(rig.program(source, grants=grants))
    assert outcome.kind is OutcomeKind.COMPLETED, heard.stderr
    assert (taken / "out.txt").read_text() == "INPUT"


@pytest.mark.requires(Capability.FILES_PRIVATE)
async def test_what_was_not_granted_is_not_there(rig: Rig) -> None:
    secret = rig.root / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    outcome, heard = await rig.run(rig.program(f"open({str(secret)!r}).read()"))
    assert outcome.kind is OutcomeKind.FAILED
    assert "secret" not in heard.stdout


async def test_stdin_is_empty_unless_given(rig: Rig) -> None:
    source = "import sys; print(repr(sys.stdin.read()))"
    _, heard = await rig.run(rig.program(source))
    assert heard.stdout == "''\n"
    _, heard = await rig.run(rig.program(source, stdin=b"line 1\nline 2"))
    assert heard.stdout == "'line 1\\nline 2'\n"


async def test_a_program_that_runs_too_long_is_ended(rig: Rig) -> None:
    outcome, heard = await rig.run(rig.program("print('here', flush=True)\nwhile True: pass\n", timeout=3.0))
    assert outcome.kind is OutcomeKind.TIMED_OUT
    assert outcome.exit_code == 124
    assert outcome.error is not None
    assert outcome.error.type == "TimedOut"
    assert "3" in outcome.error.message
    assert heard.stdout == "here\n"


@pytest.mark.requires(Capability.MEMORY_LIMIT)
async def test_a_program_cannot_use_more_memory_than_its_limit(rig: Rig) -> None:
    source = "data = []\nfor _ in range(2000): data.append(bytes(b'x') * 1_000_000)\n"
    outcome, _ = await rig.run(rig.program(source, memory_mb=256))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error is not None


@pytest.mark.requires(Capability.MEMORY_LIMIT)
async def test_a_program_may_use_the_memory_of_its_limit(rig: Rig) -> None:
    outcome, heard = await rig.run(rig.program("data = b'x' * 100_000_000; print(len(data))", memory_mb=512))
    assert outcome.kind is OutcomeKind.COMPLETED, (outcome, heard.stderr)
    assert heard.stdout == "100000000\n"


async def test_output_beyond_the_cap_is_dropped_and_counted(rig: Rig) -> None:
    source = "import sys\nfor i in range(2000): sys.stdout.write('x' * 99 + '\\n')\nsys.stdout.flush()\nsys.exit(7)\n"
    outcome, heard = await rig.run(rig.program(source, max_output_bytes=1000))
    assert outcome.exit_code == 7
    assert outcome.output_truncated
    assert outcome.output_bytes == 200_000
    assert heard.data() == (b"x" * 99 + b"\n") * 10


async def test_output_of_exactly_the_cap_is_whole(rig: Rig) -> None:
    outcome, heard = await rig.run(rig.program("print('x' * 999)", max_output_bytes=1000))
    assert not outcome.output_truncated
    assert outcome.output_bytes == len(heard.data()) == 1000


async def test_much_output_does_not_stall_the_program(rig: Rig) -> None:
    source = "import sys\nblock = b'y' * 65535 + b'\\n'\nfor i in range(320): sys.stdout.buffer.write(block)\n"
    outcome, heard = await rig.run(rig.program(source, max_output_bytes=64 * 1024 * 1024))
    assert outcome.kind is OutcomeKind.COMPLETED
    assert len(heard.data()) == outcome.output_bytes == 320 * 65536
    assert not outcome.output_truncated


@pytest.mark.requires(Capability.PROCESSES)
async def test_output_of_child_processes_is_captured(rig: Rig) -> None:
    source = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import sys; print(\"child out\"); print(\"child err\", file=sys.stderr)'], check=True)\n"
    outcome, heard = await rig.run(rig.program(source))
    assert outcome.kind is OutcomeKind.COMPLETED, heard.stderr
    assert (heard.stdout, heard.stderr) == ("child out\n", "child err\n")


async def test_a_cancelled_program_ends(rig: Rig) -> None:
    running = rig.begin(rig.program("import time\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)\n"))
    await running.observer.wait_for_output("ready")
    rig.backend.interrupt(running.ref, StopReason.CANCEL)
    assert (await running.end()).kind is OutcomeKind.CANCELLED


# os.write: a handler that prints breaks the print that it interrupts ("reentrant call"), which may be the one of "ready".
CLEAN_UP = """
import os, signal, sys, time
def stop(*_):
    os.write(1, b"cleaned\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
os.write(1, b"ready\\n")
while True: time.sleep(0.05)
"""


@pytest.mark.requires(Capability.SIGNALS)
async def test_a_cancelled_program_can_clean_up(rig: Rig) -> None:
    source = CLEAN_UP
    running = rig.begin(rig.program(source))
    await running.observer.wait_for_output("ready")
    rig.backend.interrupt(running.ref, StopReason.CANCEL)
    assert (await running.end()).kind is OutcomeKind.CANCELLED
    assert running.observer.stdout == "ready\ncleaned\n"


@pytest.mark.requires(Capability.SIGNALS)
async def test_a_cancelled_program_that_ignores_sigterm_is_killed_after_the_grace_time(rig: Rig) -> None:
    source = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)\n"
    running = rig.begin(rig.program(source))
    await running.observer.wait_for_output("ready")
    asked = time.monotonic()
    rig.backend.interrupt(running.ref, StopReason.CANCEL)
    assert (await running.end()).kind is OutcomeKind.CANCELLED
    assert time.monotonic() - asked >= rig.settings.grace_seconds * 0.9


TREE = """
import os, subprocess, sys, time
sleeper = "import time, signal; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", sleeper, {marker!r}])
subprocess.Popen([sys.executable, "-c", sleeper, {marker!r}], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        subprocess.Popen([sys.executable, "-c", sleeper, {marker!r}], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(600)
    os._exit(0)
print("ready", flush=True)
{then}
"""


@pytest.mark.requires(Capability.PROCESSES_SEEN)
@pytest.mark.parametrize("reason", [StopReason.CANCEL, StopReason.KILL])
async def test_an_interrupt_ends_the_whole_tree_of_processes(rig: Rig, reason: StopReason) -> None:
    marker = uuid.uuid4().hex
    running = rig.begin(rig.program(TREE.format(marker=marker, then="time.sleep(600)")))
    await running.observer.wait_for_output("ready")
    await wait_until(lambda: len(processes_named(marker)) == 3, "three processes to start")
    rig.backend.interrupt(running.ref, reason)
    expected = {StopReason.CANCEL: OutcomeKind.CANCELLED, StopReason.KILL: OutcomeKind.LOST}
    assert (await running.end()).kind is expected[reason]
    assert processes_named(marker) == []


@pytest.mark.requires(Capability.PROCESSES_SEEN)
@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)", "os.kill(os.getpid(), 9)"])
async def test_processes_left_by_a_program_are_ended_with_it(rig: Rig, end: str) -> None:
    marker = uuid.uuid4().hex
    source = TREE.format(marker=marker, then="time.sleep(0.3)\n" + end)
    await rig.run(rig.program(source))
    assert processes_named(marker) == []


@pytest.mark.requires(Capability.PROCESSES_SEEN)
async def test_a_timeout_ends_the_whole_tree_of_processes(rig: Rig) -> None:
    marker = uuid.uuid4().hex
    outcome, _ = await rig.run(rig.program(TREE.format(marker=marker, then="time.sleep(600)"), timeout=3.0))
    assert outcome.kind is OutcomeKind.TIMED_OUT
    assert processes_named(marker) == []


async def test_a_job_that_waits_for_a_slot_can_be_given_back(rig: Rig) -> None:
    source = "import time\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)\n"
    blockers = [rig.begin(rig.program(source)) for _ in range(rig.settings.slots)]
    waiting = [rig.begin(rig.program("print('ran')")) for _ in range(3)]
    for blocker in blockers:
        await blocker.observer.wait_for_output("ready")
    for job, reason in zip(waiting, (StopReason.RELEASE, StopReason.CANCEL, StopReason.KILL), strict=True):
        rig.backend.interrupt(job.ref, reason)
    kinds = [(await job.end()).kind for job in waiting]
    assert kinds == [OutcomeKind.RELEASED, OutcomeKind.CANCELLED, OutcomeKind.LOST]
    assert all(job.observer.data() == b"" for job in waiting)
    for blocker in blockers:
        rig.backend.interrupt(blocker.ref, StopReason.RELEASE)
        assert not blocker.task.done()
        rig.backend.interrupt(blocker.ref, StopReason.KILL)
        assert (await blocker.end()).kind is OutcomeKind.LOST


async def test_interrupting_what_is_unknown_or_ended_does_nothing(rig: Rig) -> None:
    execution = rig.program("pass")
    for reason in StopReason:
        rig.backend.interrupt(execution.ref, reason)
    outcome, _ = await rig.run(execution)
    for reason in StopReason:
        rig.backend.interrupt(execution.ref, reason)
    assert outcome.kind is OutcomeKind.COMPLETED


async def test_cancelling_execute_ends_the_job(rig: Rig) -> None:
    running = rig.begin(rig.program("import time\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)\n"))
    await running.observer.wait_for_output("ready")
    running.task.cancel()
    await asyncio.wait([running.task])
    assert running.task.cancelled() or running.task.result().kind is OutcomeKind.LOST


async def test_started_is_told_once_for_a_job_that_runs_a_while(rig: Rig) -> None:
    running = rig.begin(rig.program("import time\nwhile True: time.sleep(0.05)\n"))
    await running.observer.wait(lambda: running.observer.started_at is not None)
    rig.backend.interrupt(running.ref, StopReason.KILL)
    outcome = await running.end()
    assert outcome.kind is OutcomeKind.LOST


async def test_stop_ends_what_runs_and_what_waits(rig: Rig) -> None:
    jobs = [
        rig.begin(rig.program("import time\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)\n"))
        for _ in range(4)
    ]
    await jobs[0].observer.wait_for_output("ready")
    await rig.backend.stop()
    kinds = {(await job.end()).kind for job in jobs}
    assert kinds <= {OutcomeKind.LOST, OutcomeKind.RELEASED}
    assert (await jobs[0].end()).kind is OutcomeKind.LOST


async def test_more_jobs_than_slots_all_run(rig: Rig) -> None:
    jobs = [rig.begin(rig.program(f"print({i})")) for i in range(8)]
    for i, job in enumerate(jobs):
        assert (await job.end()).kind is OutcomeKind.COMPLETED
        assert job.observer.stdout == f"{i}\n"


def descendants() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}


async def test_stop_leaves_no_process_and_no_file(harness: BackendHarness, root: Path, rig: Rig) -> None:
    source = "import time\nopen('file', 'w').write('x')\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)\n"
    done, _ = await rig.run(rig.program("open('file', 'w').write('x')"))
    running = rig.begin(rig.program(source))
    await running.observer.wait_for_output("ready")
    assert descendants()
    await rig.backend.stop()
    await running.end()
    assert done.kind is OutcomeKind.COMPLETED
    assert descendants() == set()
    assert list(rig.settings.scratch.rglob("*")) == []


async def test_start_and_stop_are_boring(harness: BackendHarness, rig: Rig) -> None:
    backend = harness.create(rig.settings)
    await backend.stop()
    await backend.start()
    await backend.start()
    await backend.stop()
    await backend.stop()


async def test_stop_during_start_leaves_nothing(harness: BackendHarness, rig: Rig) -> None:
    before = descendants()
    backend = harness.create(rig.settings)
    starting = asyncio.create_task(backend.start())
    await asyncio.sleep(0)  # sleep: one turn of the loop
    await backend.stop()
    await asyncio.gather(starting, return_exceptions=True)
    await backend.stop()
    assert descendants() <= before


async def test_info_names_what_the_harness_claims(harness: BackendHarness, rig: Rig) -> None:
    info = rig.backend.info()
    assert harness.isolation in info.isolations
    assert harness.isolation not in info.missing
    assert rig.program("pass").spec.runtime in info.runtimes

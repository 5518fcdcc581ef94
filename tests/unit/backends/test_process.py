"""What is ProcessBackend's own: pipelines, rebalancing, recycling, and every process that may die by violence."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any  # options of BackendSettings and JobSpec are passed through

import psutil
import pytest

from blixard.backends.attempt import MAX_PIPELINE, Pace
from blixard.backends.contract import BackendSettings, Execution, StopReason, Stream
from blixard.backends.executor.main import MAX_CALLS
from blixard.backends.process import ProcessBackend
from blixard.domain.grants import InputFile
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import CommandPayload, FunctionPayload, ScriptPayload, WasmPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec
from blixard.errors import NotSupportedHere

DEADLINE = 60.0
MINIMAL = JobRequirements(isolation=Isolation.MINIMAL)
PIDS = "import os\ndef job(): return [os.getpid(), os.getppid()]\n"
GATE = """
import os, time
def job(gate, log, i):
    if log:
        with open(log, "a") as file: file.write(f"{i}\\n")
    while gate and not os.path.exists(gate): time.sleep(0.005)
    return i
"""


class Ear:
    def __init__(self) -> None:
        self.started_at: list[int] = []
        self.data = b""

    def started(self, at: int) -> None:
        self.started_at.append(at)

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        self.data += data


class Jobs:
    """Makes executions of functions; equal sources share one spec."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._number = 0
        self._specs: dict[str, JobSpec] = {}

    def function(self, source: str, *args: object, **options: Any) -> Execution:
        key = repr((source, options))
        digest = f"{abs(hash(source)):064x}"[:64]
        if key not in self._specs:
            (self.root / digest).mkdir(exist_ok=True)
            (self.root / digest / "jobs.py").write_text(source)
            payload = FunctionPayload(function="jobs:job", bundle=digest)
            fields = {"requirements": MINIMAL, **options}
            self._specs[key] = JobSpec(name="test", payload=payload, **fields)
        arguments = json.dumps([list(args), {}]).encode()
        return Execution(ref=self.ref(), spec=self._specs[key], arguments=arguments, blobs={digest: self.root / digest})

    def command(self, *argv: str) -> Execution:
        return Execution(
            ref=self.ref(), spec=JobSpec(name="test", payload=CommandPayload(argv=argv), requirements=MINIMAL)
        )

    def ref(self) -> AttemptRef:
        self._number += 1
        return AttemptRef("default", f"job_{self._number}", 1)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path)


def make(tmp_path: Path, **options: Any) -> ProcessBackend:
    scratch = tmp_path / f"scratch-{uuid.uuid4().hex}"
    scratch.mkdir()
    return ProcessBackend(BackendSettings(scratch=scratch, **{"slots": 2, "grace_seconds": 1.0, **options}))


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[ProcessBackend]:
    backend = make(tmp_path)
    await backend.start()
    yield backend
    await backend.stop()


def begin(backend: ProcessBackend, execution: Execution) -> asyncio.Task[Outcome]:
    return asyncio.create_task(backend.execute(execution, Ear()))


async def run(backend: ProcessBackend, execution: Execution) -> Outcome:
    async with asyncio.timeout(DEADLINE):
        return await backend.execute(execution, Ear())


def value(outcome: Outcome) -> Any:
    assert outcome.result is not None, outcome
    return json.loads(bytes(outcome.result))


async def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        await asyncio.sleep(0.01)  # sleep: nothing announces it


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def zygote_of(backend: ProcessBackend) -> int:
    assert backend._zygote is not None
    assert backend._zygote.pid is not None
    return backend._zygote.pid


def test_the_pipeline_is_as_deep_as_the_pace_allows() -> None:
    pace = Pace()
    assert pace.depth == 1
    pace.learn(0.000_01)
    assert pace.depth == MAX_PIPELINE
    for _ in range(50):
        pace.learn(0.000_5)
    assert pace.depth == 4
    pace.slow_down(0.02)
    assert pace.depth == 1
    for _ in range(50):
        pace.learn(0.0)
    assert pace.depth == MAX_PIPELINE


async def test_a_long_job_does_not_hold_up_those_behind_it(backend: ProcessBackend, jobs: Jobs, tmp_path: Path) -> None:
    await asyncio.gather(*(run(backend, jobs.function(GATE, "", "", i)) for i in range(300)))
    gate = tmp_path / "gate"
    blocked = begin(backend, jobs.function(GATE, str(gate), "", -1))
    behind = [begin(backend, jobs.function(GATE, "", "", i)) for i in range(60)]
    async with asyncio.timeout(DEADLINE):
        assert [value(await job) for job in behind] == list(range(60))
    assert not blocked.done()
    gate.touch()
    assert value(await blocked) == -1


async def test_a_crash_runs_no_job_twice_and_none_never(backend: ProcessBackend, jobs: Jobs, tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = """
import os
def job(log, i):
    with open(log, "a") as file: file.write(f"{i}\\n")
    if i % 50 == 49: os.abort()
    return i
"""
    outcomes = await asyncio.gather(*(run(backend, jobs.function(source, str(log), i)) for i in range(500)))
    crashed = [i for i, outcome in enumerate(outcomes) if outcome.kind is OutcomeKind.FAILED]
    assert crashed == list(range(49, 500, 50))
    assert {outcome.exit_code for outcome in outcomes if outcome.kind is OutcomeKind.FAILED} == {128 + signal.SIGABRT}
    assert Counter(map(int, log.read_text().split())) == Counter(range(500))


async def test_an_executor_is_replaced_after_its_share_of_calls(tmp_path: Path, jobs: Jobs) -> None:
    backend = make(tmp_path, slots=1)
    await backend.start()
    try:
        first = value(await run(backend, jobs.function(PIDS)))[0]
        todo = iter(range(MAX_CALLS))

        async def some() -> None:
            for _ in todo:
                assert (await run(backend, jobs.function(PIDS))).kind is OutcomeKind.COMPLETED

        await asyncio.gather(*(some() for _ in range(200)))
        last = value(await run(backend, jobs.function(PIDS)))[0]
    finally:
        await backend.stop()
    assert first != last
    assert not is_alive(first)


async def test_an_executor_that_grew_is_replaced(tmp_path: Path, jobs: Jobs) -> None:
    backend = make(tmp_path, slots=1)
    await backend.start()
    try:
        source = "import os\ndef job(n):\n    b'x' * n\n    return os.getpid()\n"
        pids = [value(await run(backend, jobs.function(source, n))) for n in (1, 1, 400_000_000, 1)]
    finally:
        await backend.stop()
    assert pids[0] == pids[1] == pids[2] != pids[3]


@pytest.mark.parametrize(
    "trace",
    [
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))",
        "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
        "import subprocess; subprocess.Popen(['sleep', '600'])",
        "keep.extend(open('/dev/null') for _ in range(100))",
    ],
)
async def test_what_cannot_be_put_back_costs_the_executor(tmp_path: Path, jobs: Jobs, trace: str) -> None:
    backend = make(tmp_path, slots=1)
    await backend.start()
    try:
        source = f"import os\nkeep = []\ndef job(dirty):\n    if dirty:\n        {trace}\n    return os.getpid()\n"
        pids = [value(await run(backend, jobs.function(source, dirty))) for dirty in (0, 1, 0)]
    finally:
        await backend.stop()
    assert pids[0] == pids[1] != pids[2]
    assert not is_alive(pids[0])


async def test_an_idle_executor_makes_room_for_other_code(tmp_path: Path, jobs: Jobs) -> None:
    backend = make(tmp_path, slots=1)
    await backend.start()
    try:
        first = value(await run(backend, jobs.function(PIDS)))[0]
        second = value(await run(backend, jobs.function(PIDS + "# other code\n")))[0]
        assert first != second
        await wait_until(lambda: not is_alive(first), "the idle executor to end")
    finally:
        await backend.stop()


async def test_the_death_of_the_zygote_loses_what_ran_and_nothing_else(
    backend: ProcessBackend, jobs: Jobs, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    gate = str(tmp_path / "never")
    running = [begin(backend, jobs.function(GATE, gate, str(log), i)) for i in range(2)]
    waiting = [begin(backend, jobs.function(GATE, "", str(log), i)) for i in range(2, 20)]
    await wait_until(lambda: log.exists() and len(log.read_text().split()) == 2, "two jobs to run")
    old = zygote_of(backend)
    os.kill(old, signal.SIGKILL)
    async with asyncio.timeout(DEADLINE):
        assert [(await job).kind for job in running] == [OutcomeKind.LOST] * 2
        assert [value(await job) for job in waiting] == list(range(2, 20))
    assert zygote_of(backend) != old
    assert Counter(map(int, log.read_text().split())) == Counter(range(20))


async def test_the_death_of_a_supervisor_ends_its_job_as_lost(backend: ProcessBackend, jobs: Jobs) -> None:
    worker, supervisor = value(await run(backend, jobs.function(PIDS)))
    os.kill(supervisor, signal.SIGKILL)
    await wait_until(lambda: not is_alive(worker), "the executor to die with its supervisor")
    ran = begin(backend, jobs.command("sleep", "600"))
    await wait_until(lambda: bool(sleepers(backend)), "the command to start")
    (sleeper,) = sleepers(backend)
    os.kill(sleeper.ppid(), signal.SIGKILL)
    async with asyncio.timeout(DEADLINE):
        assert (await ran).kind is OutcomeKind.LOST
    await wait_until(lambda: not sleepers(backend), "the command to be ended")
    assert value(await run(backend, jobs.function(PIDS)))


def sleepers(backend: ProcessBackend) -> list[psutil.Process]:
    found = psutil.Process(zygote_of(backend)).children(recursive=True)
    return [process for process in found if process.name() == "sleep" and process.status() != psutil.STATUS_ZOMBIE]


HOST = """
import asyncio, sys
from pathlib import Path
from blixard.backends.contract import BackendSettings, Execution
from blixard.backends.process import ProcessBackend
from blixard.domain.lease import AttemptRef
from blixard.domain.payload import CommandPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec
from blixard.errors import NotSupportedHere

class Ear:
    def started(self, at): pass
    def output(self, at, stream, data): print(data.decode(), end="", flush=True)

async def main():
    backend = ProcessBackend(BackendSettings(scratch=Path(sys.argv[1]), slots=2))
    await backend.start()
    spec = JobSpec(name="x", payload=CommandPayload(argv=(sys.executable, "-c", sys.argv[2], sys.argv[3])),
                   requirements=JobRequirements(isolation=Isolation.MINIMAL))
    await backend.execute(Execution(ref=AttemptRef("default", "job", 1), spec=spec), Ear())

asyncio.run(main())
"""
TREE = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork(): os._exit(0)
print("ready", flush=True)
time.sleep(600)
"""


def test_kill_minus_9_of_the_worker_leaves_no_process(tmp_path: Path) -> None:
    marker = uuid.uuid4().hex
    command = [sys.executable, "-c", HOST, str(tmp_path), TREE, marker]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        assert [host.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
        below = psutil.Process(host.pid).children(recursive=True)
        assert len(below) >= 4
        host.kill()
    _, alive = psutil.wait_procs(below, timeout=DEADLINE)
    assert alive == []


async def test_a_zygote_that_cannot_start_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    backend = make(tmp_path)
    with pytest.raises(NotSupportedHere) as caught:
        await backend.start()
    assert caught.value.hint
    await backend.stop()


async def test_work_is_reported_lost_when_no_zygote_can_replace_a_dead_one(
    backend: ProcessBackend, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = [begin(backend, jobs.command("sleep", "600")) for _ in range(3)]
    await wait_until(lambda: len(sleepers(backend)) == 2, "two commands to start")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    os.kill(zygote_of(backend), signal.SIGKILL)
    async with asyncio.timeout(DEADLINE):
        outcomes = [await job for job in running]
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.LOST] * 3
    assert outcomes[2].error is not None
    assert "could not start" in outcomes[2].error.message


SHOW_DESCRIPTORS = """
import os, pathlib
def job(): return [os.path.realpath(path) for path in pathlib.Path("/proc/self/fd").iterdir()], os.getppid()
"""


def open_files_of(pid: int) -> list[str]:
    return [os.path.realpath(link) for link in Path(f"/proc/{pid}/fd").iterdir()]


async def test_supervisors_hold_the_session_s_lock_and_jobs_never_see_it(tmp_path: Path, jobs: Jobs) -> None:
    path = tmp_path / "session.lock"
    source = SHOW_DESCRIPTORS
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        backend = make(tmp_path, lock_fd=lock.fileno())
        await backend.start()
        try:
            seen, supervisor = value(await run(backend, jobs.function(source)))
            links = open_files_of(supervisor)
            printed = Ear()
            await backend.execute(jobs.command("ls", "-l", "/proc/self/fd"), printed)
        finally:
            await backend.stop()
    assert str(path) in links
    assert str(path) not in seen
    assert b"session.lock" not in printed.data
    assert len(printed.data.splitlines()) <= 5  # total, 0, 1, 2, and what ls reads


async def test_a_job_with_a_memory_limit_gets_a_process_of_its_own(backend: ProcessBackend, jobs: Jobs) -> None:
    needs = JobRequirements(isolation=Isolation.MINIMAL, memory_mb=512)
    pids = [value(await run(backend, jobs.function(PIDS, requirements=needs)))[0] for _ in range(2)]
    assert pids[0] != pids[1]
    assert not any(map(is_alive, pids))


async def test_a_job_with_cpus_is_bound_to_so_many_processors(backend: ProcessBackend, jobs: Jobs) -> None:
    needs = JobRequirements(isolation=Isolation.MINIMAL, cpus=0.5)
    source = "import os\ndef job(): return len(os.sched_getaffinity(0))\n"
    assert value(await run(backend, jobs.function(source, requirements=needs))) == 1


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("no-such-program-anywhere",), 127, "no-such-program-anywhere"),
        (("/etc/passwd",), 126, "/etc/passwd"),
        (("/no/such/place",), 127, "/no/such/place"),
    ],
)
async def test_a_command_that_cannot_run_says_why(
    backend: ProcessBackend, jobs: Jobs, argv: tuple[str, ...], code: int, words: str
) -> None:
    outcome = await run(backend, jobs.command(*argv))
    assert (outcome.kind, outcome.exit_code) == (OutcomeKind.FAILED, code)
    assert outcome.error is not None
    assert outcome.error.type == "CommandNotRunnable"
    assert words in outcome.error.message
    assert not outcome.error.retryable


async def test_an_input_at_an_absolute_path_needs_a_sandbox(
    backend: ProcessBackend, jobs: Jobs, tmp_path: Path
) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"x")
    inputs = (InputFile(path="/etc/motd2", digest="d"),)
    payload = FunctionPayload(function="os:getpid")
    for spec in (JobSpec(name="f", payload=payload, requirements=MINIMAL), jobs.command("true").spec):
        outcome = await run(
            backend,
            Execution(
                ref=jobs.ref(),
                spec=spec,
                arguments=b"[[],{}]" if spec.name == "f" else b"[]",
                inputs=inputs,
                blobs={"d": blob},
            ),
        )
        assert outcome.kind is OutcomeKind.FAILED
        assert outcome.error is not None
        assert "/etc/motd2" in outcome.error.message
        assert not outcome.error.retryable


async def test_a_runtime_of_another_backend_is_refused(backend: ProcessBackend, jobs: Jobs) -> None:
    spec = JobSpec(name="w", payload=WasmPayload(module="0" * 64), requirements=MINIMAL)
    outcome = await run(backend, Execution(ref=jobs.ref(), spec=spec))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error is not None
    assert outcome.error.type == "NotSupportedHere"


async def test_before_start_and_after_stop_jobs_are_given_back(tmp_path: Path, jobs: Jobs) -> None:
    backend = make(tmp_path)
    assert (await run(backend, jobs.function(PIDS))).kind is OutcomeKind.RELEASED
    await backend.start()
    assert (await run(backend, jobs.function(PIDS))).kind is OutcomeKind.COMPLETED
    await backend.stop()
    assert (await run(backend, jobs.function(PIDS))).kind is OutcomeKind.RELEASED
    await backend.start()
    assert (await run(backend, jobs.function(PIDS))).kind is OutcomeKind.COMPLETED
    await backend.stop()


async def test_scripts_with_threads_exit_handlers_and_forks_end_as_in_python(
    backend: ProcessBackend, jobs: Jobs, tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "helper.py").write_text("WORD = 'helped'\n")
    (tmp_path / "bundle" / "main.py").write_text("""
import atexit, os, sys, threading, time
import helper
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread", helper.WORD))).start()
pid = os.fork()
if pid == 0:
    print("child")
    sys.exit(5)
print("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), __name__, os.path.basename(sys.argv[0]))
""")
    spec = JobSpec(name="s", payload=ScriptPayload(path="main.py", bundle="b"), requirements=MINIMAL)
    ear = Ear()
    outcome = await backend.execute(Execution(ref=jobs.ref(), spec=spec, blobs={"b": tmp_path / "bundle"}), ear)
    assert outcome.kind is OutcomeKind.COMPLETED, outcome
    lines = ear.data.decode().splitlines()
    assert lines[0] == "child"
    assert set(lines) == {"child", "at exit", "thread helped", "status 5 __main__ main.py"}
    assert lines[-1] == "at exit"


async def test_interrupts_at_random_moments_keep_every_promise(tmp_path: Path, jobs: Jobs) -> None:
    """Cancel, release and kill hit pipelines of fast jobs: each ends once, no innocent one is hit, none runs twice."""
    seed = int(os.environ.get("BLIXARD_SEED", "0")) or time.time_ns() % 1_000_000
    print("seed", seed)
    random = __import__("random").Random(seed)
    backend = make(tmp_path, slots=2)
    await backend.start()
    log = tmp_path / "log"
    hit = Counter[StopReason]()
    try:
        await asyncio.gather(*(run(backend, jobs.function(GATE, "", "", i)) for i in range(100)))
        executions = [jobs.function(GATE, "", str(log), i) for i in range(2_000)]
        asked: dict[int, StopReason] = {}
        tasks = [begin(backend, execution) for execution in executions]
        await asyncio.sleep(0)  # sleep: one turn of the loop
        for i in sorted(random.sample(range(2_000), 600)):
            await asyncio.wait({tasks[max(0, i - random.randrange(0, 80))]})
            if not tasks[i].done():
                asked[i] = list(StopReason)[len(asked) % len(StopReason)]
                backend.interrupt(executions[i].ref, asked[i])
                hit[asked[i]] += 1
        async with asyncio.timeout(DEADLINE):
            outcomes = await asyncio.gather(*tasks)
    finally:
        await backend.stop()
    ran = Counter(map(int, log.read_text().split()))
    assert max(ran.values()) == 1
    for i, outcome in enumerate(outcomes):
        if i not in asked:
            assert outcome.kind is OutcomeKind.COMPLETED, (i, outcome)
        if outcome.kind is OutcomeKind.COMPLETED:
            assert ran[i] == 1
        if outcome.kind is OutcomeKind.RELEASED:
            assert ran[i] == 0
    assert min(hit[reason] for reason in StopReason) >= 3, hit

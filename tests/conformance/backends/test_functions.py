"""Python functions on every backend that has them."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
from pathlib import Path

import msgspec
import psutil
import pytest

from blixard.backends.contract import Execution, StopReason, Stream
from blixard.domain.grants import Grants
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import OutcomeKind
from blixard.domain.payload import Encoding, FunctionPayload
from blixard.domain.spec import JobSpec

from .harness import Capability, Recorder, Rig, wait_until

pytestmark = pytest.mark.requires(Capability.FUNCTIONS)

ADD = "def job(a, b=0): return a + b\n"
WAIT = "import time\ndef job():\n    print('ready', flush=True)\n    while True: time.sleep(0.05)\n"


async def test_a_function_is_called_with_its_arguments_and_its_value_is_the_result(rig: Rig) -> None:
    outcome, _ = await rig.run(rig.function(ADD, arguments=b'[[2],{"b":40}]'))
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.exit_code == 0
    assert outcome.result is not None
    assert json.loads(bytes(outcome.result)) == 42


@pytest.mark.parametrize("value", [None, True, 1.5, "text ü", [1, [2]], {"a": {"b": None}}])
async def test_json_values_come_back_as_they_went(rig: Rig, value: object) -> None:
    outcome, _ = await rig.run(rig.function("def job(x): return x\n", value))
    assert outcome.result is not None
    assert json.loads(bytes(outcome.result)) == value


async def test_msgpack_and_pickle_travel_as_base64(rig: Rig) -> None:
    source = "def job(x): return {'got': x}\n"
    packed = json.dumps(base64.b64encode(msgspec.msgpack.encode([[b"raw"], {}])).decode()).encode()
    outcome, _ = await rig.run(rig.function(source, encoding=Encoding.MSGPACK, arguments=packed))
    assert outcome.result is not None, outcome.error
    assert msgspec.msgpack.decode(base64.b64decode(json.loads(bytes(outcome.result)))) == {"got": b"raw"}
    packed = json.dumps(base64.b64encode(pickle.dumps([({1, 2},), {}])).decode()).encode()
    outcome, _ = await rig.run(rig.function(source, encoding=Encoding.PICKLE, arguments=packed))
    assert outcome.result is not None, outcome.error
    assert pickle.loads(base64.b64decode(json.loads(bytes(outcome.result)))) == {"got": {1, 2}}


async def test_an_exception_is_told_with_a_traceback_of_the_job_s_own_frames(rig: Rig) -> None:
    source = "class Odd(ValueError): pass\ndef inner():\n    raise Odd('the reason')\ndef job():\n    inner()\n"
    outcome, heard = await rig.run(rig.function(source))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.exit_code == 1
    assert outcome.error is not None
    assert (outcome.error.type, outcome.error.message, outcome.error.retryable) == ("Odd", "the reason", True)
    assert outcome.error.traceback is not None
    assert outcome.error.traceback.startswith("Traceback (most recent call last):")
    assert "in inner" in outcome.error.traceback
    assert "raise Odd('the reason')" in outcome.error.traceback
    assert "blixard" not in outcome.error.traceback
    assert heard.data() == b""


async def test_an_exception_can_say_that_retrying_is_useless(rig: Rig) -> None:
    source = "class Final(Exception):\n    __blixard_retryable__ = False\ndef job(): raise Final('no')\n"
    outcome, _ = await rig.run(rig.function(source))
    assert outcome.error is not None
    assert outcome.error.retryable is False


@pytest.mark.parametrize(("argument", "code"), [("", 0), ("0", 0), ("3", 3), ("'words'", 1)])
async def test_sys_exit_in_a_function_sets_the_exit_code(rig: Rig, argument: str, code: int) -> None:
    outcome, heard = await rig.run(rig.function(f"import sys\ndef job(): sys.exit({argument})\n"))
    assert outcome.kind is (OutcomeKind.FAILED if code else OutcomeKind.COMPLETED)
    assert outcome.exit_code == code
    assert heard.stderr == ("words\n" if argument == "'words'" else "")


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("def job(): pass\n", "jobs:other", ("other", "jobs")),
        ("def job(): pass\n", "nowhere:job", ("nowhere",)),
        ("job = 3\n", "jobs:job", ("job",)),
    ],
)
async def test_a_function_that_is_not_there_is_one_clear_error(
    rig: Rig, source: str, name: str, words: tuple[str, ...]
) -> None:
    outcome, _ = await rig.run(rig.function(source, name=name))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error is not None
    assert outcome.error.type == "FunctionNotFound"
    assert all(word in outcome.error.message for word in words)
    assert not outcome.error.retryable


async def test_an_error_while_importing_shows_its_traceback(rig: Rig) -> None:
    outcome, _ = await rig.run(rig.function("import json\n1 / 0\ndef job(): pass\n"))
    assert outcome.error is not None
    assert outcome.error.type == "ZeroDivisionError"
    assert outcome.error.traceback is not None
    assert "1 / 0" in outcome.error.traceback
    assert "importlib" not in outcome.error.traceback


async def test_a_result_that_is_no_json_is_one_clear_error(rig: Rig) -> None:
    outcome, _ = await rig.run(rig.function("def job(): return object()\n"))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error is not None
    assert outcome.error.type == "ResultNotSerializable"
    assert "object" in outcome.error.message


async def test_a_function_without_a_bundle_comes_from_the_interpreter(rig: Rig) -> None:
    needs = rig.requirements()
    spec = JobSpec(name="test", payload=FunctionPayload(function="operator:add"), requirements=needs)
    outcome, _ = await rig.run(Execution(ref=rig.next_ref(), spec=spec, arguments=b"[[1,2],{}]"))
    assert outcome.result is not None, outcome.error
    assert bytes(outcome.result) == b"3"


async def test_methods_decorated_and_async_functions_can_be_called(rig: Rig) -> None:
    source = """
import asyncio
class Tools:
    @staticmethod
    def double(x): return 2 * x
class Handle:
    def __init__(self, f): self.__blixard_function__ = f
    def __call__(self, *a): raise AssertionError("the decorated object must not be called")
@Handle
def decorated(x): return x + 1
async def later(x):
    await asyncio.sleep(0)  # sleep: one turn of the loop
    return x * 3
"""
    for name, value in (("jobs:Tools.double", 20), ("jobs:decorated", 11), ("jobs:later", 30)):
        outcome, _ = await rig.run(rig.function(source, 10, name=name))
        assert outcome.result is not None, outcome.error
        assert json.loads(bytes(outcome.result)) == value


async def test_large_arguments_and_results(rig: Rig) -> None:
    text = "x" * (1024 * 1024 - 100)
    outcome, _ = await rig.run(rig.function("def job(x): return x * 5\n", text))
    assert outcome.result is not None, outcome.error
    assert json.loads(bytes(outcome.result)) == text * 5


async def test_a_result_over_the_limit_is_one_clear_error(rig: Rig) -> None:
    outcome, _ = await rig.run(rig.function("def job(): return 'x' * (16 * 1024 * 1024)\n"))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error is not None
    assert outcome.error.type == "ResultTooLarge"
    assert "16777216" in outcome.error.message


@pytest.mark.requires(Capability.FUNCTION_STREAMS_ORDERED)
async def test_both_streams_of_a_function_keep_their_order(rig: Rig) -> None:
    source = "import sys\ndef job():\n    for i in range(50):\n        print(i)\n        print(i, file=sys.stderr)\n"
    _, heard = await rig.run(rig.function(source))
    assert heard.data().decode() == "".join(f"{i}\n{i}\n" for i in range(50))
    assert heard.stdout == "".join(f"{i}\n" for i in range(50))


@pytest.mark.requires(Capability.SHORT_JOBS)
async def test_output_goes_to_the_job_that_wrote_it(rig: Rig) -> None:
    source = "import os, sys\ndef job(i):\n    print('python', i)\n    sys.stdout.flush()\n    os.write(1, b'native %d\\n' % i)\n    os.write(2, b'error %d\\n' % i)\n"
    jobs = [rig.begin(rig.function(source, i)) for i in range(150)]
    for i, job in enumerate(jobs):
        outcome = await job.end()
        assert outcome.kind is OutcomeKind.COMPLETED
        assert sorted(job.observer.stdout.splitlines()) == [f"native {i}", f"python {i}"]
        assert job.observer.stderr == f"error {i}\n"
        assert outcome.output_bytes == len(job.observer.data())


async def test_much_native_output_of_a_function_does_not_stall(rig: Rig) -> None:
    source = "import os\ndef job():\n    for _ in range(160): os.write(1, b'z' * 65536)\n    return 'done'\n"
    outcome, heard = await rig.run(rig.function(source, max_output_bytes=32 * 1024 * 1024))
    assert outcome.kind is OutcomeKind.COMPLETED
    assert len(heard.data(Stream.STDOUT)) == 160 * 65536


@pytest.mark.requires(Capability.SHORT_JOBS)
async def test_many_jobs_all_come_back_with_their_own_result(rig: Rig) -> None:
    jobs = [rig.begin(rig.function("def job(i): return i * i\n", i)) for i in range(300)]
    for i, job in enumerate(jobs):
        outcome = await job.end()
        assert outcome.result is not None, outcome.error
        assert json.loads(bytes(outcome.result)) == i * i


async def test_jobs_start_in_the_order_of_the_calls(rig: Rig) -> None:
    log = rig.root / "order"
    log.mkdir()
    log.chmod(0o777)
    source = "import os\ndef job(path, i):\n    with open(path, 'a') as f: f.write(f'{i}\\n')\n"
    backend = rig.harness.create(msgspec.structs.replace(rig.settings, slots=1))
    await backend.start()
    try:
        grants = Grants(write=(str(log),))
        executions = [rig.function(source, str(log / "log"), i, grants=grants) for i in range(40)]
        outcomes = await asyncio.gather(*(backend.execute(e, Recorder()) for e in executions))
    finally:
        await backend.stop()
    assert {outcome.kind for outcome in outcomes} == {OutcomeKind.COMPLETED}, outcomes
    assert (log / "log").read_text().split() == [str(i) for i in range(40)]


@pytest.mark.requires(Capability.SIGNALS)
async def test_a_function_that_crashes_fails_alone(rig: Rig) -> None:
    source = "import os\ndef job(i):\n    if i % 10 == 3: os.kill(os.getpid(), 9)\n    return i\n"
    jobs = [rig.begin(rig.function(source, i)) for i in range(30)]
    for i, job in enumerate(jobs):
        outcome = await job.end()
        if i % 10 == 3:
            assert outcome.kind is OutcomeKind.FAILED
            assert outcome.exit_code == 137
            assert outcome.error is not None
            assert outcome.error.type == "KilledBySignal"
        else:
            assert outcome.kind is OutcomeKind.COMPLETED, outcome


async def test_a_function_that_ends_its_process_fails_with_that_exit_code(rig: Rig) -> None:
    outcome, _ = await rig.run(rig.function("import os\ndef job(): os._exit(5)\n"))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.exit_code == 5
    assert outcome.error is not None
    assert outcome.error.type == "ProcessExited"


async def test_a_function_cannot_use_more_memory_than_its_limit(rig: Rig) -> None:
    if Capability.MEMORY_LIMIT not in rig.harness.capabilities:
        raise AssertionError("a harness with functions needs memory limits")
    source = "def job(n):\n    return len(b'x' * n)\n"
    outcome, _ = await rig.run(rig.function(source, 2_000_000_000, memory_mb=256))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error is not None
    assert outcome.error.type == "MemoryLimit"
    assert "256" in outcome.error.message
    outcome, _ = await rig.run(rig.function(source, 50_000_000, memory_mb=256))
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.error


async def test_a_function_that_runs_too_long_is_ended(rig: Rig) -> None:
    outcome, heard = await rig.run(rig.function(WAIT, timeout=2.0))
    assert outcome.kind is OutcomeKind.TIMED_OUT
    assert outcome.exit_code == 124
    assert heard.stdout == "ready\n"


async def test_timeout_counts_from_the_start_of_each_job(rig: Rig) -> None:
    source = "import time\ndef job(): time.sleep(0.3)\n"
    jobs = [rig.begin(rig.function(source, timeout=3.0)) for _ in range(16)]
    assert [(await job.end()).kind for job in jobs] == [OutcomeKind.COMPLETED] * 16


async def test_a_function_can_be_cancelled_and_its_neighbours_go_on(rig: Rig) -> None:
    running = rig.begin(rig.function(WAIT))
    await running.observer.wait_for_output("ready")
    neighbours = [rig.begin(rig.function(ADD, i)) for i in range(20)]
    rig.backend.interrupt(running.ref, StopReason.CANCEL)
    assert (await running.end()).kind is OutcomeKind.CANCELLED
    assert [(await job.end()).kind for job in neighbours] == [OutcomeKind.COMPLETED] * 20


CLEAN_UP = """
import signal, time
def job():
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    print("ready", flush=True)
    while not ended: time.sleep(0.01)
    print("cleaned")
"""


@pytest.mark.requires(Capability.SIGNALS)
async def test_functions_that_clean_up_when_cancelled_leave_their_slot_free(rig: Rig) -> None:
    for _ in range(rig.settings.slots + 1):
        running = rig.begin(rig.function(CLEAN_UP))
        await running.observer.wait_for_output("ready")
        rig.backend.interrupt(running.ref, StopReason.CANCEL)
        assert (await running.end()).kind is OutcomeKind.CANCELLED
        assert running.observer.stdout == "ready\ncleaned\n"
    assert (await rig.run(rig.function(ADD, 1)))[0].kind is OutcomeKind.COMPLETED


async def test_a_job_can_be_cancelled_at_any_moment_of_its_start(rig: Rig) -> None:
    for turns in range(1, 21):
        running = rig.begin(rig.program("import time\ntime.sleep(600)"))
        for _ in range(turns):
            await asyncio.sleep(0)  # sleep: one turn of the loop
        rig.backend.interrupt(running.ref, StopReason.CANCEL)
        assert (await running.end()).kind is OutcomeKind.CANCELLED
    assert (await rig.run(rig.function(ADD, 1)))[0].kind is OutcomeKind.COMPLETED


HOSTILE = """
import array, msgspec, os, socket
def send(data, descriptors=()):
    channel = socket.socket(fileno=os.dup(3))
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    channel.sendmsg([data], ancillary)
def memory(size):
    descriptor = os.memfd_create("m")
    os.truncate(descriptor, size)
    return descriptor
def answer(number, **fields):
    known = dict(started=1, finished=2, duration=0.0, code=0, result=b"1", error=None) | fields
    return msgspec.msgpack.encode([number, *known.values()])
def job(how):
    {
        "garbage": lambda: send(b"\\xff garbage"),
        "empty struct": lambda: send(b"\\x90"),
        "foreign answer": lambda: send(answer(10**9)),
        "two answers": lambda: [send(answer(n)) for n in range(1, 2000) for _ in range(2)],
        "huge": lambda: send(b"M", [memory(64 << 20)]),
        "no memory": lambda: send(b"M", [os.pipe()[0]]),
        "descriptors": lambda: [send(b"1x", [0] * 8) for _ in range(50)] and send(b"\\xff"),
    }[how]()
    while True: os.read(0, 1)
"""


@pytest.mark.parametrize(
    "how", ["garbage", "empty struct", "foreign answer", "two answers", "huge", "no memory", "descriptors"]
)
async def test_a_job_that_meddles_with_our_channel_fails_alone(rig: Rig, how: str) -> None:
    await rig.run(rig.function(ADD, 1))
    before = open_descriptors()
    outcome, _ = await rig.run(rig.function(HOSTILE, how))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error is not None
    assert outcome.error.type == "ChannelMisused"
    assert (await rig.run(rig.function(ADD, 1)))[0].kind is OutcomeKind.COMPLETED
    assert open_descriptors() <= before + 16


async def test_a_forged_answer_harms_nobody_else(rig: Rig) -> None:
    source = HOSTILE.replace("how)", "fields)").partition("    {")[0]
    source += "    fields = {k: v.encode() if k == 'result' else v for k, v in fields.items()}\n"
    source += "    for n in range(100): send(answer(n, **fields))\n"
    for fields in (
        {"result": "{"},
        {"started": 2**64 - 1},
        {"code": 10**6},
        {"error": {"type": "x" * 10**6, "message": "y" * 10**5}},
    ):
        outcome, _ = await rig.run(rig.function(source, fields))
        assert msgspec.json.decode(msgspec.json.encode(outcome))
        assert len(msgspec.json.encode(outcome)) < 100_000
        assert outcome.started_at is None or outcome.started_at < 2**62
        assert outcome.exit_code is None or 0 <= outcome.exit_code <= 255


async def test_stdin_of_a_function_is_empty(rig: Rig) -> None:
    outcome, _ = await rig.run(rig.function("import sys\ndef job(): return sys.stdin.read()\n"))
    assert outcome.result is not None, outcome.error
    assert bytes(outcome.result) == b'""'


async def test_inputs_of_a_function_lie_in_its_working_directory(rig: Rig) -> None:
    outcome, _ = await rig.run(rig.function("def job(): return open('in.txt').read()\n", inputs={"in.txt": b"given"}))
    assert outcome.result is not None, outcome.error
    assert bytes(outcome.result) == b'"given"'


LEAVE = """
import os, signal, sys, builtins
def job(what):
    seen = {
        "variable": os.environ.get("LEFT"),
        "directory": sorted(os.listdir(".")),
        "handler": str(signal.getsignal(signal.SIGUSR1)),
        "umask": os.umask(0o22),
        "argv": sys.argv,
        "stdout": type(sys.stdout).__name__,
        "home": sorted(os.listdir(os.environ["HOME"])),
        "alarm": signal.getitimer(signal.ITIMER_REAL)[0],
    }
    os.environ["LEFT"] = "1"
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 3600)
    os.umask(0o77)
    sys.argv = ["changed"]
    open("left", "w").close()
    os.makedirs("deep/er"); os.chmod("deep", 0)
    open(os.path.join(os.environ["HOME"], "left"), "w").close()
    os.chdir("/")
    sys.stdout = open(os.devnull, "w")
    return seen
"""


async def test_nothing_of_one_job_is_seen_by_the_next(rig: Rig) -> None:
    outcomes = [(await rig.run(rig.function(LEAVE, i)))[0] for i in range(4)]
    seen = [json.loads(bytes(outcome.result or b"null")) for outcome in outcomes]
    assert all(outcome.kind is OutcomeKind.COMPLETED for outcome in outcomes), outcomes
    assert seen[0]["variable"] is None
    assert seen[0]["directory"] == []
    assert all(other == seen[0] for other in seen[1:]), seen


LEAVE_RUNNING = """
import subprocess, threading, time
def job():
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    subprocess.Popen(['sleep', '600'], start_new_session=True)
    return 1
"""


def sleeping() -> set[int]:
    """Return the processes named sleep; those that end meanwhile, anybody's, are no error."""
    return {process.pid for process in psutil.process_iter(["name"]) if process.info["name"] == "sleep"}


@pytest.mark.requires(Capability.PROCESSES)
async def test_processes_and_threads_left_by_a_function_are_ended(rig: Rig) -> None:
    source = LEAVE_RUNNING
    before = sleeping()
    outcome, _ = await rig.run(rig.function(source))
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.error
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    assert sleeping() & ours <= before


@pytest.mark.requires(Capability.WARM)
async def test_jobs_reuse_a_warm_process(rig: Rig) -> None:
    source = "import os\ndef job(): return os.getpid()\n"
    pids = {bytes((await rig.run(rig.function(source)))[0].result or b"") for _ in range(20)}
    assert 1 <= len(pids) <= rig.settings.slots


def open_descriptors() -> int:
    return psutil.Process().num_fds()


@pytest.mark.requires(Capability.SHORT_JOBS)
async def test_no_descriptor_is_left_after_many_jobs(rig: Rig) -> None:
    async def fifty() -> None:
        await asyncio.gather(*(rig.run(rig.function(ADD, i)) for i in range(50)))

    await fifty()
    before = open_descriptors()
    for _ in range(4):
        await fifty()
    await wait_until(lambda: open_descriptors() <= before, "descriptors to be closed")


async def test_directories_of_ended_jobs_are_empty(rig: Rig) -> None:
    source = "import os\ndef job(i):\n    os.makedirs(f'a/b{i}'); open(f'a/b{i}/c', 'w').close(); os.symlink('/etc', 'link')\n"
    await asyncio.gather(*(rig.run(rig.function(source, i)) for i in range(40)))

    def left() -> list[Path]:
        return [p for p in rig.settings.scratch.rglob("*") if p.is_symlink() or not p.is_dir()]

    await wait_until(lambda: left() == [], "the files of ended jobs to be removed")


@pytest.mark.requires(Capability.LIVE_GRANTS)
async def test_release_gives_back_what_has_not_started_and_lets_run_what_has(rig: Rig) -> None:
    source = "import os, time\ndef job(path):\n    print('ready', flush=True)\n    while not os.path.exists(path): time.sleep(0.01)\n    return 'finished'\n"
    gate = rig.root / "gate"
    gate.mkdir()
    gate.chmod(0o755)
    grants = Grants(read=(str(gate),))
    jobs = [rig.begin(rig.function(source, str(gate / "open"), grants=grants)) for _ in range(rig.settings.slots + 10)]
    running = jobs[: rig.settings.slots]
    for job in running:
        await job.observer.wait_for_output("ready")
    for job in jobs:
        rig.backend.interrupt(job.ref, StopReason.RELEASE)
    for job in jobs[rig.settings.slots :]:
        assert (await job.end()).kind is OutcomeKind.RELEASED
        assert job.observer.data() == b""
    (gate / "open").touch()
    for job in running:
        assert (await job.end()).kind is OutcomeKind.COMPLETED


async def test_the_same_job_may_run_again_as_another_attempt(rig: Rig) -> None:
    first = rig.function(ADD, 1)
    again = msgspec.structs.replace(first, ref=AttemptRef("default", first.ref.job_id, 2))
    kinds = [(await rig.run(e))[0].kind for e in (first, again)]
    assert kinds == [OutcomeKind.COMPLETED] * 2

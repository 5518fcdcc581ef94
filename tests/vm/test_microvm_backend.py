"""The backend in real virtual machines: what the suite of all backends cannot ask, and every fault that a guest can have."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from blixard.backends.contract import BackendSettings, StopReason
from blixard.domain.grants import Grants
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.vm.agent_link import GuestExit, Program, ProgramOrder, run_program
from blixard.vm.lease import VmLease, VmNeed
from tests.conformance.backends.harness import BackendHarness, Rig, Running, wait_until
from tests.conformance.backends.harness_microvm import HARNESSES, OwnMachines
from tests.vm.leaser import DirectLease

WAIT = "import time\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)\n"
BY_NAME = {harness.name: harness for harness in HARNESSES}


async def make_rig(harness: BackendHarness, root: Path, **settings: int) -> Rig:
    scratch = root / "scratch"
    scratch.mkdir(mode=0o700, exist_ok=True)
    made = BackendSettings(scratch=scratch, slots=2, grace_seconds=3.0, **{**harness.settings, **settings})
    backend = harness.create(made)
    await backend.start()
    return Rig(harness, backend, root, made)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """Fresh clones."""
    with tempfile.TemporaryDirectory(prefix="vm-backend-") as name:
        made = await make_rig(BY_NAME["microvm-script"], Path(name))
        yield made
        await made.backend.stop()
        assert machines() == []


@pytest.fixture
async def service() -> AsyncIterator[Rig]:
    """One machine that serves job after job."""
    with tempfile.TemporaryDirectory(prefix="vm-backend-") as name:
        made = await make_rig(BY_NAME["microvm-service"], Path(name))
        yield made
        await made.backend.stop()
        assert machines() == []


def machines() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "qemu" in p.name() and p.status() != "zombie"]


def lease_of(rig: Rig) -> DirectLease:
    """Return the one machine there is."""
    assert isinstance(rig.backend, OwnMachines)
    (lease,) = rig.backend.leaser.leases
    return lease


async def execute_in(rig: Rig, *argv: str) -> tuple[GuestExit, bytes, bytes]:
    """Run a program as root beside the job."""
    async with asyncio.timeout(60):
        return await run_program(lease_of(rig).link, argv)


def provoke(rig: Rig, *argv: str) -> None:
    """Start a program as root whose end nobody will hear of."""
    Program(lease_of(rig).link, ProgramOrder(argv=argv))


async def begin_waiting(rig: Rig) -> Running:
    running = rig.begin(rig.program(WAIT))
    await running.observer.wait_for_output("ready")
    return running


def assert_lost(outcome: Outcome, *words: str) -> None:
    assert outcome.kind is OutcomeKind.LOST
    assert outcome.error is not None
    assert "virtual machine was lost" in outcome.error.message
    assert any(word in outcome.error.message for word in words), outcome.error.message


# -- what a machine of one's own gives --------------------------------------------------------------------------------


async def test_a_function_runs_in_a_fresh_clone(rig: Rig) -> None:
    source = (
        "import os, sys\ndef job(x):\n    print('seen', file=sys.stderr)\n    return [x, os.getuid(), os.getcwd()]\n"
    )
    outcome, heard = await rig.run(rig.function(source, 7))
    assert outcome.result is not None, outcome.error
    assert json.loads(bytes(outcome.result)) == [7, 1000, "/work"]
    assert heard.stderr == "seen\n"


async def test_a_job_is_nobody_of_power_and_sees_no_network(rig: Rig) -> None:
    source = (
        "import os\n"
        "print(open('/proc/self/status').read())\n"
        "print(sorted(os.listdir('/sys/class/net')))\n"
        "for path in ('/etc/x', '/x', '/bundle/x', '/run/x', '/dev/vda'):\n"
        "    try: open(path, 'w'); print('WROTE', path)\n"
        "    except OSError: pass\n"
    )
    outcome, heard = await rig.run(rig.program(source))
    assert outcome.kind is OutcomeKind.COMPLETED, heard.stderr
    assert "NoNewPrivs:\t1" in heard.stdout
    assert "CapEff:\t0000000000000000" in heard.stdout
    assert "['lo']" in heard.stdout
    assert "WROTE" not in heard.stdout


async def test_what_a_job_changes_in_granted_files_comes_back(rig: Rig) -> None:
    place = rig.root / "granted"
    (place / "sub").mkdir(parents=True)
    for name in ("kept", "changed", "removed", "sub/deep"):
        (place / name).write_text(name)
    kept = (place / "kept").stat()
    source = (
        f"import os\nos.chdir({str(place)!r})\n"
        "open('changed', 'w').write('new'); os.remove('removed'); os.remove('sub/deep'); os.rmdir('sub')\n"
        "os.makedirs('made/here'); open('made/here/file', 'wb').write(bytes(3_000_000)); os.symlink('changed', 'link')\n"
    )
    outcome, heard = await rig.run(rig.program(source, grants=Grants(write=(str(place),))))
    assert outcome.kind is OutcomeKind.COMPLETED, (outcome.error, heard.stderr)
    found = {str(path.relative_to(place)) for path in place.rglob("*")}
    assert found == {"kept", "changed", "made", "made/here", "made/here/file", "link"}
    assert (place / "changed").read_text() == "new"
    assert (place / "made/here/file").stat().st_size == 3_000_000
    assert (place / "link").readlink() == Path("changed")
    assert (place / "kept").stat().st_mtime_ns == kept.st_mtime_ns


async def test_what_is_granted_for_reading_cannot_be_written(rig: Rig) -> None:
    place = rig.root / "granted"
    place.mkdir()
    (place / "f").write_text("as it was")
    outcome, _ = await rig.run(rig.program(f"open({str(place / 'f')!r}, 'w')", grants=Grants(read=(str(place),))))
    assert outcome.kind is OutcomeKind.FAILED
    assert (place / "f").read_text() == "as it was"


async def test_nothing_of_a_job_is_left_in_a_machine_that_serves_on(service: Rig) -> None:
    source = (
        "import os, subprocess, sys\n"
        "for name in ('/tmp', '/var/tmp', '/dev/shm', os.environ['HOME'], '/work'): open(name + '/LEFT', 'w')\n"
        "child = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "subprocess.Popen(child); subprocess.Popen(child, start_new_session=True)\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: os.execv(sys.executable, child)\n    os._exit(0)\n"
    )
    look = "find / -xdev -name LEFT; find /tmp /var/tmp /dev/shm /run -name LEFT; ps -u 1000 -o pid= | wc -l; ls /run/blixard | wc -l"
    for _ in range(3):
        outcome, heard = await service.run(service.program(source))
        assert outcome.kind is OutcomeKind.COMPLETED, heard.stderr
        _, out, _ = await execute_in(service, "sh", "-c", look)
        assert out.split() == [b"1", b"1"], "but the process and the room that wait for the next job"


@pytest.mark.parametrize("reason", [StopReason.CANCEL, StopReason.KILL])
async def test_an_interrupt_ends_every_process_of_the_job(service: Rig, reason: StopReason) -> None:
    source = "import signal\nsignal.signal(15, signal.SIG_IGN)\nimport os\nfor _ in range(3): os.fork(); os.setsid()\n"
    running = service.begin(service.program(source + WAIT))
    await running.observer.wait_for_output("ready")
    service.backend.interrupt(running.ref, reason)
    outcome = await running.end()
    assert outcome.kind is (OutcomeKind.CANCELLED if reason is StopReason.CANCEL else OutcomeKind.LOST)
    outcome, heard = await service.run(service.program("print('next')"))
    assert heard.stdout == "next\n", outcome.error
    _, out, _ = await execute_in(service, "ps", "-u", "1000", "-o", "pid=")
    assert len(out.split()) == 1


# -- faults -----------------------------------------------------------------------------------------------------------


async def test_a_kernel_panic_loses_the_attempt_with_its_cause(rig: Rig) -> None:
    running = await begin_waiting(rig)
    provoke(rig, "sh", "-c", "echo c > /proc/sysrq-trigger")
    assert_lost(await running.end(), "panic")


async def test_a_guest_out_of_memory_loses_the_attempt_with_its_cause(rig: Rig) -> None:
    running = await begin_waiting(rig)
    provoke(rig, "python3", "-c", "held = []\nwhile True: held.append(bytearray(b'x') * 4_000_000)")
    assert_lost(await running.end(), "panic", "memory")


KILL_AGENT = """
place = next(line for line in open("/proc/1/maps") if " r-xp " in line and "python" in line)
start, end = (int(word, 16) for word in place.split()[0].split("-"))
with open("/proc/1/mem", "r+b", buffering=0) as memory:
    memory.seek(start)
    memory.write(b"\\xcc" * (end - start))
"""


async def test_an_agent_that_is_killed_loses_the_attempt(rig: Rig) -> None:
    running = await begin_waiting(rig)
    provoke(rig, "python3", "-c", KILL_AGENT)
    assert_lost(await running.end(), "panic", "hung up")


FLOOD = """
import ctypes, os
libc = ctypes.CDLL(None)
pid = os.pidfd_open(1)
number = next(int(n) for n in os.listdir("/proc/1/fd") if "vport" in os.readlink(f"/proc/1/fd/{n}"))
port = libc.syscall(438, pid, number, 0)
os.set_blocking(port, True)
while True: os.write(port, os.urandom(32768))
"""


async def test_an_agent_that_floods_the_host_with_garbage_loses_the_attempt(rig: Rig) -> None:
    running = await begin_waiting(rig)
    before = psutil.Process().memory_info().rss
    provoke(rig, "python3", "-c", FLOOD)
    assert_lost(await running.end(), "protocol")
    assert psutil.Process().memory_info().rss - before < 100_000_000


async def test_qemu_killed_in_the_middle_of_a_job_loses_the_attempt(rig: Rig) -> None:
    running = await begin_waiting(rig)
    (process,) = machines()
    process.kill()
    assert_lost(await running.end(), "signal 9", "SIGKILL", "killed", "hung up")


async def test_a_fork_bomb_ends_with_its_job(service: Rig) -> None:
    bomb = "import os\nprint('lit', flush=True)\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    outcome, heard = await service.run(service.program(bomb, timeout=6.0))
    assert outcome.kind is OutcomeKind.TIMED_OUT
    assert "lit" in heard.stdout
    outcome, heard = await service.run(service.program("print('next')"))
    assert heard.stdout == "next\n", outcome.error


async def test_a_job_over_its_memory_fails_alone(service: Rig) -> None:
    outcome, _ = await service.run(service.program("x = b'x' * 400_000_000", memory_mb=100))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error is not None
    assert outcome.error.type == "MemoryLimit"
    outcome, heard = await service.run(service.program("print('next')", memory_mb=100))
    assert heard.stdout == "next\n", outcome.error


async def test_much_output_arrives_whole_and_starves_nobody(rig: Rig) -> None:
    total = 40 * 1024 * 1024
    source = f"import os\nblock = b'y' * 65536\nfor _ in range({total // 65536}): os.write(1, block)\n"
    neighbour = await begin_waiting(rig)
    begun = time.monotonic()
    outcome, heard = await rig.run(rig.program(source, max_output_bytes=total))
    seconds = time.monotonic() - begun
    assert len(heard.data()) == total
    assert not outcome.output_truncated
    print(f"{total / seconds / 1e6:.1f} MB/s of output, with the start of its machine")
    rig.backend.interrupt(neighbour.ref, StopReason.CANCEL)
    assert (await neighbour.end()).kind is OutcomeKind.CANCELLED


DIFFERENT = """
import os, random, socket, uuid, secrets
def job():
    return [os.urandom(16).hex(), random.random(), str(uuid.uuid4()), secrets.token_hex(8), socket.gethostname(),
            open('/etc/machine-id').read()]
"""


@pytest.mark.timeout(400)
async def test_a_hundred_clones_have_a_hundred_values_of_everything_random(rig: Rig) -> None:
    jobs = [rig.begin(rig.function(DIFFERENT)) for _ in range(100)]
    found: list[list[object]] = []
    async with asyncio.timeout(380):
        for job in jobs:
            outcome = await job.task
            assert outcome.result is not None, outcome.error
            found.append(json.loads(bytes(outcome.result)))
    for values in zip(*found, strict=True):
        assert len(set(values)) == 100, values


@pytest.mark.timeout(300)
async def test_sixty_cycles_of_clone_job_and_kill_leave_nothing(rig: Rig) -> None:
    assert isinstance(rig.backend, OwnMachines)

    async def cycle(number: int) -> OutcomeKind:
        running = rig.begin(rig.program(WAIT))
        async with asyncio.timeout(120):
            await running.observer.wait_for_output("ready")
            rig.backend.interrupt(running.ref, (StopReason.KILL, StopReason.CANCEL)[number % 2])
            return (await running.task).kind

    assert await cycle(0) is OutcomeKind.LOST
    before = psutil.Process().num_fds()
    kinds = [await cycle(number) for number in range(60)]
    assert kinds == [OutcomeKind.LOST, OutcomeKind.CANCELLED] * 30
    await wait_until(lambda: machines() == [], "machines to be gone")
    assert list(rig.backend.leaser.directory.iterdir()) == []
    assert psutil.Process().num_fds() <= before
    assert len(asyncio.all_tasks()) < 10


async def test_a_machine_lost_before_the_job_began_costs_it_nothing(rig: Rig) -> None:
    assert isinstance(rig.backend, OwnMachines)
    leaser = rig.backend.leaser
    acquire = leaser.acquire
    tries: list[VmLease] = []

    async def acquire_and_kill(need: VmNeed) -> VmLease:
        lease = await acquire(need)
        tries.append(lease)
        if len(tries) < 3:
            assert isinstance(lease, DirectLease)
            await lease.machine.destroy()
        return lease

    leaser.acquire = acquire_and_kill  # type: ignore[method-assign]  # a fault
    outcome, heard = await rig.run(rig.program("print('third time')"))
    assert outcome.kind is OutcomeKind.COMPLETED
    assert heard.stdout == "third time\n"
    assert len(tries) == 3

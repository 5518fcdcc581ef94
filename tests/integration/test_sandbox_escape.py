"""Real attempts to get out of a sandbox, as a script and as a command. All must fail, with the host unharmed."""

# ruff: noqa: E501, PTH111, PTH208, ASYNC221, ASYNC240 -- short looks at the host between jobs block nobody

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from blixard.backends.contract import BackendSettings, Execution
from blixard.backends.sandbox.backend import SandboxBackend
from blixard.backends.sandbox.layout import interpreter_directories, package_directory
from blixard.backends.sandbox.seccomp import this_machine
from blixard.backends.sandbox.syscalls import NUMBERS
from blixard.domain.grants import Grants
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import CommandPayload, Payload, ScriptPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec
from tests.conformance.backends.harness import Recorder
from tests.integration.sandbox_attacks import ATTACKS, program_of

pytestmark = pytest.mark.asyncio(loop_scope="module")
FORMS = ("script", "command")
SECRET = "the secret of the host"


@dataclass
class Prison:
    """A backend, and a piece of the host beside it that its jobs must not reach."""

    backend: SandboxBackend
    root: Path
    facts: dict[str, object]
    number: int = 0

    @property
    def granted(self) -> Path:
        return self.root / "granted"

    async def run(self, form: str, source: str, **options: object) -> tuple[Outcome, Recorder]:
        self.number += 1
        payload, blobs = self._payload(form, source)
        needs = JobRequirements(isolation=Isolation.STANDARD)
        grants = Grants(write=(str(self.granted),))
        spec = JobSpec(name="attack", payload=payload, requirements=needs, grants=grants, timeout=60.0)
        observer = Recorder()
        execution = Execution(ref=AttemptRef("default", f"job_{self.number}", 1), spec=spec, blobs=blobs)
        return await self.backend.execute(execution, observer), observer

    def _payload(self, form: str, source: str) -> tuple[Payload, dict[str, Path]]:
        if form == "command":
            return CommandPayload(argv=(sys.executable, "-c", source)), {}
        directory = self.root / f"bundle-{self.number}"
        directory.mkdir()
        (directory / "main.py").write_text(source)
        return ScriptPayload(path="main.py", bundle="code"), {"code": directory}


def shown_in_home(home: str) -> list[str]:
    """Names in the home directory that lead to the interpreter, which every sandbox shows."""
    places = [*interpreter_directories(), package_directory(), "/home/job"]
    return sorted({p[len(home) + 1 :].split("/")[0] for p in places if p.startswith(home + "/")})


def make_facts(root: Path, outsider: subprocess.Popen[bytes], port: int, abstract: str) -> dict[str, object]:
    home = os.path.realpath(os.path.expanduser("~"))
    return {
        "secret": str(root / "secret" / "secret.txt"),
        "scratch": str(root / "scratch"),
        "granted": str(root / "granted"),
        "pid": outsider.pid,
        "port": port,
        "abstract": abstract,
        "home": home,
        "shown": shown_in_home(home),
    }


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="blixard-escape-"))
    for name in ("secret", "granted", "scratch"):
        (path / name).mkdir()
    (path / "secret" / "secret.txt").write_text(SECRET)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def facts(root: Path) -> Iterator[dict[str, object]]:
    abstract = f"blixard-escape-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + abstract)
        listener.listen()
        outsider = subprocess.Popen(["sleep", "600"])
        try:
            yield make_facts(root, outsider, server.getsockname()[1], abstract)
            assert outsider.poll() is None, "a process of the host was ended"
        finally:
            outsider.kill()
            outsider.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prison(root: Path, facts: dict[str, object]) -> AsyncIterator[Prison]:
    os.environ["BLIXARD_TEST_SECRET"] = SECRET
    settings = BackendSettings(scratch=root / "scratch", slots=2, memory_mb=256, processes=32, disk_mb=16)
    backend = SandboxBackend(settings)
    await backend.start()
    try:
        yield Prison(backend, root, facts)
    finally:
        await backend.stop()
        del os.environ["BLIXARD_TEST_SECRET"]


async def test_there_are_enough_attempts() -> None:
    assert len(ATTACKS) >= 25


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ATTACKS)
async def test_every_way_out_is_closed(prison: Prison, name: str, form: str) -> None:
    for path in prison.granted.iterdir():
        path.unlink()
    source = program_of(name, dict(NUMBERS[this_machine()]), prison.facts)
    outcome, heard = await prison.run(form, source)
    assert heard.stdout == "held\n", (heard.stdout, heard.stderr[-2000:], outcome)
    assert outcome.kind is OutcomeKind.COMPLETED


async def test_the_attacks_can_see_an_escape(facts: dict[str, object]) -> None:
    """Outside of a sandbox the same programs find something: they do not hold by themselves."""
    numbers = dict(NUMBERS[this_machine()])
    for name in ("read a file that was not granted", "signal by pidfd", "reach the host's loopback"):
        done = subprocess.run(
            [sys.executable, "-c", program_of(name, numbers, facts)], capture_output=True, check=False
        )
        assert b"ESCAPED" in done.stdout, name


def free_memory_mb() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.parametrize("form", FORMS)
async def test_memory_is_exhausted_inside_only(prison: Prison, form: str) -> None:
    source = "data = []\nwhile True: data.append(bytearray(b'x') * 4_000_000)\n"
    outcome, _ = await prison.run(form, source)
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error is not None
    assert outcome.error.type == "MemoryLimit" or form == "command", outcome
    assert free_memory_mb() > 256


@pytest.mark.parametrize("form", FORMS)
async def test_a_fork_bomb_is_contained_and_cleaned_up(prison: Prison, form: str) -> None:
    before = len([name for name in os.listdir("/proc") if name.isdigit()])
    source = """
import os, time
made = 0
try:
    while True:
        if os.fork() == 0:
            while True:
                try: os.fork()
                except OSError: time.sleep(0.05)
        made += 1
except OSError as error:
    print('stopped', made <= 40, flush=True)
os._exit(0)
"""
    outcome, heard = await prison.run(form, source)
    assert heard.stdout == "stopped True\n", (heard.stdout, heard.stderr[-500:])
    assert outcome.kind is OutcomeKind.COMPLETED
    after = len([name for name in os.listdir("/proc") if name.isdigit()])
    assert after < before + 32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["/work", "/tmp", "/home/job", "/dev/shm"])
async def test_a_full_disk_is_full_inside_only(prison: Prison, form: str, place: str) -> None:
    source = f"""
import errno
try:
    for number in range(4):
        with open('{place}/file%d' % number, 'wb') as file:
            for _ in range(64): file.write(bytes(1_000_000))
except OSError as error:
    assert error.errno in (errno.ENOSPC, errno.EFBIG), error
    print('full', flush=True)
"""
    _, heard = await prison.run(form, source)
    assert heard.stdout == "full\n", heard.stderr
    assert shutil.disk_usage(prison.root).free > 0


@pytest.mark.parametrize("form", FORMS)
async def test_files_without_number_are_refused(prison: Prison, form: str) -> None:
    source = """
try:
    for number in range(200_000): open('/tmp/%d' % number, 'w').close()
except OSError: print('full', flush=True)
"""
    _, heard = await prison.run(form, source)
    assert heard.stdout == "full\n", heard.stderr


@pytest.mark.parametrize("form", FORMS)
async def test_a_daemon_ends_with_the_job(prison: Prison, form: str) -> None:
    marker = f"daemon-{os.getpid()}-{form}"
    source = f"""
import os, subprocess, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', {marker!r}], stdin=-3, stdout=-3, stderr=-3)
        time.sleep(600)
    os._exit(0)
time.sleep(0.5)
print('left', flush=True)
"""
    _, heard = await prison.run(form, source)
    assert heard.stdout == "left\n", heard.stderr
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        assert marker.encode() not in words.split(b"\0")


async def test_jobs_at_the_same_time_do_not_see_each_other(prison: Prison) -> None:
    write = "import time\nopen('/tmp/mine', 'w').write('x'); open('/dev/shm/mine', 'w').write('x')\nprint('written', flush=True)\ntime.sleep(2)\n"
    look = "import os, time\ntime.sleep(1)\nprint(os.listdir('/tmp'), os.listdir('/work'), os.listdir('/dev/shm'), len([p for p in os.listdir('/proc') if p.isdigit()]) <= 3)\n"
    first, second = await asyncio.gather(prison.run("script", write), prison.run("command", look))
    assert first[1].stdout == "written\n"
    assert "mine" not in second[1].stdout
    assert second[1].stdout.endswith("[] [] True\n"), second[1].stdout


async def test_what_is_granted_works(prison: Prison) -> None:
    """Walls that let nothing through would pass every test above."""
    place = prison.granted / "result"
    place.unlink(missing_ok=True)
    source = f"import socket\nopen({str(place)!r}, 'w').write('done')\nserver = socket.create_server(('127.0.0.1', 0))\nclient = socket.create_connection(server.getsockname())\nprint('works', flush=True)\n"
    for form in FORMS:
        _, heard = await prison.run(form, source)
        assert heard.stdout == "works\n", heard.stderr
    assert place.read_text() == "done"
    assert place.stat().st_uid == os.getuid(), "what a job writes belongs to whoever granted the place"


async def test_the_host_is_unharmed(prison: Prison) -> None:
    assert (prison.root / "secret" / "secret.txt").read_text() == SECRET
    assert list((prison.root / "scratch").rglob("*")) == []
    assert not [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(prison.root) in line]

"""Executors die by violence while packets of calls are with them: no job runs twice, none is forgotten, none but the running one fails."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from blixard.backends.attempt import MAX_BATCH
from blixard.backends.contract import BackendSettings, Execution, Stream
from blixard.backends.process import ProcessBackend
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import FunctionPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec

DEADLINE = 90.0
KILLS = 40
JOBS_PER_KILL = 150
BUNDLE = "b" * 64
# One write to a file opened for appending is whole or not there, whenever the process dies.
SOURCE = """
import os, signal, time
def job(log, i, die, gate):
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(out, b"begin %d\\n" % i)
    if die == 1: os.kill(os.getpid(), signal.SIGKILL)
    if die == 2: os.write(3, b"garbage in the channel")
    while gate and not os.path.exists(gate): time.sleep(0.01)
    for _ in range(5_000): pass
    if i % 10 == 0: print(i)
    os.write(out, b"end %d\\n" % i)
    os.close(out)
    return i
"""


class Listener:
    """Hears of one job, and sets the event at its end."""

    def __init__(self, ended: asyncio.Event) -> None:
        self.outcomes: list[Outcome] = []
        self.data = b""
        self._ended = ended

    def started(self, at: int) -> None:
        pass

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        assert not self.outcomes, "output after the end"
        self.data += data

    def ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._ended.set()


class Load:
    """Keeps the backend's executors full of short jobs and remembers what it heard of each."""

    def __init__(
        self,
        backend: ProcessBackend,
        root: Path,
        *,
        dying: frozenset[int] = frozenset(),
        meddling: frozenset[int] = frozenset(),
        hanging: frozenset[int] = frozenset(),
    ) -> None:
        (root / "jobs.py").write_text(SOURCE)
        self._backend = backend
        self._root = root
        self._ways = dict.fromkeys(dying, 1) | dict.fromkeys(meddling, 2)
        self._hanging = hanging
        self.gate = root / "gate"
        payload = FunctionPayload(function="jobs:job", bundle=BUNDLE)
        needs = JobRequirements(isolation=Isolation.MINIMAL)
        self._spec = JobSpec(name="load", payload=payload, requirements=needs)
        self._ended = asyncio.Event()
        self.listeners: list[Listener] = []

    @property
    def log(self) -> Path:
        return self._root / "log"

    def submit(self, count: int) -> None:
        for _ in range(count):
            i = len(self.listeners)
            gate = self.gate if i in self._hanging else ""
            arguments = f'[["{self.log}", {i}, {self._ways.get(i, 0)}, "{gate}"], {{}}]'.encode()
            ref = AttemptRef("default", f"job_{i}", 1)
            listener = Listener(self._ended)
            self.listeners.append(listener)
            execution = Execution(ref=ref, spec=self._spec, arguments=arguments, blobs={BUNDLE: self._root})
            self._backend.submit(execution, listener)

    async def until_ended(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE):
            while sum(bool(listener.outcomes) for listener in self.listeners) < count:
                self._ended.clear()
                await self._ended.wait()

    def failed(self) -> list[int]:
        """Check what holds after any number of deaths, and return which jobs did not complete."""
        words = Counter(self.log.read_text().splitlines())
        for i, listener in enumerate(self.listeners):
            (outcome,) = listener.outcomes
            assert words[f"begin {i}"] <= 1, f"job {i} ran twice and ended as {outcome}"
            assert words[f"end {i}"] <= 1
            if outcome.kind is OutcomeKind.COMPLETED:
                assert words[f"begin {i}"] == 1
                assert bytes(outcome.result or b"") == str(i).encode()
                assert words[f"end {i}"] == 1
                assert listener.data == (f"{i}\n".encode() if i % 10 == 0 else b"")
        return [
            i for i, listener in enumerate(self.listeners) if listener.outcomes[0].kind is not OutcomeKind.COMPLETED
        ]


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[ProcessBackend]:
    (tmp_path / "scratch").mkdir()
    backend = ProcessBackend(BackendSettings(scratch=tmp_path / "scratch", slots=2))
    await backend.start()
    yield backend
    await backend.stop()


def executors_of(backend: ProcessBackend) -> list[int]:
    """Return the pids of the processes that run the jobs: children of the supervisors, which are the zygote's."""
    assert backend._zygote is not None
    assert backend._zygote.pid is not None
    found: list[int] = []
    for supervisor in psutil.Process(backend._zygote.pid).children():
        try:
            found += [child.pid for child in supervisor.children()]
        except psutil.NoSuchProcess:  # it has ended since
            continue
    return found


def kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # the one before was on its way out
        return False
    return True


async def test_a_job_that_kills_its_executor_in_the_middle_of_a_packet_fails_alone(
    backend: ProcessBackend, tmp_path: Path
) -> None:
    seed = int(os.environ.get("BLIXARD_SEED", "0")) or time.time_ns() % 1_000_000
    count = KILLS * 50
    dying = frozenset(random.Random(seed).sample(range(100, count), KILLS))
    load = Load(backend, tmp_path, dying=dying)
    load.submit(100)  # so that the pace is known and packets are full
    await load.until_ended(100)
    load.submit(count - 100)
    await load.until_ended(count)
    print(f"seed {seed}: {KILLS} deaths among {count} jobs")
    assert load.failed() == sorted(dying)
    for i in dying:
        (outcome,) = load.listeners[i].outcomes
        assert (outcome.kind, outcome.exit_code) == (OutcomeKind.FAILED, 128 + signal.SIGKILL)


async def test_a_job_that_writes_into_the_channel_gets_no_other_job_blamed(
    backend: ProcessBackend, tmp_path: Path
) -> None:
    meddling = frozenset(range(130, 1_000, 100))
    load = Load(backend, tmp_path, meddling=meddling)
    load.submit(100)
    await load.until_ended(100)
    load.submit(900)
    await load.until_ended(1_000)
    bad = load.failed()
    outcomes = {i: load.listeners[i].outcomes[0] for i in bad}
    print(f"{len(meddling)} meddled, {len(bad)} did not complete")
    assert 1 <= len(bad) <= len(meddling) * MAX_BATCH
    for i, outcome in outcomes.items():
        assert outcome.error is not None
        if outcome.kind is OutcomeKind.FAILED:
            assert i in meddling, "an innocent job was blamed"
            assert outcome.error.type == "ChannelMisused"
        else:
            assert outcome.kind is OutcomeKind.LOST, outcome


async def test_executors_killed_from_outside_at_random_moments_cost_one_job_each_at_most(
    backend: ProcessBackend, tmp_path: Path
) -> None:
    seed = int(os.environ.get("BLIXARD_SEED", "0")) or time.time_ns() % 1_000_000
    chance = random.Random(seed)
    load = Load(backend, tmp_path)
    load.submit(100)
    await load.until_ended(100)
    kills = busy = 0
    while kills < KILLS:
        load.submit(JOBS_PER_KILL)
        pids = executors_of(backend)  # takes longer than they need for a packet, so not at the last moment
        await load.until_ended(len(load.listeners) - chance.randrange(10, JOBS_PER_KILL))
        has_calls = any(len(runner.sent) > 1 for runner in backend._executors)
        if pids and kill(chance.choice(pids)):
            kills += 1
            busy += has_calls
    await load.until_ended(len(load.listeners))
    failed = load.failed()
    print(f"seed {seed}: {kills} kills, {busy} with calls in hand, {len(load.listeners)} jobs, {len(failed)} failed")
    assert 1 <= len(failed) <= kills
    assert busy >= KILLS // 4, "the kills must hit executors that have packets before them"


async def test_what_has_ended_is_heard_while_the_next_call_of_its_packet_runs_long(
    backend: ProcessBackend, tmp_path: Path
) -> None:
    load = Load(backend, tmp_path, hanging=frozenset({130, 230, 330}))
    load.submit(100)
    await load.until_ended(100)
    for hanging in (130, 230, 330):
        load.submit(100)
        await load.until_ended(len(load.listeners) - 1)
        assert load.listeners[hanging].outcomes == []
        load.gate.touch()
        await load.until_ended(len(load.listeners))
        load.gate.unlink()
    assert load.failed() == []

"""The slots that all backends of a worker share: never more than there are, none left idle, and a turn for everybody."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blixard.backends.contract import BackendSettings, Execution, Stream
from blixard.backends.process import ProcessBackend
from blixard.backends.slots import Slots
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import CommandPayload, FunctionPayload, Payload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec

DEADLINE = 60.0


class User:
    """Starts what waits whenever it may. ``is_warm``: keeps a slot for its next job unless it must yield."""

    def __init__(self, slots: Slots, *, is_warm: bool = False) -> None:
        self.slots = slots
        self.is_warm = is_warm
        self.waiting = 0
        self.busy = 0
        self.started = 0
        slots.join(self)

    def busy_slots(self) -> int:
        return self.busy

    def wants_slot(self) -> bool:
        return self.waiting > 0

    def slot_is_free(self) -> None:
        while self.waiting and not (self.is_warm and self.slots.must_yield(self)) and self.slots.may_take(self):
            self._begin()
            self.busy += 1

    def _begin(self) -> None:
        self.waiting -= 1
        self.started += 1

    def submit(self, count: int) -> None:
        self.waiting += count
        self.slot_is_free()

    def end_one(self) -> None:
        if self.is_warm and self.waiting and not self.slots.must_yield(self):
            self._begin()
            return
        self.busy -= 1
        self.slot_is_free()
        self.slots.freed()


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=60))
def test_no_more_than_all_slots_are_used_and_none_is_idle_while_a_job_waits(
    total: int, steps: list[tuple[int, bool]]
) -> None:
    slots = Slots(total)
    users = [User(slots, is_warm=True), User(slots), User(slots)]
    for index, submits in steps:
        if submits:
            users[index].submit(2)
        elif users[index].busy:
            users[index].end_one()
        used = sum(user.busy for user in users)
        assert used <= total
        assert used == total or not any(user.waiting for user in users)


@pytest.mark.parametrize("total", [1, 2, 3, 4])
def test_a_long_queue_of_one_backend_does_not_keep_the_others_waiting(total: int) -> None:
    slots = Slots(total)
    warm, other, third = User(slots, is_warm=True), User(slots), User(slots)
    warm.submit(1000)
    other.submit(20)
    third.submit(20)
    draw = random.Random(total)
    ends = 0
    while other.waiting or third.waiting:
        draw.choice([user for user in (warm, other, third) if user.busy]).end_one()
        ends += 1
    assert ends < 20 * 8
    assert warm.started > 5, "and its own turn, too"


class Deaf:
    def started(self, at: int) -> None:
        pass

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        pass


def execution(number: int, payload: Payload, code: Path, arguments: bytes) -> Execution:
    spec = JobSpec(name="job", payload=payload, requirements=JobRequirements(isolation=Isolation.MINIMAL))
    ref = AttemptRef("default", f"job_{number}", 1)
    return Execution(ref=ref, spec=spec, arguments=arguments, blobs={"b" * 64: code})


async def test_backends_that_share_one_slot_run_one_job_at_a_time(tmp_path: Path) -> None:
    turnstile = tmp_path / "turnstile"
    source = (
        "import os, time\n"
        "def job(path):\n    os.mkdir(path)\n    time.sleep(0.02)\n    os.rmdir(path)\n"  # mkdir fails if another runs
    )
    (tmp_path / "jobs.py").write_text(source)
    function = FunctionPayload(function="jobs:job", bundle="b" * 64)
    command = CommandPayload(argv=(sys.executable, "-c", f"{source}job({str(turnstile)!r})"))
    shared = Slots(1)
    backends = [
        ProcessBackend(BackendSettings(scratch=tmp_path / name, slots=1, shared_slots=shared)) for name in ("a", "b")
    ]
    for backend in backends:
        backend.settings.scratch.mkdir()
    ended: list[str] = []

    async def run(backend: ProcessBackend, kind: str, item: Execution) -> Outcome:
        outcome = await backend.execute(item, Deaf())
        ended.append(kind)
        return outcome

    try:
        for backend in backends:
            await backend.start()
        call = f'[["{turnstile}"],{{}}]'.encode()
        jobs = [run(backends[0], "function", execution(n, function, tmp_path, call)) for n in range(60)]
        jobs += [run(backends[1], "command", execution(100 + n, command, tmp_path, b"[]")) for n in range(5)]
        async with asyncio.timeout(DEADLINE):
            outcomes = await asyncio.gather(*jobs)
    finally:
        for backend in backends:
            await backend.stop()
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.COMPLETED] * 65, outcomes
    assert ended[-1] == "function", "the commands had to wait for all functions"

"""What a ``BulkBackend`` promises: ``submit`` is ``execute`` without a coroutine to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from blixard.backends.contract import BulkBackend, Execution, StopReason, Stream
from blixard.domain.outcome import Outcome, OutcomeKind

from .harness import Capability, Recorder, Rig

pytestmark = pytest.mark.requires(Capability.BULK)

DEADLINE = 60.0
WAIT = "import time\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)\n"


class Listener(Recorder):
    """Also hears of the end; anything after it, or a second one, is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome: Outcome | None = None
        self._end = asyncio.Event()

    def ended(self, outcome: Outcome) -> None:
        assert not self.closed, "ended twice"
        self.closed = True
        self.outcome = outcome
        self._end.set()

    async def end(self) -> Outcome:
        async with asyncio.timeout(DEADLINE):
            await self._end.wait()
        assert self.outcome is not None
        return self.outcome


def backend_of(rig: Rig) -> BulkBackend:
    backend = rig.backend
    assert isinstance(backend, BulkBackend), f"the harness says that {backend} has submit()"
    return backend


def submit(rig: Rig, *executions: Execution) -> list[Listener]:
    listeners = [Listener() for _ in executions]
    for execution, listener in zip(executions, listeners, strict=True):
        backend_of(rig).submit(execution, listener)
    return listeners


async def ends(listeners: Sequence[Listener]) -> list[OutcomeKind]:
    return [(await listener.end()).kind for listener in listeners]


async def test_submitted_attempts_end_as_executed_ones_do(rig: Rig) -> None:
    good, bad = rig.program("print('out')"), rig.program("import sys; sys.exit(3)")
    listeners = submit(rig, good, bad)
    assert await ends(listeners) == [OutcomeKind.COMPLETED, OutcomeKind.FAILED]
    assert listeners[0].stdout == "out\n"
    assert [(await listener.end()).exit_code for listener in listeners] == [0, 3]
    executed = [(await rig.run(execution))[0] for execution in (good, bad)]
    assert [outcome.kind for outcome in executed] == await ends(listeners)


async def test_what_waits_and_what_runs_can_be_interrupted(rig: Rig) -> None:
    running = submit(rig, *(rig.program(WAIT) for _ in range(rig.settings.slots)))
    for listener in running:
        await listener.wait_for_output("ready")
    executions = [rig.program("print(1)") for _ in StopReason]
    waiting = submit(rig, *executions)
    for execution, reason in zip(executions, StopReason, strict=True):
        backend_of(rig).interrupt(execution.ref, reason)
    assert await ends(waiting) == [OutcomeKind.CANCELLED, OutcomeKind.RELEASED, OutcomeKind.LOST]
    assert all(listener.data() == b"" for listener in waiting)
    await backend_of(rig).stop()
    assert await ends(running) == [OutcomeKind.LOST] * rig.settings.slots


async def test_before_start_and_after_stop_submitted_attempts_are_given_back(rig: Rig) -> None:
    await backend_of(rig).stop()
    assert await ends(submit(rig, rig.program("print(1)"))) == [OutcomeKind.RELEASED]
    await backend_of(rig).start()
    assert await ends(submit(rig, rig.program("print(1)"))) == [OutcomeKind.COMPLETED]


@pytest.mark.requires(Capability.FUNCTIONS)
async def test_many_submitted_functions_end_once_each_with_their_own_output_and_result(rig: Rig) -> None:
    source = "def job(i):\n    if i % 7 == 3: print(i)\n    if i % 20 == 11: raise ValueError(i)\n    return i\n"
    count = 200
    listeners = submit(rig, *(rig.function(source, i) for i in range(count)))
    for i, listener in enumerate(listeners):
        outcome = await listener.end()
        assert outcome.kind is (OutcomeKind.FAILED if i % 20 == 11 else OutcomeKind.COMPLETED), outcome
        assert outcome.result is None or bytes(outcome.result) == str(i).encode()
        assert listener.data(Stream.STDOUT) == (f"{i}\n".encode() if i % 7 == 3 else b"")

"""One attempt on its way through a backend: waiting, running, ended."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from blixard.backends.contract import EndObserver, Execution, ExecutionObserver, Stream
from blixard.backends.outcomes import now
from blixard.domain.limits import MAX_TIMEOUT_SECONDS
from blixard.domain.outcome import Outcome, OutcomeKind

if TYPE_CHECKING:
    from blixard.backends.runner import Runner

MAX_SPAWNS = 3
"""A runner that could not be started, or vanished before the job's code began, is tried this often."""
MAX_PIPELINE = 128
"""Calls that one executor may have before it at a time."""
MAX_BATCH = 64
"""Calls in one packet: while an executor runs these, it can be sent as many again."""
MAX_BATCH_BYTES = 32 * 1024
"""Arguments in one packet, unless those of one call alone are more."""
PIPELINE_SECONDS = 0.002
"""An executor has no more calls before it than it is usually through with in this time."""
_NEW_SHARE = 0.2
"""How much the newest duration counts in the running average."""


class Pace:
    """How long calls of one spec usually take, and so how many of them an executor may have before it."""

    def __init__(self) -> None:
        self._average: float | None = None
        self.depth = 1

    def learn(self, seconds: float) -> None:
        if not 0 <= seconds <= MAX_TIMEOUT_SECONDS:
            return  # no duration: whoever says so is not our code
        known = self._average
        self._average = seconds if known is None else known + _NEW_SHARE * (seconds - known)
        self.depth = max(1, min(MAX_PIPELINE, int(PIPELINE_SECONDS / max(self._average, 1e-9))))

    def slow_down(self, seconds: float) -> None:
        """A call runs for this long already: expect the next to do so, too."""
        if self._average is None or seconds > self._average:
            self._average = seconds
            self.depth = 1


class Attempt:
    """What the backend knows of one attempt."""

    __slots__ = (
        "_left",
        "ending",
        "execution",
        "is_done",
        "is_told",
        "kill_at",
        "number",
        "observer",
        "output_bytes",
        "output_truncated",
        "pace",
        "runner",
        "spawns",
        "started_at",
        "trouble",
    )

    def __init__(self, execution: Execution, observer: EndObserver) -> None:
        self.number = 0
        """Of the call that it is in its runner's hands; another one for each that it is sent to."""
        self.execution = execution
        self.observer = observer
        self.is_done = False
        self.runner: Runner | None = None
        self.pace: Pace | None = None
        self.ending: OutcomeKind | None = None
        """Why it is being ended early."""
        self.kill_at: float | None = None
        self.started_at: int | None = None
        self.spawns = 0
        self.trouble = "its process ended before it began"
        self.is_told = False
        self.output_bytes = 0
        self.output_truncated = False
        self._left = execution.spec.max_output_bytes

    def start(self) -> None:
        """Tell the observer that the job's code runs."""
        if not self.is_told and not self.is_done:
            self.is_told = True
            self.observer.started(self.started_at if self.started_at is not None else now())

    def write(self, stream: Stream, data: bytes) -> None:
        """Pass output on up to the cap, count all of it."""
        self.output_bytes += len(data)
        if len(data) > self._left:
            self.output_truncated = True
            data = data[: self._left]
        if data and not self.is_done:
            self._left -= len(data)
            self.observer.output(now(), stream, data)

    def finish(self, outcome: Outcome) -> None:
        """Tell the outcome and what the job has written; the first one counts."""
        if self.is_done:
            return
        self.is_done = True
        if self.output_bytes:
            outcome = msgspec.structs.replace(
                outcome, output_bytes=self.output_bytes, output_truncated=self.output_truncated
            )
        self.observer.ended(outcome)


class Waiter:
    """An ``EndObserver`` for who would rather await the outcome than be told. Passes everything else on."""

    def __init__(self, observer: ExecutionObserver) -> None:
        self._observer = observer
        self._outcome: Outcome | None = None
        self._future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def started(self, at: int) -> None:
        self._observer.started(at)

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        self._observer.output(at, stream, data)

    def ended(self, outcome: Outcome) -> None:
        self._outcome = outcome
        if not self._future.done():  # it is when who waits was cancelled
            self._future.set_result(outcome)

    async def outcome(self) -> Outcome:
        """Wait for the end. May be called again when it was cancelled."""
        if self._outcome is not None:
            return self._outcome
        if self._future.cancelled():
            self._future = asyncio.get_running_loop().create_future()
        return await self._future

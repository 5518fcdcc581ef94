"""One lease in a worker's hands, from claim to acknowledged report."""

from __future__ import annotations

import asyncio
import enum
from pathlib import Path
from typing import Protocol

import msgspec

from blixard.backends.contract import BulkBackend, ExecutionBackend, StopReason, Stream
from blixard.domain.lease import AttemptRef, ClaimedJob
from blixard.domain.outcome import Outcome
from blixard.domain.spec import JobSpec


class Phase(enum.Enum):
    WAITING = enum.auto()
    """Waits for free cpus or memory of this worker."""
    PREPARING = enum.auto()
    """Its blobs are on their way."""
    EXECUTING = enum.auto()
    """In the backend's hands, queued there or running."""
    ENDED = enum.auto()
    """Its outcome is known; output, result or report may still be on their way."""


class AttemptListener(Protocol):
    def attempt_started(self, held: HeldAttempt, at: int) -> None: ...
    def attempt_wrote(self, held: HeldAttempt, at: int, stream: Stream, data: bytes) -> None: ...
    def attempt_ended(self, held: HeldAttempt, outcome: Outcome) -> None: ...


class ResolvedSpec(msgspec.Struct, frozen=True):
    """A spec of one reply, resolved once for all of its jobs. ``digests`` are the blobs that it names, the bundle among them."""

    spec: JobSpec
    backend: ExecutionBackend | None
    bulk: BulkBackend | None
    """The same one, if it takes attempts without a coroutine for each."""
    digests: tuple[str, ...]
    bundle: str | None
    is_sized: bool


class HeldAttempt:
    """Listens to its own execution, so that a job costs one object and not two."""

    __slots__ = (
        "blobs",
        "claim",
        "digests",
        "has_output",
        "kind",
        "listener",
        "lost",
        "moving",
        "phase",
        "ref",
        "stop_reason",
    )

    def __init__(self, claim: ClaimedJob, kind: ResolvedSpec, listener: AttemptListener) -> None:
        self.ref: AttemptRef = claim.ref
        self.claim = claim
        self.kind = kind
        self.listener = listener
        self.phase = Phase.WAITING
        self.lost = False
        """The lease is gone: end it and report nothing."""
        self.has_output = False
        self.stop_reason: StopReason | None = None
        """Why it is to end before it started."""
        self.moving: asyncio.Task[object] | None = None
        """Brings its blobs here, or its output and result away."""
        self.blobs: dict[str, Path] = {}
        """Kept here for it."""
        self.digests: tuple[str, ...] = kind.digests
        if claim.inputs or claim.arguments_blob:
            self.digests += (*(i.digest for i in claim.inputs), *filter(None, [claim.arguments_blob]))

    def started(self, at: int) -> None:
        self.listener.attempt_started(self, at)

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        self.has_output = True
        self.listener.attempt_wrote(self, at, stream, data)

    def ended(self, outcome: Outcome) -> None:
        self.listener.attempt_ended(self, outcome)

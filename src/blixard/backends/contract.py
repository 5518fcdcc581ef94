"""What a worker expects of whatever runs a job. Every backend passes the same behavioural suite (tests/conformance/backends)."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec

from blixard.backends.slots import Slots
from blixard.domain.grants import InputFile
from blixard.domain.lease import AttemptRef
from blixard.domain.limits import MIB
from blixard.domain.outcome import Outcome
from blixard.domain.payload import Runtime
from blixard.domain.requirements import Isolation
from blixard.domain.spec import JobSpec


class Stream(enum.StrEnum):
    STDOUT = "stdout"
    STDERR = "stderr"


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt to run, with everything already on this machine.

    ``blobs`` maps every digest that spec and inputs name to a read-only local file; a bundle is an unpacked directory.
    ``stdin`` is a local file (None: empty).
    """

    ref: AttemptRef
    spec: JobSpec
    arguments: bytes = b"[]"
    inputs: tuple[InputFile, ...] = ()
    blobs: Mapping[str, Path] = {}
    stdin: Path | None = None


class ExecutionObserver(Protocol):
    """Hears of a running attempt. Called on the event loop, never after ``execute`` has returned; must not block."""

    def started(self, at: int) -> None:
        """The job's own code is about to run. ``at``: microseconds since 1970. Called at most once; not called for jobs that end within milliseconds."""

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        """The job wrote ``data``. In order within a stream; both streams together never exceed the spec's ``max_output_bytes``."""


class EndObserver(ExecutionObserver, Protocol):
    """Hears of the end, too."""

    def ended(self, outcome: Outcome) -> None:
        """The attempt has ended so, and nothing of it is left. Called exactly once and last; must not raise."""


class StopReason(enum.StrEnum):
    CANCEL = "cancel"
    """Somebody cancelled the job: SIGTERM, then SIGKILL after the grace time; outcome ``cancelled``."""
    RELEASE = "release"
    """The worker gives back what has not started: outcome ``released``; what runs goes on."""
    KILL = "kill"
    """End it at once: the lease is lost or the worker stops; outcome ``lost``."""


class BackendInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend can do on this host. ``missing`` says for every isolation it cannot give what the host lacks and how to get it."""

    name: str
    runtimes: frozenset[Runtime]
    isolations: frozenset[Isolation]
    missing: dict[Isolation, str] = {}
    notes: tuple[str, ...] = ()
    """Limits that this host does not enforce, for `blixard doctor`."""


class ExecutionBackend(Protocol):
    """Runs attempts. All methods are called on one event loop.

    ``execute`` may be called for more attempts than run at once: the backend queues them and runs ``slots`` at a time, in
    the order of the calls. It always returns an ``Outcome`` and raises only for a bug of ours. When it has returned, nothing
    of the job is left: no process, mount, socket, file or memory.
    """

    def info(self) -> BackendInfo:
        """Return what this host allows, found by trying it once. Needs no ``start``."""

    async def start(self) -> None:
        """Make ready. Raises ``NotSupportedHere`` when the host allows nothing of it. Calling it twice is harmless."""

    async def stop(self) -> None:
        """End everything that runs (outcome ``lost``) and leave nothing behind. Allowed before start, twice, and during start."""

    async def execute(self, execution: Execution, observer: ExecutionObserver) -> Outcome:
        """Run one attempt to its end and return how it ended. Cancelling this coroutine is the same as ``StopReason.KILL``."""

    def interrupt(self, ref: AttemptRef, reason: StopReason) -> None:
        """Ask for an early end of one attempt; ``execute`` returns soon. Unknown or ended attempts are ignored."""


@runtime_checkable
class BulkBackend(ExecutionBackend, Protocol):
    """A backend for thousands of short jobs a second: a coroutine for each would cost more than the job."""

    def submit(self, execution: Execution, observer: EndObserver) -> None:
        """Do what ``execute`` does, but return at once; the observer hears the outcome, perhaps before this returns."""


BackendFactory = Callable[["BackendSettings"], ExecutionBackend]


class BackendSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every backend is told. ``scratch`` is a private directory of the worker session, removed with it.

    ``lock_fd`` is the session's lock: supervisors of jobs inherit it and keep it as long as they live, jobs never see it.
    Seconds and MB. ``memory_mb`` and ``processes`` bound a sandboxed job that names no limit of its own.
    """

    scratch: Path
    slots: int = 1
    shared_slots: Slots | None = None
    """Of all backends of the worker together; without them a backend has ``slots`` of its own."""
    lock_fd: int | None = None
    grace_seconds: float = 5.0
    memory_mb: int = 1024
    processes: int = 128
    disk_mb: int = 1024
    """What a job may write into its private directories together."""
    open_files: int = 1024
    wasm_fuel: int | None = None
    wasm_cache: Path | None = None
    wasm_cache_bytes: int = 1024 * MIB
    """Compiled modules kept; the oldest go first."""

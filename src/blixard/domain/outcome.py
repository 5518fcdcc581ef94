"""How one attempt of a job ended."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec

from blixard.domain.limits import WireInt

if TYPE_CHECKING:
    MaybeJson = msgspec.Raw | None
else:
    # msgspec decodes Raw only outside of unions. So None never travels: structs with such a field omit it (omit_defaults).
    MaybeJson = msgspec.Raw


class OutcomeKind(enum.StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    """The job's own failure: an exception, a non-zero exit code, a signal, a limit it ran into. Costs a retry."""
    TIMED_OUT = "timed_out"
    """Ran longer than its timeout. Costs a retry."""
    CANCELLED = "cancelled"
    LOST = "lost"
    """The worker or the sandbox broke under it; not the job's fault. Costs one of ``max_lost``."""
    RELEASED = "released"
    """Given back before it started, or because its worker was stopped; costs nothing."""


class AttemptError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why an attempt ended badly. ``type`` is a class name (``ValueError``) or one of ours (``MemoryLimit``, ``WorkerLost``, …)."""

    type: str
    message: str
    traceback: str | None = None
    hint: str | None = None
    retryable: bool = True


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a backend reports of one finished attempt. Times are microseconds since 1970.

    ``result`` is the value as JSON, at most 64 KiB; a larger one is the blob ``result_blob``.
    ``exit_code`` is 128+n after signal n.
    """

    kind: OutcomeKind
    started_at: WireInt | None = None
    finished_at: WireInt | None = None
    exit_code: WireInt | None = None
    result: MaybeJson = None
    result_blob: str | None = None
    error: AttemptError | None = None
    output_bytes: WireInt = 0
    output_truncated: bool = False

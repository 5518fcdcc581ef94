"""A job as it stands in the store."""

from __future__ import annotations

import msgspec

from blixard.domain.grants import InputFile
from blixard.domain.limits import WireInt
from blixard.domain.outcome import AttemptError, OutcomeKind
from blixard.domain.requirements import JobRequirements
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState


class JobMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """Times are microseconds since 1970 by the clock of the control plane; the worker's clock only tells how long an attempt ran."""

    created_at: int
    updated_at: int
    run_at: int
    started_at: int | None = None
    finished_at: int | None = None
    attempt: int = 0
    """Claims so far; the fencing token of the current one."""
    failures: int = 0
    lost: int = 0
    cancel_requested_at: int | None = None

    @property
    def duration(self) -> float | None:
        """Seconds from start to end; None before both are known."""
        if self.started_at is None or self.finished_at is None:
            return None
        return (self.finished_at - self.started_at) / 1e6


class JobAssignment(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds the lease, or who held it last."""

    session: str
    worker: str
    attempt: int
    claimed_at: int


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """``arguments`` is JSON text; ``result`` too (None: no result yet, or it is the blob ``result_blob``)."""

    id: str
    namespace: str
    spec: JobSpec
    state: JobState
    priority: int
    metadata: JobMetadata
    arguments: msgspec.Raw = msgspec.Raw(b"[]")
    arguments_blob: str | None = None
    inputs: tuple[InputFile, ...] = ()
    batch: str | None = None
    batch_index: int | None = None
    assignment: JobAssignment | None = None
    result: msgspec.Raw | None = None
    result_blob: str | None = None
    exit_code: int | None = None
    error: AttemptError | None = None
    outcome: OutcomeKind | None = None

    @property
    def requirements(self) -> JobRequirements:
        return self.spec.requirements


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One ended attempt. ``outcome`` tells a timeout from other failures, and a lost worker from both."""

    job_id: str
    attempt: int
    session: str
    worker: str
    claimed_at: int
    started_at: int | None
    finished_at: int
    outcome: OutcomeKind
    exit_code: int | None = None
    error: AttemptError | None = None


def _no_arguments() -> msgspec.Raw:
    """A factory, since a default value could not be shown in a JSON schema."""
    return msgspec.Raw(b"[]")


class NewJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What differs from job to job of one spec. ``run_at`` in microseconds since 1970; None: now."""

    id: str | None = None
    arguments: msgspec.Raw = msgspec.field(default_factory=_no_arguments)
    arguments_blob: str | None = None
    inputs: tuple[InputFile, ...] = ()
    priority: WireInt = 0
    run_at: WireInt | None = None

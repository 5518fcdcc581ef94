"""Jobs and batches as a client sees them. Times are RFC 3339 with UTC; ``arguments`` and ``result`` are JSON values."""

from __future__ import annotations

import datetime as dt

import msgspec

from blixard.domain.event import EventType
from blixard.domain.job import NewJob
from blixard.domain.limits import WireInt
from blixard.domain.outcome import AttemptError, MaybeJson, OutcomeKind
from blixard.domain.payload import Runtime
from blixard.domain.requirements import Isolation
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState


class SubmitRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """At most 1,000 jobs of one spec. Jobs without an id get one; a repeated id with the same content is the same job."""

    spec: JobSpec
    jobs: list[NewJob]
    batch: str | None = None
    first_index: WireInt | None = None
    """With ``batch``: the jobs are the batch's ``first_index``, ``first_index + 1``, …; ids follow from that."""


class SubmitReply(msgspec.Struct, frozen=True, kw_only=True):
    """``ids`` in the order of the request; ``created`` of them were new. All are on disk."""

    ids: list[str]
    created: int


class OpenBatchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Find the newest batch of this identity, or make it. ``fresh`` makes a new generation; ``rerun`` reopens failed and cancelled jobs of a found one."""

    name: str
    identity: str
    total: WireInt
    fresh: bool = False
    rerun: bool = True


class BatchView(msgspec.Struct, frozen=True, kw_only=True):
    """``submitted`` jobs exist so far, the first ones without a gap; ``created`` is False when the batch was found."""

    id: str
    name: str
    identity: str
    generation: int
    total: int
    submitted: int
    counts: dict[JobState, int]
    created_at: dt.datetime
    created: bool = False
    replaces: str | None = None
    """A batch of the same name with another identity that is not finished: the code or the inputs changed."""


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """One job in a listing."""

    id: str
    namespace: str
    name: str
    state: JobState
    queue: str
    runtime: Runtime
    isolation: Isolation
    priority: int
    tags: tuple[str, ...]
    attempt: int
    failures: int
    lost: int
    created_at: dt.datetime
    updated_at: dt.datetime
    run_at: dt.datetime
    started_at: dt.datetime | None
    finished_at: dt.datetime | None
    duration: float | None
    worker: str | None
    batch: str | None
    batch_index: int | None
    exit_code: int | None
    outcome: OutcomeKind | None
    error: AttemptError | None
    cancel_requested: bool


class JobDetail(JobView, frozen=True, kw_only=True, omit_defaults=True):
    """Everything about one job but its events. The values of the spec's environment are masked."""

    spec: JobSpec
    arguments: msgspec.Raw
    arguments_blob: str | None
    result: MaybeJson = None
    """Absent: no result, or it is a blob."""
    result_blob: str | None
    attempts: list[AttemptView]


class AttemptView(msgspec.Struct, frozen=True, kw_only=True):
    attempt: int
    worker: str
    session: str
    claimed_at: dt.datetime
    started_at: dt.datetime | None
    finished_at: dt.datetime | None
    outcome: OutcomeKind | None
    exit_code: int | None = None
    error: AttemptError | None = None


class JobPage(msgspec.Struct, frozen=True, kw_only=True):
    """Newest first. ``cursor`` continues the listing; None at its end."""

    jobs: list[JobView]
    cursor: str | None


class JobFilter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Empty means any. ``since`` and ``until`` bound the time of creation."""

    states: tuple[JobState, ...] = ()
    name: str | None = None
    tag: str | None = None
    queue: str | None = None
    batch: str | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None


class JobResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An ended job as one who waits for it needs it. ``index`` is its place in its batch."""

    id: str
    state: JobState
    outcome: OutcomeKind | None
    exit_code: int | None
    result: MaybeJson = None
    result_blob: str | None = None
    error: AttemptError | None = None
    attempt: int = 0
    index: int | None = None


class WaitRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answer as soon as one of ``ids`` (at most 1,000) has ended, or after ``wait`` seconds with nothing."""

    ids: list[str]
    wait: float = 0.0


class WaitReply(msgspec.Struct, frozen=True, kw_only=True):
    """``ended``: those of the asked that have ended. ``unknown``: ids that do not exist."""

    ended: list[JobResult]
    unknown: list[str] = []


class BatchResults(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs of a batch that ended after position ``after``, in the order in which they ended; ``position`` continues.

    A job that was reopened and ended again appears again. ``done``: every job of the batch has ended and is listed up to here.
    """

    results: list[JobResult]
    position: int
    done: bool


class EventView(msgspec.Struct, frozen=True, kw_only=True):
    seq: int
    job_id: str
    type: EventType
    attempt: int
    at: dt.datetime
    batch: str | None = None
    worker: str | None = None


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that keeps a job from running and what would unblock it, in words; ``code`` is stable."""

    code: str
    text: str
    unblock: str


class WhyView(msgspec.Struct, frozen=True, kw_only=True):
    """``reasons`` is empty when the job runs or a worker is about to take it."""

    id: str
    state: JobState
    summary: str
    reasons: list[Reason]


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """``data`` travels as base64."""

    at: dt.datetime
    stream: str
    data: bytes


class LogPageView(msgspec.Struct, frozen=True, kw_only=True):
    """``offset`` continues; ``ended``: no more will come for this attempt; ``dropped`` bytes were over the cap."""

    attempt: int
    entries: list[LogEntry]
    offset: int
    ended: bool
    dropped: int = 0


class StatsView(msgspec.Struct, frozen=True, kw_only=True):
    jobs: dict[JobState, int]
    queues: dict[str, dict[JobState, int]]
    workers: dict[str, int]


class CancelReply(msgspec.Struct, frozen=True, kw_only=True):
    """``state`` after the call: ``cancelled``, or still leased with the cancel on its way to the worker."""

    id: str
    state: JobState


class BatchCancelReply(msgspec.Struct, frozen=True, kw_only=True):
    """``cancelled``: how many jobs the call cancelled, or will when their workers hear of it."""

    id: str
    cancelled: int

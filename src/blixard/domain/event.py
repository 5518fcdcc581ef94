"""What happened, in the order in which it was stored: an append-only outbox, which is also the audit."""

from __future__ import annotations

import enum

import msgspec


class EventType(enum.StrEnum):
    SUBMITTED = "submitted"
    CLAIMED = "claimed"
    STARTED = "started"
    RELEASED = "released"
    RETRIED = "retried"
    """A failed attempt went back to pending."""
    LOST = "lost"
    """A worker died under it and it went back to pending."""
    CANCEL_REQUESTED = "cancel_requested"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REOPENED = "reopened"
    """A user retried a failed or cancelled job."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """``seq`` rises in the order of commits; ``at`` is microseconds since 1970."""

    seq: int
    namespace: str
    job_id: str
    type: EventType
    attempt: int
    at: int
    batch: str | None = None
    worker: str | None = None

"""The states of a job and every way between them. The database's CHECK constraints and guards say the same.

          ┌─────────┐ parents done  ┌─────────┐  claim   ┌─────────┐  start   ┌─────────────┐
submit ──▶│ blocked │──────────────▶│ pending │─────────▶│ claimed │─────────▶│ in_progress │
          └────┬────┘               └─┬──▲──▲─┘          └──┬─┬──┬─┘          └──┬──┬──┬──┬─┘
               │                      │  │  └─── give back ─┘ │  │               │  │  │  │
               │                      │  └─ failed attempt with retries left,   ─┴──│──│──│──┐ (from claimed, too)
               │                      │     lost worker with losses left            │  │  │  │
               ▼ cancel               ▼ cancel                │  ▼ cancel           ▼  ▼  ▼  │
            cancelled             cancelled                   │ cancelled  cancelled │  │    │
                                                              ▼            completed─┘  └─failed
          retry (a user's act): failed, cancelled ──▶ pending with counters set back
"""

from __future__ import annotations

import enum


class JobState(enum.StrEnum):
    BLOCKED = "blocked"
    """Waits for other jobs."""
    PENDING = "pending"
    """Waits for a worker, or for its time."""
    CLAIMED = "claimed"
    """Leased to a worker that has not said that it started it."""
    IN_PROGRESS = "in_progress"
    """A worker runs it."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL

    @property
    def is_leased(self) -> bool:
        return self in LEASED


TERMINAL = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})
LEASED = frozenset({JobState.CLAIMED, JobState.IN_PROGRESS})

ALLOWED: dict[JobState, frozenset[JobState]] = {
    JobState.BLOCKED: frozenset({JobState.PENDING, JobState.CANCELLED, JobState.FAILED}),
    JobState.PENDING: frozenset({JobState.CLAIMED, JobState.CANCELLED}),
    JobState.CLAIMED: frozenset({JobState.IN_PROGRESS, JobState.PENDING, *TERMINAL}),
    JobState.IN_PROGRESS: frozenset({JobState.PENDING, *TERMINAL}),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset({JobState.PENDING}),
    JobState.CANCELLED: frozenset({JobState.PENDING}),
}


def can_become(state: JobState, wanted: JobState) -> bool:
    """Say whether the state machine has an arrow from ``state`` to ``wanted``."""
    return wanted in ALLOWED[state]

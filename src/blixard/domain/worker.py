"""Workers: processes that claim and run jobs."""

from __future__ import annotations

import enum

import msgspec

from blixard.domain.limits import WireInt
from blixard.domain.requirements import Isolation, WorkerType


class SessionState(enum.StrEnum):
    ONLINE = "online"
    DRAINING = "draining"
    """Finishes what it has and takes nothing new."""
    DEAD = "dead"
    """Its leases were taken away; whatever it still says is refused."""
    CLOSED = "closed"
    """Said good-bye."""


class WorkerOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a worker can run. ``capabilities`` maps a worker type to the isolations that this host really gives."""

    capabilities: dict[WorkerType, tuple[Isolation, ...]]
    queues: tuple[str, ...] = ()
    """Empty: every queue."""
    labels: dict[str, str] = {}
    cpus: float = 1.0
    memory_mb: WireInt = 1024
    slots: WireInt = 1
    """Jobs at the same time."""
    submitter: str | None = None
    """Embedded workers: only this process's submissions and orphans of dead ones."""


class Registration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """``host`` names the boot of the machine (boot id), so that locks and pids of other machines are never trusted."""

    name: str
    offer: WorkerOffer
    host: str = ""
    pid: WireInt = 0
    interpreter: str = ""
    """Python version and environment, named for whoever wonders which packages a job sees."""
    session: str | None = None
    """Chosen by the worker, so that a repeated registration is the same session."""


class WorkerSession(msgspec.Struct, frozen=True, kw_only=True):
    """One life of a worker. ``renewals`` only rises while it lives; times in microseconds since 1970."""

    id: str
    name: str
    offer: WorkerOffer
    state: SessionState
    host: str
    pid: int
    interpreter: str
    registered_at: int
    seen_at: int
    renewals: int
    leased: int = 0
    """Leases it holds now, counted from the jobs."""

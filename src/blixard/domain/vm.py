"""Virtual machines, as whoever looks at them sees them."""

from __future__ import annotations

import enum

import msgspec

from blixard.domain.requirements import VmMode


class VmState(enum.StrEnum):
    STARTING = "starting"
    """It boots, is cloned, or is being given fresh randomness for its next job."""
    READY = "ready"
    """Its agent answers and it runs no job."""
    BUSY = "busy"
    PAUSED = "paused"
    """A person stopped its processors."""
    STOPPING = "stopping"


class VmHealth(enum.StrEnum):
    UNKNOWN = "unknown"
    """Not asked yet."""
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    """It missed an answer: it gets no new job until it has answered again for a while."""
    UNHEALTHY = "unhealthy"
    """It missed too many: it is ended."""


class VmView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One machine. Times in microseconds since 1970; ``private_memory`` in bytes, what it alone occupies on the host.

    ``namespace`` is empty while it belongs to nobody (it is kept ready for whoever comes).
    """

    id: str
    state: VmState
    mode: VmMode
    health: VmHealth = VmHealth.UNKNOWN
    namespace: str = ""
    job_id: str = ""
    image: str = ""
    memory_mb: int = 0
    vcpus: int = 1
    network: bool = False
    labels: dict[str, str] = {}
    jobs: int = 0
    """Jobs that it has run to their end."""
    created_at: int = 0
    private_memory: int = 0
    note: str = ""
    """Why it is being ended, or whose copy it is."""


class VmStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one manager's machines. ``limit`` is the most there may be, ``waiting`` the jobs that wait for one."""

    limit: int
    total: int = 0
    waiting: int = 0
    by_state: dict[VmState, int] = {}
    started: int = 0
    """Since the manager started."""
    failed: int = 0
    """Machines that could not be started or ended by themselves."""

"""What the host can still give to virtual machines."""

from __future__ import annotations

from pathlib import Path

from blixard.errors import NotEnoughMemory

MACHINE_OVERHEAD_MB = 96
"""What QEMU takes beside the guest's memory: its own data, and translated code under TCG."""
UNLIMITED = 1 << 43
_MB = 1 << 20


def available_mb() -> int:
    """Return how many MB processes of this host, or of our cgroups if they have a limit, can still get."""
    return min(_free_on_host(), free_in_cgroups(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")))


def _free_on_host() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) // 1024
    return 0


_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_in_cgroups(own: str, root: Path) -> int:
    """Return what the tightest of our cgroups and their parents leaves; ``UNLIMITED`` if none has a limit.

    ``own``: the content of /proc/self/cgroup. In a container its paths may not be there: then the root's limits are ours.
    """
    free = UNLIMITED
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            free = min(free, *_free_upwards(root, path, _V2))
        elif "memory" in controllers.split(","):
            free = min(free, *_free_upwards(root / "memory", path, _V1))
    return free


def _free_upwards(root: Path, path: str, names: tuple[str, str, str]) -> list[int]:
    own = root / path.strip("/")
    return [_free_in(place, names) for place in (own, *own.parents) if place == root or root in place.parents]


def _free_in(place: Path, names: tuple[str, str, str]) -> int:
    try:
        limit, used = ((place / name).read_text().strip() for name in names[:2])
        cached = _stat(place / "memory.stat", names[2])
    except OSError:
        return UNLIMITED
    return UNLIMITED if limit == "max" else max(0, int(limit) - int(used) + cached) // _MB


def _stat(path: Path, wanted: str) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == wanted:
            return int(value)
    return 0


def require_memory(memory_mb: int, available: int) -> None:
    """Raise ``NotEnoughMemory`` unless a machine of this size can have all of its memory now."""
    needed = memory_mb + MACHINE_OVERHEAD_MB
    if needed > available:
        raise NotEnoughMemory(
            f"a virtual machine of {memory_mb} MB needs {needed} MB with QEMU's own; this host has {available} MB available",
            hint="ask for less memory, wait until other machines have ended, or use a larger host",
        )

"""What the host can still give to virtual machines."""

from __future__ import annotations

from pathlib import Path

from blixard.errors import NotEnoughMemory

MACHINE_OVERHEAD_MB = 96
"""What QEMU takes beside the guest's memory: its own data, and translated code under TCG."""
_MB = 1 << 20


def available_mb() -> int:
    """Return how many MB processes of this host, or of our cgroup if it has a limit, can still get."""
    return min(_free_on_host(), _free_in_cgroup())


def _free_on_host() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) // 1024
    return 0


_V2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")


def _free_in_cgroup(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Inside a container the limit stands at the root of what it sees; ``sys.maxsize`` MB without a limit."""
    free = 1 << 40
    for place, names in ((root, _V2), (root / "memory", _V1)):
        try:
            limit, used = ((place / name).read_text().strip() for name in names[:2])
            cached = _stat(place / names[2], names[3])
        except OSError:
            continue
        if limit != "max":
            free = min(free, max(0, int(limit) - int(used) + cached) // _MB)
    return free


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

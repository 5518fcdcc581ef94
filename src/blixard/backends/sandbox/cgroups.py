"""Limits on memory, processes and processor time of a whole sandbox, where the host lets us set them.

One directory per slot and hierarchy, used again by the next job of the slot: making and removing them for every job would
cost more than the job's sandbox. What may be used is found by really making one, never from version numbers.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from blixard.backends.sandbox.identity import write_file
from blixard.domain.limits import MIB

CPU_PERIOD = 100_000
UNLIMITED_V1 = 1 << 60
REMOVE_SECONDS = 5.0
"""How long a removed group's last process may take to vanish."""
_WANTED = ("memory", "pids", "cpu")


class Hierarchy(msgspec.Struct, frozen=True):
    """A place to make groups in. ``version`` 2 holds all ``controllers`` in one group."""

    directory: Path
    controllers: tuple[str, ...]
    version: int


class Cgroup:
    """The groups of one slot. ``limit`` before a job, ``was_out_of_memory`` after it, ``remove`` at the end."""

    def __init__(self, name: str, hierarchies: tuple[Hierarchy, ...]) -> None:
        self._places = {hierarchy: hierarchy.directory / name for hierarchy in hierarchies}
        self._kills = 0

    @property
    def directories(self) -> tuple[str, ...]:
        return tuple(str(place) for place in self._places.values())

    def create(self) -> None:
        """Make the groups. Raises ``OSError``; then nothing is left."""
        try:
            for place in self._places.values():
                place.mkdir(exist_ok=True)
        except OSError:
            self.remove()
            raise

    def limit(self, *, memory: int, processes: int, cpus: float | None) -> None:
        """Set the limits of the next job. Raises ``OSError``."""
        for hierarchy, place in self._places.items():
            settings = _settings_v1 if hierarchy.version == 1 else _settings_v2
            for name, value, is_needed in settings(hierarchy.controllers, memory, processes, cpus):
                with contextlib.nullcontext() if is_needed else contextlib.suppress(OSError):
                    write_file(str(place / name), value)
        self._kills = self._count_kills()

    def was_out_of_memory(self) -> bool:
        """Say whether the kernel has ended a process of the group since ``limit``, for want of memory."""
        return self._count_kills() > self._kills

    def remove(self) -> None:
        """Kill what is in the groups and remove them. Raises ``OSError`` if a process does not go away."""
        for place in self._places.values():
            _remove(place)

    def _count_kills(self) -> int:
        for hierarchy, place in self._places.items():
            if "memory" in hierarchy.controllers:
                name = "memory.oom_control" if hierarchy.version == 1 else "memory.events"
                for line in (place / name).read_text(encoding="ascii").splitlines():
                    word, _, value = line.partition(" ")
                    if word == "oom_kill":
                        return int(value)
        return 0


Setting = tuple[str, str, bool]


def new_group_name() -> str:
    """Return a name that tells the process it belongs to, for ``remove_stale``."""
    return f"blixard-{os.getpid()}-{secrets.token_hex(4)}"


def remove_stale(hierarchies: tuple[Hierarchy, ...]) -> None:
    """Remove the empty groups of workers that were killed. What is in use stays, the kernel sees to that."""
    for hierarchy in hierarchies:
        for place in hierarchy.directory.glob("blixard-*-*"):
            owner = place.name.split("-")[1]
            if owner.isdigit() and not Path("/proc", owner).exists():
                with contextlib.suppress(OSError):
                    place.rmdir()


def _settings_v1(controllers: tuple[str, ...], memory: int, processes: int, cpus: float | None) -> Iterator[Setting]:
    if "memory" in controllers:
        # Memory with swap can never be below memory alone: widen it first, whatever it was.
        yield "memory.memsw.limit_in_bytes", str(UNLIMITED_V1), False
        yield "memory.limit_in_bytes", str(memory), True
        yield "memory.memsw.limit_in_bytes", str(memory), False
    if "pids" in controllers:
        yield "pids.max", str(processes), True
    if "cpu" in controllers:
        yield "cpu.cfs_period_us", str(CPU_PERIOD), True
        yield "cpu.cfs_quota_us", "-1" if cpus is None else str(max(1000, int(cpus * CPU_PERIOD))), True


def _settings_v2(controllers: tuple[str, ...], memory: int, processes: int, cpus: float | None) -> Iterator[Setting]:
    if "memory" in controllers:
        yield "memory.max", str(memory), True
        yield "memory.swap.max", "0", False
    if "pids" in controllers:
        yield "pids.max", str(processes), True
    if "cpu" in controllers:
        quota = "max" if cpus is None else str(max(1000, int(cpus * CPU_PERIOD)))
        yield "cpu.max", f"{quota} {CPU_PERIOD}", True


def _remove(place: Path) -> None:
    end = time.monotonic() + REMOVE_SECONDS
    while place.is_dir():
        for word in (place / "cgroup.procs").read_text(encoding="ascii").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(word), signal.SIGKILL)
        try:
            place.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > end:
                raise
            os.sched_yield()


@functools.cache
def find_hierarchies(proc: Path = Path("/proc/self")) -> tuple[Hierarchy, ...]:
    """Return, tried once per process, the places where it can really make groups with limits and move a process into them."""
    found: list[Hierarchy] = []
    for candidate in _candidates(proc):
        taken = {controller for hierarchy in found for controller in hierarchy.controllers}
        wanted = tuple(c for c in candidate.controllers if c in _WANTED and c not in taken)
        usable = Hierarchy(candidate.directory, wanted, candidate.version)
        if wanted and _try(usable):
            found.append(usable)
    return tuple(found)


def _candidates(proc: Path) -> Iterator[Hierarchy]:
    """Our own group and, in version 2, those above it: a group with processes cannot have limited children."""
    mounts = _cgroup_mounts(proc)
    for line in (proc / "cgroup").read_text(encoding="ascii").splitlines():
        _, names, path = line.split(":", 2)
        controllers = tuple(names.split(",")) if names else ()
        mount = mounts.get(frozenset(controllers))
        if mount is None:
            continue
        own = mount / path.lstrip("/")
        if controllers:
            yield Hierarchy(own, controllers, 1)
            continue
        for directory in (own, *own.parents):
            if directory == mount.parent:
                break
            with contextlib.suppress(OSError):
                enabled = (directory / "cgroup.subtree_control").read_text(encoding="ascii").split()
                yield Hierarchy(directory, tuple(enabled), 2)


def _cgroup_mounts(proc: Path) -> dict[frozenset[str], Path]:
    """Map sets of controllers to where they are mounted; the empty set is version 2."""
    mounts: dict[frozenset[str], Path] = {}
    for line in (proc / "mountinfo").read_text(encoding="utf-8").splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind == "cgroup2":
            mounts[frozenset()] = Path(fields.split()[4])
        elif kind == "cgroup":
            names = {word for word in options.split(",") if word in _WANTED or word == "cpuacct"}
            mounts[frozenset(names)] = Path(fields.split()[4])
    return mounts


def _try(hierarchy: Hierarchy) -> bool:
    """Make a group, limit it, let a child join it, remove it."""
    group = Cgroup(f"{new_group_name()}-try", (hierarchy,))
    try:
        group.create()
        try:
            group.limit(memory=64 * MIB, processes=16, cpus=1.0)
            return _can_join(group)
        finally:
            group.remove()
    except OSError:
        return False


def _can_join(group: Cgroup) -> bool:
    read, write = os.pipe()
    child = os.posix_spawnp(
        "cat",
        ["cat"],
        {"PATH": os.defpath},
        file_actions=[(os.POSIX_SPAWN_DUP2, read, 0), (os.POSIX_SPAWN_CLOSE, write)],
    )
    try:
        for directory in group.directories:
            write_file(f"{directory}/cgroup.procs", str(child))
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(read)
        os.close(write)
        os.waitpid(child, 0)

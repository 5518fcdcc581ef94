"""Who a job is: an ordinary user of the host, and the owner of what was granted to it."""

from __future__ import annotations

import fcntl
import os

from blixard.backends.sandbox import kernel
from blixard.backends.sandbox.plan import INSIDE_ID, UNPRIVILEGED_ID

LOWEST_DESCRIPTOR = 100
HIGHEST_ID = 4_294_967_294


def swap_ids(first: int, second: int) -> str:
    """Return a user namespace's map that swaps two ids and leaves all others as they are."""
    if first == second:
        return f"0 0 {HIGHEST_ID + 1}\n"
    low, high = sorted((first, second))
    rows = [(0, 0, low), (low, high, 1), (low + 1, low + 1, high - low - 1), (high, low, 1)]
    rows.append((high + 1, high + 1, HIGHEST_ID - high))
    return "".join(f"{inside} {outside} {count}\n" for inside, outside, count in rows if count > 0)


class OwnerMaps:
    """User namespaces that only serve as maps for mounts: they show an owner's files as the job's own. For root only.

    Kept open for the life of the process that made them; forked children use them too. At most ``MAX_MAPS`` are kept.
    """

    MAX_MAPS = 16

    def __init__(self, job_uid: int, job_gid: int) -> None:
        self._job = (job_uid, job_gid)
        self._descriptors: dict[tuple[int, int], int] = {}

    def descriptor(self, owner: tuple[int, int]) -> int:
        """Return the namespace that shows ``owner`` as the job. Raises ``OSError`` if the host allows none."""
        if owner not in self._descriptors:
            self._drop_oldest()
            self._descriptors[owner] = self._create(owner)
        return self._descriptors[owner]

    @property
    def descriptors(self) -> set[int]:
        return set(self._descriptors.values())

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _drop_oldest(self) -> None:
        if len(self._descriptors) >= self.MAX_MAPS:
            os.close(self._descriptors.pop(next(iter(self._descriptors))))

    def _create(self, owner: tuple[int, int]) -> int:
        ready, release = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            _hold_new_namespace(ready, release)
        for descriptor in (ready[1], release[0]):
            os.close(descriptor)
        try:
            if os.read(ready[0], 1) != b"r":
                raise OSError("the host allows no user namespace")
            for name, owned, job in zip(("uid_map", "gid_map"), owner, self._job, strict=True):
                write_file(f"/proc/{child}/{name}", swap_ids(owned, job))
            return _open_high(f"/proc/{child}/ns/user")
        finally:
            os.close(release[1])
            os.close(ready[0])
            os.waitpid(child, 0)


def _open_high(path: str) -> int:
    """Open out of the way of the low numbers that are given to jobs."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, LOWEST_DESCRIPTOR)
    finally:
        os.close(descriptor)


def make_maps() -> OwnerMaps | None:
    """Return the maps for jobs of a root worker, with the one for root's own files made; None where none are needed or possible."""
    if os.geteuid() != 0 or not kernel.has_capability(kernel.CAP_SYS_ADMIN):
        return None
    maps = OwnerMaps(UNPRIVILEGED_ID, UNPRIVILEGED_ID)
    try:
        maps.descriptor((0, 0))
    except OSError:
        return None  # the host allows none: the permissions of the files decide
    return maps


def _hold_new_namespace(ready: tuple[int, int], release: tuple[int, int]) -> None:
    try:
        os.close(release[1])
        kernel.unshare(kernel.CLONE_NEWUSER)
        os.write(ready[1], b"r")
        os.read(release[0], 1)
    finally:
        os._exit(0)


def write_file(path: str, text: str) -> None:
    """Write in one call, as the kernel's own files demand."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def enter_user_namespace(inside_uid: int, inside_gid: int) -> None:
    """Unshare the user namespace; this process's user and group are the only ones that exist in it."""
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER)
    write_file("/proc/self/setgroups", "deny")
    write_file("/proc/self/uid_map", f"{inside_uid} {uid} 1\n")
    write_file("/proc/self/gid_map", f"{inside_gid} {gid} 1\n")


def become(uid: int, gid: int) -> None:
    """Change a root process into this user for good, in a user namespace of its own where it is ``INSIDE_ID``.

    Its /proc files stay its own (dumpable), which writing the maps needs.
    """
    if os.geteuid() != uid or os.getegid() != gid:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
    enter_user_namespace(INSIDE_ID, INSIDE_ID)

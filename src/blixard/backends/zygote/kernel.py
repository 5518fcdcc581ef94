"""What the kernel must be told so that no process survives its owner. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

FIONREAD = 0x541B  # asm-generic/ioctls.h; Python's termios has it under the same name
IN_MOVED_FROM = 0x40  # linux/inotify.h
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_ONLYDIR = 0x1000000
PR_SET_PDEATHSIG = 1  # https://man7.org/linux/man-pages/man2/prctl.2.html
PR_SET_CHILD_SUBREAPER = 36

_NONE = bytes(4)
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), 0, 0, 0), f"prctl({option})")


def die_with_parent(parent: int, number: signal.Signals) -> None:
    """Have the kernel send ``number`` when the parent ends. If ``parent`` has ended already, end now."""
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own, so that none gets out of sight."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def count_unread(descriptor: int) -> int:
    """Return how many bytes can be read now from a pipe, either end of it, or an inotify descriptor. Raises ``OSError``."""
    count = fcntl.ioctl(descriptor, FIONREAD, _NONE)
    return 0 if count == _NONE else int.from_bytes(count, sys.byteorder)


class Watch:
    """Says whether anything has come into or gone from one of the directories, or one of them was replaced: one system call for all.

    Raises ``OSError`` when the kernel gives no more of these to this user, or a directory is not there.
    """

    def __init__(self, directories: Iterable[str]) -> None:
        paths = tuple(directories)
        self._directories = {*paths, *map(os.path.dirname, paths)}
        self._descriptor = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK), "inotify_init1")
        try:
            self._add()
        except OSError:
            self.close()
            raise

    def has_seen_something(self) -> bool:
        return count_unread(self._descriptor) > 0

    def begin_again(self) -> None:
        """Forget what was seen, and watch what now is at these paths."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._descriptor, 65536):
                pass
        self._add()

    def close(self) -> None:
        os.close(self._descriptor)

    def _add(self) -> None:
        mask = IN_CREATE | IN_MOVED_TO | IN_DELETE | IN_MOVED_FROM | IN_ONLYDIR
        for path in self._directories:
            _checked(_libc.inotify_add_watch(self._descriptor, os.fsencode(path), ctypes.c_uint32(mask)), path)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def children_of(pid: int) -> list[int]:
    """Return the children of a process, empty if it is gone."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                found.extend(map(int, file.read().split()))
    except FileNotFoundError:
        if not Path("/proc/self/task", str(os.getpid()), "children").exists():
            return _children_by_scan(pid)  # a kernel without CONFIG_PROC_CHILDREN
    except ProcessLookupError:
        pass
    return found


def _children_by_scan(pid: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="latin-1") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(name))
    return found


def descendants_of(pid: int) -> list[int]:
    """Return every descendant, parents before children."""
    found: list[int] = []
    waiting = children_of(pid)
    while waiting:
        found.extend(waiting)
        waiting = [child for parent in waiting for child in children_of(parent)]
    return found


def kill_descendants() -> None:
    """End every descendant of this process, which must adopt orphans, and reap it. Returns when none is left.

    Whoever is not caught in one round (forked meanwhile) is an orphan by the next, and so a child of this process.
    """
    while True:
        for pid in descendants_of(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return

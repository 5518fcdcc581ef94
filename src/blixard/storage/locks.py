"""Locks that tell whether a process lives: free only when every process that holds the descriptor is gone (flock(2))."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from blixard.errors import Conflict

PROBE_TRIES = 20
PROBE_PAUSE = 0.01


def _try_lock(fd: int) -> bool:
    """Try for a moment: ``is_free`` of another process holds a lock for microseconds only."""
    for _ in range(PROBE_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(PROBE_PAUSE)
        else:
            return True
    return False


class FileLock:
    """An exclusive lock on a file, held until ``release`` or the death of the last process that inherited ``fd``."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def acquire(cls, path: Path, note: str = "") -> FileLock:
        """Take the lock, writing ``note`` (such as a pid) into the file. Raises ``Conflict`` with the holder's note when it is taken."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _try_lock(fd):
            holder = os.read(fd, 200).decode(errors="replace").strip()
            os.close(fd)
            raise Conflict(f"{path} is locked by {holder or 'another process'}")
        os.ftruncate(fd, 0)
        os.pwrite(fd, note.encode(), 0)
        return cls(path, fd)

    @classmethod
    def create(cls, path: Path) -> FileLock:
        """Make a file that is locked from the moment it can be seen, so nobody ever finds it free while we live."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        hidden = path.with_name(f".{path.name}.{os.getpid()}")
        fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.rename(path)
        return cls(path, fd)

    def release(self, *, remove: bool = False) -> None:
        """Give the lock up; with ``remove`` the file goes first. Allowed twice."""
        if self.fd < 0:
            return
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self.fd)
        self.fd = -1


def is_free(path: Path) -> bool:
    """Say whether nobody holds the lock. A file that does not exist is free: its holder removed it, or never came to be."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def boot_id() -> str:
    """Return what names this boot of this machine; empty where the system has no such name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""

"""Remembers on disk whether the last run of a node ended in good order.

The engine keeps its database without syncing it and builds it anew from the log after an unclean end, which it recognises by a file that it removes when it ends well.
A power cut soon after a good end would find neither that file nor all of the database. So our own mark goes only after the database is on disk.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from blixard.errors import StoreUnavailable
from blixard.storage.locks import is_free

_STATE = "state_machine"
_LOCKS = ("logs/lock.hql", f"{_STATE}/lock")
FREE_SECONDS = 5.0
"""How long a start waits for the threads of an earlier life in this process, which let go of their files a moment after its end."""


class CrashMark:
    """The mark of one data directory. All calls block for the disk."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._mark = data_dir / "running"
        self._state = data_dir / _STATE

    def set(self) -> None:
        """Before the start: wait until nobody uses the directory; have the engine rebuild its database if the mark is still there, then leave it for the next time.

        Raises ``StoreUnavailable`` for a directory that another node uses.
        """
        self._data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._wait_free()
        if self._mark.exists() and self._state.exists():
            (self._state / "lock").touch()
        self._mark.touch()
        _sync(self._mark.parent)

    def _wait_free(self) -> None:
        deadline = time.monotonic() + FREE_SECONDS
        while taken := next((name for name in _LOCKS if not is_free(self._data_dir / name)), None):
            if time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"another process uses {self._data_dir}: it holds {taken}", hint="a data directory is for one node"
                )
            time.sleep(0.01)

    def clear(self) -> None:
        """After a good end: bring the database to disk, then remove the mark."""
        sync_tree(self._state)
        self._mark.unlink(missing_ok=True)
        _sync(self._mark.parent)


def sync_tree(directory: Path) -> None:
    """Bring a directory with all that is in it to disk."""
    for path in sorted(directory.rglob("*")):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

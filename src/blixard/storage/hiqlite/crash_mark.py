"""Remembers on disk whether the last run of a node ended in good order.

The engine keeps its database without syncing it and builds it anew from the log after an unclean end, which it recognises by a file that it removes when it ends well.
A power cut soon after a good end would find neither that file nor all of the database. So our own mark goes only after the database is on disk.
"""

from __future__ import annotations

import os
from pathlib import Path

_STATE = "state_machine"


class CrashMark:
    """The mark of one data directory. All calls block for the disk."""

    def __init__(self, data_dir: Path) -> None:
        self._mark = data_dir / "running"
        self._state = data_dir / _STATE

    def set(self) -> None:
        """Before the start: have the engine rebuild its database if the mark is still there, then leave it for the next time."""
        self._mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._mark.exists() and self._state.exists():
            (self._state / "lock").touch()
        self._mark.touch()
        _sync(self._mark.parent)

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

"""The lock by which others on this machine know at once that a worker and all of its jobs are gone."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from blixard.domain.ids import new_id
from blixard.errors import Conflict
from blixard.storage.locks import FileLock, is_free


class WorkerHome:
    """The private directory of one worker process and its lock.

    All sessions of the process share one lock: each ``sessions/<id>.lock`` is a hard link to it. So a session is locked
    from the moment its file is there, and supervisors of jobs need to inherit one descriptor only.
    """

    def __init__(self, lock: FileLock, directory: Path, sessions: Path | None) -> None:
        self.lock = lock
        self.directory = directory
        self._sessions = sessions
        self._links: list[Path] = []

    @classmethod
    def create(cls, scratch: Path, sessions: Path | None) -> WorkerHome:
        """Make a fresh directory under ``scratch``, and remove those whose processes are gone.

        ``sessions`` is where the control plane looks for session locks; None when it is not on this machine's data directory.
        """
        remove_leftovers(scratch)
        name = new_id("home")
        lock = FileLock.create(scratch / f"{name}.lock")
        directory = scratch / name
        directory.mkdir(mode=0o700)
        return cls(lock, directory, sessions)

    @property
    def is_visible(self) -> bool:
        """Whether the control plane can see the locks."""
        return self._sessions is not None

    def link(self, session: str) -> None:
        """Show the lock of a session. Call before the session is registered."""
        if self._sessions is None:
            return
        self._sessions.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._sessions / f"{session}.lock"
        with contextlib.suppress(FileExistsError):
            os.link(self.lock.path, path)
            self._links.append(path)

    def unlink(self, session: str) -> None:
        """Remove the sight of a session's lock: it has ended."""
        for path in [path for path in self._links if path.name == f"{session}.lock"]:
            path.unlink(missing_ok=True)
            self._links.remove(path)

    def remove(self) -> None:
        """Remove the directory and give up the lock. Only when nothing of the worker's jobs is left."""
        shutil.rmtree(self.directory, ignore_errors=True)
        for path in self._links:
            path.unlink(missing_ok=True)
        self.lock.release(remove=True)


def remove_leftovers(scratch: Path) -> int:
    """Remove the directories of worker processes that are gone with all of their jobs; return how many."""
    removed = 0
    for path in scratch.glob("home_*.lock"):
        if not is_free(path):
            continue
        try:
            lock = FileLock.acquire(path)
        except Conflict:  # another worker that starts removes it
            continue
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        lock.release(remove=True)
        removed += 1
    return removed

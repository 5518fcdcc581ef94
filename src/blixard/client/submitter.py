"""The embedded process as a submitter: its own child worker runs what it submits, and its death is known at once."""

from __future__ import annotations

from pathlib import Path

from blixard.domain.ids import new_id
from blixard.storage.locks import FileLock


class Submitter:
    """An id that is alive as long as its lock is held. The lock is taken with the first use of the id, so readers leave no trace."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.id = new_id("submitter")
        self._lock: FileLock | None = None

    def use(self) -> str:
        """Return the id, alive from now on."""
        if self._lock is None:
            self._lock = FileLock.create(self._directory / f"{self.id}.lock")
        return self.id

    def end(self) -> None:
        """Die: whoever comes next takes over the jobs that are left. Allowed twice and before ``use``."""
        if self._lock is not None:
            self._lock.release(remove=True)

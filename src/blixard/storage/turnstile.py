"""Fair turns for processes that write the same database.

SQLite's write lock is won by whoever asks at the right moment, so a busy process can keep another one out for long. Whoever
wants the lock holds the turnstile while waiting for it. A process that has just written and wants to write again must
pass the turnstile first, and so cannot overtake the one that waits.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from blixard.errors import StoreUnavailable

_POLL_SECONDS = 0.001


class Turnstile:
    """An advisory lock on a file of its own; the kernel frees it when its holder dies. Used by one thread."""

    def __init__(self, path: Path, *, patience: float) -> None:
        self._path = path
        self._patience = patience
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def enter(self) -> None:
        """Wait for the turn. Raises ``StoreUnavailable`` when it does not come within ``patience`` seconds."""
        if self._try():
            return
        deadline = time.monotonic() + self._patience
        while not self._try():
            if time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"another process has kept the write turn of {self._path} for {self._patience:.0f} s",
                    hint="look for a stopped Blixard process, then try again",
                )
            time.sleep(_POLL_SECONDS)

    def leave(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._descriptor)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

"""The runtime directory of one manager: its lock says whether it lives, and with it goes everything that it has left."""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from pathlib import Path

from blixard.errors import Conflict
from blixard.storage.locks import FileLock, is_free
from blixard.vm.hypervisor.contract import Hypervisor

LOCK = "lock"
CONTROL = "control.sock"
MAKING_SECONDS = 60.0
"""A directory without its final name is left alone for this long."""
logger = logging.getLogger(__name__)


class OwnerDirectory:
    """``run/<owner>/``: held from before it can be seen until ``remove``."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, run: Path, note: str) -> OwnerDirectory:
        """Make one below ``run``. Raises ``OSError``."""
        run.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = run / secrets.token_hex(6)
        hidden = run / f".{path.name}"
        hidden.mkdir(mode=0o700)
        lock = FileLock.acquire(hidden / LOCK, note)
        hidden.rename(path)
        lock.path = path / LOCK
        return cls(path, lock)

    def remove(self) -> None:
        """Remove it with all that is in it. Only when no machine is left. Allowed twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()


def living_owners(run: Path) -> list[Path]:
    """Return the directories of the managers that live now."""
    return [path for path in sorted(run.glob("*")) if (path / LOCK).exists() and not is_free(path / LOCK)]


def _is_being_made(path: Path) -> bool:
    """Its lock does not stand yet, and perhaps its maker will be there in a moment."""
    try:
        return path.name.startswith(".") and time.time() - path.stat().st_mtime < MAKING_SECONDS
    except FileNotFoundError:
        return True


def end_the_dead(run: Path, hypervisor: Hypervisor) -> int:
    """End the machines of managers that died, remove their directories; return how many managers there were."""
    ended = 0
    for path in sorted(run.glob("*")):
        if not is_free(path / LOCK) or _is_being_made(path):
            continue
        try:
            lock = FileLock.acquire(path / LOCK) if (path / LOCK).exists() else None
        except Conflict:  # another manager that starts does it
            continue
        machines = hypervisor.end_orphans(path)
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            lock.release()
        logger.warning("the VM manager %s had died; its %d virtual machine(s) were ended", path.name, machines)
        ended += 1
    return ended

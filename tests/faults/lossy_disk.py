"""A disk that can lose its power: a SQLite VFS which knows at every moment what a real disk would still hold.

Each write notes what it overwrote; a sync forgets the notes of its file. So the files as they would be after a power cut can
be made at any call: everything that was not synced is undone, or a random part of it, or its last write is torn.
"""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import apsw

SECTOR = 512
MODES = ("nothing unsynced", "some unsynced", "torn")


class Unsynced(NamedTuple):
    offset: int
    old: bytes
    old_size: int
    new: bytes
    """Empty for a truncation to ``offset``."""


class LossyDisk:
    """What was written and not synced, for each file. ``on_call`` runs before each sync and after each write."""

    def __init__(self) -> None:
        self.unsynced: dict[str, list[Unsynced]] = {}
        self.calls = 0
        self.on_call: Callable[[], None] | None = None
        self._lock = threading.RLock()

    def note(self, path: str, change: Unsynced) -> None:
        with self._lock:
            self.unsynced.setdefault(path, []).append(change)
            self.tick()

    def synced(self, path: str) -> None:
        with self._lock:
            self.unsynced.pop(path, None)

    def tick(self) -> None:
        with self._lock:
            self.calls += 1
            if self.on_call is not None:
                self.on_call()

    def cut(self, database: Path, target: Path, mode: str, chance: random.Random) -> None:
        """Write into ``target`` what the disk would hold of the database and its WAL if power went now."""
        for suffix in ("", "-wal"):
            source = Path(f"{database}{suffix}")
            if source.exists():
                copy = target / f"cut.db{suffix}"
                shutil.copy(source, copy)
                _undo(copy, self.unsynced.get(str(source), []), mode, chance)


def _undo(path: Path, changes: list[Unsynced], mode: str, chance: random.Random) -> None:
    with path.open("r+b") as file:
        for change in reversed(changes):
            file.seek(change.offset)
            file.write(change.old)
            file.truncate(change.old_size)
        for number, change in enumerate(changes):
            landed = _landed(change, mode, last=number == len(changes) - 1, chance=chance)
            if landed is None:
                continue
            file.seek(change.offset)
            if change.new:
                file.write(landed)
            else:
                file.truncate(change.offset)


def _landed(change: Unsynced, mode: str, *, last: bool, chance: random.Random) -> bytes | None:
    """Return how much of an unsynced change has reached the disk all the same, or None for nothing of it."""
    if mode == "some unsynced":
        return change.new if chance.random() < 0.5 else None
    if mode == "torn" and last and len(change.new) > SECTOR:
        return change.new[: SECTOR * chance.randrange(1, max(2, len(change.new) // SECTOR))]
    return None


class LossyFile(apsw.VFSFile):
    def __init__(self, disk: LossyDisk, name: str, flags: list[int]) -> None:
        self._disk = disk
        self._name = name
        super().__init__("unix", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 - the name that apsw calls
        size = self.xFileSize()
        old = self.xRead(min(len(data), size - offset), offset) if offset < size else b""
        super().xWrite(data, offset)
        self._disk.note(self._name, Unsynced(offset, bytes(old), size, bytes(data)))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802 - the name that apsw calls
        size = self.xFileSize()
        old = self.xRead(size - newsize, newsize) if size > newsize else b""
        super().xTruncate(newsize)
        self._disk.note(self._name, Unsynced(newsize, bytes(old), size, b""))

    def xSync(self, flags: int) -> None:  # noqa: N802 - the name that apsw calls
        self._disk.tick()
        super().xSync(flags)
        self._disk.synced(self._name)


class LossyVFS(apsw.VFS):
    """Registered under ``name`` until ``unregister``."""

    def __init__(self, name: str, disk: LossyDisk) -> None:
        self._disk = disk
        super().__init__(name, "unix")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> LossyFile:  # noqa: N802 - the name that apsw calls
        plain = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        return LossyFile(self._disk, plain, flags)

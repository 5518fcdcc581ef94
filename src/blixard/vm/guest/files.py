"""A job's files in the guest: put into its room as they come, and what it changed in granted ones sent back."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from blixard.vm.guest.protocol import CHUNK_BYTES, Entry, EntryKind, EntryReader, Malformed
from blixard.vm.guest.runner import USER_ID

MAX_BYTES = 1 << 40
"""What does not fit is refused by the room's file system."""
_OTHERS = 0o022
_READ = 0o444
_ENTER = 0o111
State = tuple[int, int, int]
"""Size, time of the last change and mode."""


class FilePlacer:
    """Writes a stream of files below the room. ``code/`` and read-only binds stay root's, everything else is the job's."""

    def __init__(self, room: str, writable: frozenset[str]) -> None:
        self._room = room
        self._own = ("work/", *(f"binds/{name}" for name in writable))
        self._reader = EntryReader(MAX_BYTES)
        self._file = -1
        self._left = 0
        self._link = bytearray()
        self._path = ""
        self._is_own = False
        self.bytes_written = 0

    def feed(self, data: bytes) -> None:
        """Take the next piece of the stream. Raises ``Malformed`` and ``OSError``."""
        for item in self._reader.feed(data):
            if isinstance(item, Entry):
                self._begin(item)
            else:
                self._continue(item)

    def end(self) -> None:
        """The stream is over. Raises ``Malformed`` if it is not whole."""
        self.abandon()
        if not self._reader.is_between_entries:
            raise Malformed("the files of a job end in the middle of one")

    def abandon(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _begin(self, entry: Entry) -> None:
        self._path = os.path.join(self._room, entry.path)
        self._is_own = entry.path.startswith(self._own)
        self._left = entry.size
        if entry.kind == EntryKind.DIRECTORY:
            os.mkdir(self._path, self._mode(entry.mode) | (stat.S_IRWXU if self._is_own else _ENTER))
            self._give_away()
        elif entry.kind == EntryKind.FILE:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.open(self._path, flags, 0o600)
            os.fchmod(self._file, self._mode(entry.mode))
            self._give_away()
            self._close_if_whole()
        elif entry.kind == EntryKind.LINK:
            self._link = bytearray()
        else:
            raise Malformed("nothing can be removed from a job that has not begun")

    def _continue(self, data: bytes) -> None:
        self._left -= len(data)
        self.bytes_written += len(data)
        if self._file < 0:
            self._link += data
            if not self._left:
                os.symlink(bytes(self._link), os.fsencode(self._path))
                self._give_away()
            return
        while data:
            data = data[os.write(self._file, data) :]
        self._close_if_whole()

    def _close_if_whole(self) -> None:
        if not self._left:
            self.abandon()

    def _mode(self, mode: int) -> int:
        return mode | stat.S_IRUSR | stat.S_IWUSR if self._is_own else (mode & ~_OTHERS) | _READ

    def _give_away(self) -> None:
        if self._is_own:
            os.chown(self._path, USER_ID, USER_ID, follow_symlinks=False)


class ChangedFiles:
    """Knows how granted files looked before the job, and streams what it has changed."""

    def __init__(self, room: str, names: frozenset[str]) -> None:
        self._room = room
        self._names = sorted(names)
        self._before: dict[str, State] = {}

    def remember(self) -> None:
        """Take the files as they are now as what the host has."""
        self._before = dict(self._walk())

    def stream(self) -> Iterator[bytes]:
        """Yield the stream in pieces of at most ``CHUNK_BYTES``. What cannot be read is left out."""
        now = dict(self._walk())
        for path in sorted(set(self._before) - set(now), reverse=True):
            yield Entry(EntryKind.REMOVED, path).encode()
        for path, state in sorted(now.items()):
            if self._before.get(path) != state:
                yield from self._encode(path, state)

    def _walk(self) -> Iterator[tuple[str, State]]:
        for name in self._names:
            top = f"{self._room}/binds/{name}"
            if os.path.isdir(top) and not os.path.islink(top):
                for parent, directories, files in os.walk(top):
                    for child in (*directories, *files):
                        yield from self._look(os.path.join(parent, child))
            else:
                yield from self._look(top)

    def _look(self, path: str) -> Iterator[tuple[str, State]]:
        found = os.lstat(path)
        is_directory = stat.S_ISDIR(found.st_mode)
        if is_directory or stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
            changed = 0 if is_directory else found.st_mtime_ns
            yield path[len(self._room) + 1 :], (0 if is_directory else found.st_size, changed, found.st_mode)

    def _encode(self, path: str, state: State) -> Iterator[bytes]:
        size, _, mode = state
        full = os.path.join(self._room, path)
        if stat.S_ISDIR(mode):
            yield Entry(EntryKind.DIRECTORY, path, mode).encode()
        elif stat.S_ISLNK(mode):
            target = os.fsencode(os.readlink(full))
            yield Entry(EntryKind.LINK, path, mode, len(target)).encode() + target
        else:
            yield Entry(EntryKind.FILE, path, mode, size).encode()
            yield from _content(full, size)


def _content(path: str, size: int) -> Iterator[bytes]:
    """Yield exactly ``size`` bytes, as was announced; nothing writes to the file any more."""
    with open(path, "rb") as file:
        while size:
            data = file.read(min(CHUNK_BYTES, size))
            if not data:
                data = bytes(min(CHUNK_BYTES, size))
            size -= len(data)
            yield data

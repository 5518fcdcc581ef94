"""A job's files on the host: gathered into a stream for the guest, and what comes back written where it was granted.

What comes back is the guest's word: it can name nothing outside of what was granted, no link is followed, and no bit of a mode is
kept that would give rights.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping

import msgspec

from blixard.domain.limits import MIB
from blixard.vm.guest.protocol import MAX_ENTRIES, Entry, EntryKind, EntryReader, Malformed

MAX_SENT_BYTES = 4096 * MIB
"""A job's code, inputs and granted files together: they are copied into its machine's memory."""
MAX_RETURNED_BYTES = 4096 * MIB
READ_BYTES = 256 * 1024
_MODE = 0o777


class FilesRefused(Exception):
    """These files cannot be sent; the message says why."""


class Source(msgspec.Struct, frozen=True):
    """Send the file or directory ``path`` as the entry ``name`` of the stream."""

    name: str
    path: str


class Item(msgspec.Struct, frozen=True):
    """One entry to send, with the file that its content comes from."""

    kind: int
    name: str
    mode: int = 0
    size: int = 0
    path: str = ""


class Parcel(msgspec.Struct, frozen=True):
    """Everything to send, found in one look at the files."""

    items: tuple[Item, ...] = ()
    size: int = 0

    def stream(self) -> Iterator[bytes]:
        """Yield the stream in pieces of about ``READ_BYTES``. Blocks on the disk. Raises ``OSError``."""
        waiting = bytearray()
        for item in self.items:
            waiting += Entry(item.kind, item.name, item.mode, item.size).encode()
            for piece in _content(item):
                waiting += piece
                if len(waiting) >= READ_BYTES:
                    yield bytes(waiting)
                    waiting.clear()
        if waiting:
            yield bytes(waiting)


def gather(sources: list[Source]) -> Parcel:
    """Look at the files. Blocks on the disk. Raises ``FilesRefused`` and ``OSError``."""
    items: list[Item] = []
    made: set[str] = set()
    size = 0
    for source in sources:
        for item in (*_parents(source.name, made), *_walk(source)):
            items.append(item)
            size += item.size
            if len(items) > MAX_ENTRIES or size > MAX_SENT_BYTES:
                raise FilesRefused(
                    f"{source.path} has too much to be copied into a virtual machine: "
                    f"at most {MAX_ENTRIES} files and {MAX_SENT_BYTES // MIB} MB together"
                )
    return Parcel(tuple(items), size)


def _parents(name: str, made: set[str]) -> Iterator[Item]:
    """Yield the directories above an input. Those of one level are there already."""
    parts = name.split("/")[:-1]
    for depth in range(2, len(parts) + 1):
        above = "/".join(parts[:depth])
        if above not in made:
            made.add(above)
            yield Item(EntryKind.DIRECTORY, above, 0o755)


def _walk(source: Source) -> Iterator[Item]:
    found = os.stat(source.path)
    if not stat.S_ISDIR(found.st_mode):
        if not stat.S_ISREG(found.st_mode):
            raise FilesRefused(
                f"{source.path} is neither a file nor a directory; a virtual machine can have only copies"
            )
        yield Item(EntryKind.FILE, source.name, found.st_mode & _MODE, found.st_size, source.path)
        return
    if "/" in source.name:  # the others are there already
        yield Item(EntryKind.DIRECTORY, source.name, found.st_mode & _MODE)
    waiting = [(source.path, source.name)]
    while waiting:
        directory, name = waiting.pop()
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                item = _look(entry, f"{name}/{entry.name}")
                if item is not None:
                    yield item
                    if item.kind == EntryKind.DIRECTORY:
                        waiting.append((entry.path, item.name))


def _look(entry: os.DirEntry[str], name: str) -> Item | None:
    """Return the entry of a file, directory or link; sockets and their like have no copies."""
    found = entry.stat(follow_symlinks=False)
    mode = found.st_mode & _MODE
    if stat.S_ISDIR(found.st_mode):
        return Item(EntryKind.DIRECTORY, name, mode)
    if stat.S_ISLNK(found.st_mode):
        return Item(EntryKind.LINK, name, mode, len(os.fsencode(os.readlink(entry.path))), entry.path)
    if stat.S_ISREG(found.st_mode):
        return Item(EntryKind.FILE, name, mode, found.st_size, entry.path)
    return None


def _content(item: Item) -> Iterator[bytes]:
    """Yield exactly as many bytes as were announced, whatever happens to the file meanwhile."""
    left = item.size
    if item.kind == EntryKind.LINK:
        yield os.fsencode(os.readlink(item.path))[:left].ljust(left, b"_")
        return
    if not left:
        return
    with open(item.path, "rb", buffering=0) as file:
        while left:
            data = file.read(min(READ_BYTES, left)) or bytes(min(READ_BYTES, left))
            left -= len(data)
            yield data


class ReturnedFiles:
    """Writes what a job has changed in ``places``: names of the stream and the granted paths that they stand for."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places
        self._reader = EntryReader(MAX_RETURNED_BYTES)
        self._file = -1
        self._link: tuple[int, str] | None = None
        self._target = bytearray()
        self._left = 0
        self.paths: list[str] = []
        """What was written or removed, as the job knows it."""

    def feed(self, data: bytes) -> None:
        """Take the next piece. Blocks on the disk. Raises ``Malformed`` and ``OSError``."""
        for item in self._reader.feed(data):
            if isinstance(item, Entry):
                self._begin(item)
            else:
                self._continue(item)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _begin(self, entry: Entry) -> None:
        first, _, rest = entry.path.partition("/")
        name, _, below = rest.partition("/")
        place = self._places.get(name)
        if first != "binds" or place is None:
            raise Malformed(f"the guest wants to write {entry.path!r}, which was not granted")
        if not below:
            directory, last = os.path.split(place)
            parent = os.open(directory, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)
        else:
            *above, last = below.split("/")
            parent = _descend(place, above)
        try:
            self._left = entry.size
            self._apply(entry, parent, last, place)
        finally:
            if self._link is None:
                os.close(parent)
        self.paths.append(f"{place}/{below}" if below else place)

    def _apply(self, entry: Entry, parent: int, name: str, place: str) -> None:
        match entry.kind:
            case EntryKind.DIRECTORY:
                _make_directory(parent, name, entry.mode, place)
            case EntryKind.FILE:
                self._file = _open_file(parent, name, entry.mode, place)
                self._close_if_whole()
            case EntryKind.LINK:
                self._link = (parent, name)
                self._target.clear()
            case EntryKind.REMOVED:
                _remove(parent, name)

    def _continue(self, data: bytes) -> None:
        self._left -= len(data)
        if self._link is not None:
            self._target += data
            if not self._left:
                self._make_link(*self._link)
            return
        while data:
            data = data[os.write(self._file, data) :]
        self._close_if_whole()

    def _make_link(self, parent: int, name: str) -> None:
        self._link = None
        try:
            _remove(parent, name)
            os.symlink(bytes(self._target), os.fsencode(name), dir_fd=parent)
        finally:
            os.close(parent)

    def _close_if_whole(self) -> None:
        if not self._left:
            self.close()


def _descend(place: str, parts: list[str]) -> int:
    """Return a descriptor of a directory below ``place``; links are not followed."""
    current = os.open(place, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)
    for part in parts:
        flags = os.O_DIRECTORY | os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            below = os.open(part, flags, dir_fd=current)
        finally:
            os.close(current)
        current = below
    return current


def _make_directory(parent: int, name: str, mode: int, place: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, mode & _MODE, dir_fd=parent)
        made = os.open(name, os.O_DIRECTORY | os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            _give_away(made, place)
        finally:
            os.close(made)


def _open_file(parent: int, name: str, mode: int, place: str) -> int:
    """Open for writing what is a regular file, or make it."""
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if stat.S_ISLNK(_mode_of(parent, name)):
        os.unlink(name, dir_fd=parent)
    is_new = _mode_of(parent, name) == 0
    file = os.open(name, flags | (os.O_CREAT | os.O_EXCL if is_new else 0), 0o600, dir_fd=parent)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise FileExistsError(0, f"{name} is no regular file here")
        os.ftruncate(file, 0)
        if is_new:
            _give_away(file, place)
        with contextlib.suppress(PermissionError):  # somebody else's file that we may write
            os.fchmod(file, mode & _MODE)
    except OSError:
        os.close(file)
        raise
    return file


def _mode_of(parent: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return 0


def _give_away(descriptor: int, place: str) -> None:
    """What a root worker makes for a job belongs to whom the granted path belongs to."""
    if os.geteuid() == 0:
        owner = os.stat(place)
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _remove(parent: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(_mode_of(parent, name)):
            os.rmdir(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)

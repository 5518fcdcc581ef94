"""What travels between the host and a guest's agent: frames, and the streams of files within them. Standard library only.

A frame is a head (length of the body, kind, channel) and a body. Channel 0 is the link itself; the host opens every other one, for
a job or a program, with a number that it has not used before. Bodies of ``DATA`` begin with one byte that names the stream, those
of ``WINDOW`` are a count of bytes, of ``SIGNAL`` a number; all others are a JSON object.

Flow control: a side may send ``WINDOW_BYTES`` of ``DATA`` bodies per channel, and as many more as the other has returned by
``WINDOW``. What arrives beyond is a breach, as is every malformed frame: the guest is lost then.

Host to guest, and what answers it:
- ``REQUEST`` ``{"id", "op": "hello" | "reseed" | "ping" | "status" | "shutdown", ...}`` -> ``REPLY`` ``{"id", ...}``
- ``OPEN`` ``{"kind": "job" | "program", ...}``, its ``DATA`` and ``END``, ``SIGNAL``, ``RESIZE`` -> ``EVENT`` ``{"event": "started"}``, ``DATA``,
  ``END`` of the file stream, ``EVENT`` ``{"event": "exited", ...}`` when nothing of it runs any more, then ``CLOSED`` when nothing of it is left.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

VERSION = 1
"""Both ends must have the same."""
HEAD = struct.Struct("<IBI")
WINDOW = struct.Struct("<I")
ENTRY = struct.Struct("<BHQH")
PACKET_HEAD = struct.Struct("<I")

KIB = 1024
MAX_PORT_WRITE = 32 * KIB
"""The guest's kernel takes no more of the agent's port at a time."""
CHUNK_BYTES = MAX_PORT_WRITE - HEAD.size - 1
"""Payload of one frame of data."""
MAX_TO_HOST_BYTES = 64 * KIB
"""Body of a frame from the guest."""
MAX_TO_GUEST_BYTES = 4096 * KIB
"""Body of a frame to the guest: a command's arguments (1 MiB) as JSON, in the worst case all escaped, and its environment."""
WINDOW_BYTES = 512 * KIB
MAX_CHANNEL = (1 << 32) - 1
MAX_PACKET_BYTES = 33 * KIB * KIB
"""A result of 16 MiB, or arguments: more is not from our code."""
MAX_PATH_BYTES = 4096
MAX_ENTRIES = 100_000
"""Files and directories in one stream."""
KILL = 9
"""As a ``SIGNAL``: every process of the channel, by its cgroup. Any other number goes to the process group of the first process."""


class Kind(enum.IntEnum):
    REQUEST = 1
    REPLY = 2
    OPEN = 3
    DATA = 4
    END = 5
    """One stream of a channel, named by the only byte, is over."""
    WINDOW = 6
    SIGNAL = 7
    RESIZE = 8
    """Two 16-bit numbers: rows and columns of a program's terminal."""
    EVENT = 9
    CLOSED = 10


class Stream:
    """First byte of a ``DATA`` body."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    PACKET = 3
    """Packets between the host and the job's runner (backends/executor/messages.py), each behind its length."""
    FILES = 4
    """Entries, each ``ENTRY``, path, content: a job's code, inputs and granted files; what it wrote comes back the same way."""


class EntryKind:
    DIRECTORY = 1
    FILE = 2
    LINK = 3
    """A symbolic link; its content is where it points to."""
    REMOVED = 4
    """Guest to host: what stood here was removed."""


_KINDS = frozenset(int(kind) for kind in Kind)
_ENTRY_KINDS = frozenset({EntryKind.DIRECTORY, EntryKind.FILE, EntryKind.LINK, EntryKind.REMOVED})
Frame = tuple[int, int, bytes]
"""Kind, channel, body."""


class Malformed(Exception):
    """The other end does not keep to the protocol."""


def frame(kind: int, channel: int, body: bytes = b"") -> bytes:
    return HEAD.pack(len(body), kind, channel) + body


class FrameReader:
    """Cuts bytes, in whatever pieces they come, into frames. Keeps at most one frame of ``max_body`` bytes."""

    def __init__(self, max_body: int) -> None:
        self._max_body = max_body
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that are whole now. Raises ``Malformed``; after that the reader is of no use."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= HEAD.size:
                length, kind, channel = HEAD.unpack_from(self._buffer, start)
                if length > self._max_body:
                    raise Malformed(f"a frame of {length} bytes; {self._max_body} are allowed")
                if kind not in _KINDS:
                    raise Malformed(f"a frame of the unknown kind {kind}")
                end = start + HEAD.size + length
                if len(self._buffer) < end:
                    return
                body = bytes(self._buffer[start + HEAD.size : end])
                start = end
                yield kind, channel, body
        finally:
            del self._buffer[:start]

    @property
    def is_between_frames(self) -> bool:
        return not self._buffer


class PacketJoiner:
    """Puts packets together from the pieces in which they travel."""

    def __init__(self, max_bytes: int = MAX_PACKET_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the packets that are whole now. Raises ``Malformed``."""
        self._buffer += data
        while len(self._buffer) >= PACKET_HEAD.size:
            (length,) = PACKET_HEAD.unpack_from(self._buffer)
            if length > self._max_bytes:
                raise Malformed(f"a packet of {length} bytes; {self._max_bytes} are allowed")
            end = PACKET_HEAD.size + length
            if len(self._buffer) < end:
                return
            packet = bytes(self._buffer[PACKET_HEAD.size : end])
            del self._buffer[:end]
            yield packet


def packed(packet: bytes) -> bytes:
    return PACKET_HEAD.pack(len(packet)) + packet


class Entry:
    """One file of a stream. ``size`` bytes of content follow; ``path`` is relative and goes nowhere but down."""

    __slots__ = ("kind", "mode", "path", "size")

    def __init__(self, kind: int, path: str, mode: int = 0, size: int = 0) -> None:
        self.kind = kind
        self.path = path
        self.mode = mode
        self.size = size

    def encode(self) -> bytes:
        path = self.path.encode(errors="surrogateescape")
        return ENTRY.pack(self.kind, self.mode & 0o7777, self.size, len(path)) + path


class EntryReader:
    """Cuts a stream of files into entries and their content, in whatever pieces it comes. Keeps no content."""

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._entries = 0
        self._content = 0
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Entry | bytes]:
        """Yield each entry, then its content in pieces. Raises ``Malformed``, also for more than ``max_bytes`` of content."""
        buffer = self._buffer
        buffer += data
        while True:
            if self._content:
                piece = bytes(buffer[: self._content])
                if not piece:
                    return
                del buffer[: len(piece)]
                self._content -= len(piece)
                yield piece
                continue
            entry = self._next_entry()
            if entry is None:
                return
            self._content = entry.size
            yield entry

    @property
    def is_between_entries(self) -> bool:
        return not self._content and not self._buffer

    def _next_entry(self) -> Entry | None:
        buffer = self._buffer
        if len(buffer) < ENTRY.size:
            return None
        kind, mode, size, length = ENTRY.unpack_from(buffer)
        if kind not in _ENTRY_KINDS or not 0 < length <= MAX_PATH_BYTES:
            raise Malformed(f"an entry of kind {kind} with a path of {length} bytes")
        if len(buffer) < ENTRY.size + length:
            return None
        path = bytes(buffer[ENTRY.size : ENTRY.size + length]).decode(errors="surrogateescape")
        del buffer[: ENTRY.size + length]
        self._check(kind, path, size)
        return Entry(kind, path, mode & 0o7777, size)

    def _check(self, kind: int, path: str, size: int) -> None:
        if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
            raise Malformed(f"an entry with the path {path!r}")
        if size and kind not in (EntryKind.FILE, EntryKind.LINK):
            raise Malformed(f"content of {path!r}, which is no file")
        if kind == EntryKind.LINK and not 0 < size <= MAX_PATH_BYTES:
            raise Malformed(f"a link {path!r} of {size} bytes")
        self._entries += 1
        self._left -= size
        if self._entries > MAX_ENTRIES:
            raise Malformed(f"more than {MAX_ENTRIES} files and directories")
        if self._left < 0:
            raise Malformed(f"files of more than {self._max_bytes} bytes")

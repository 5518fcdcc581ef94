"""Packets over SEQPACKET sockets, with file descriptors; a large one travels as a memory file. Shared by both ends of every socket."""

from __future__ import annotations

import array
import fcntl
import os
import socket

MAX_INLINE_BYTES = 64 * 1024
"""A larger packet would not fit into a socket's buffer beside others; it goes as a memory file."""
MAX_PACKET_BYTES = 32 * 1024 * 1024
"""Results are smaller. Whoever sends more is not our code: reading it would cost our memory."""
MAX_DESCRIPTORS = 8
_IN_MEMORY = b"M"
_ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)


def packet_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_packet(sock: socket.socket, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
    """Send one packet, whole or not at all. Raises ``BlockingIOError`` when a non-blocking socket has no room.

    The receiver gets copies of the descriptors; the caller's stay open.
    """
    if not descriptors and len(data) <= MAX_INLINE_BYTES:
        sock.send(data)
        return
    if len(data) <= MAX_INLINE_BYTES:
        socket.send_fds(sock, [data], descriptors)
        return
    memory = _memory_file(data)
    try:
        socket.send_fds(sock, [_IN_MEMORY], [memory, *descriptors])
    finally:
        os.close(memory)


class InvalidPacket(Exception):
    """The other end does not keep to the rules, so it is not our code any more."""


class PacketReader:
    """Receives packets; owns one buffer for all of them.

    ``is_hasty`` never waits, on a blocking socket neither: blocking or not is a matter of all copies of a socket.
    """

    def __init__(self, sock: socket.socket, *, is_hasty: bool = False) -> None:
        self._socket = sock
        self._flags = socket.MSG_CMSG_CLOEXEC | (socket.MSG_DONTWAIT if is_hasty else 0)
        self._buffer = bytearray(MAX_INLINE_BYTES + 4096)
        self._view = memoryview(self._buffer)
        self._buffers = [self._buffer]

    def receive(self) -> tuple[memoryview | bytes, list[int]] | None:
        """Return the next packet and its descriptors, which the caller must close; None at the end.

        The packet is valid until the next call. Raises ``BlockingIOError`` when a non-blocking socket has nothing, and
        ``InvalidPacket``; no descriptor stays open then.
        """
        try:
            size, ancillary, _, _ = self._socket.recvmsg_into(self._buffers, _ANCILLARY, self._flags)
        except ConnectionError:
            return None
        if not ancillary:
            return (self._view[:size], []) if size else None
        descriptors = _descriptors(ancillary)
        if self._view[:size] != _IN_MEMORY:
            return self._view[:size], descriptors
        try:
            return _content(descriptors[0]), descriptors[1:]
        except (InvalidPacket, OSError) as error:
            close_all(descriptors[1:])
            raise InvalidPacket(str(error)) from error
        finally:
            os.close(descriptors[0])


def _memory_file(data: bytes) -> int:
    memory = os.memfd_create("blixard-packet", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(memory, view) :]
    return memory


def close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _content(memory: int) -> bytes:
    """Read the whole memory file. Any other file is refused: reading it might block."""
    fcntl.fcntl(memory, fcntl.F_GET_SEALS)
    size = os.fstat(memory).st_size
    if size > MAX_PACKET_BYTES:
        raise InvalidPacket(f"a packet of {size} bytes; MAX_PACKET_BYTES allows {MAX_PACKET_BYTES}")
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        count = os.preadv(memory, [view[done:]], done)
        if count == 0:
            raise InvalidPacket("a packet that shrinks while it is read")
        done += count
    return bytes(data)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            found.extend(numbers)
    return found

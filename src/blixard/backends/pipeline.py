"""The backend's ends of the two pipes to a reusable executor: tickets, without which no call begins, and the journal of answers.

Both are the kernel's: what is in them is exact whatever happens to the processes at their ends.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator

from blixard.backends.executor.messages import JOIN, LENGTH_BYTES, NUMBER_BYTES, Answer, decode_answer
from blixard.backends.packets import InvalidPacket, send_packet

_ALL_BYTES = 64 * 1024
"""More than either pipe can hold."""


class Pipeline:
    """Not blocking, neither end: blocking or not is a matter of all copies of a descriptor."""

    def __init__(self) -> None:
        self._tickets, self._new_tickets = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._journal, self._their_journal = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            os.close(self._tickets)
            os.close(self._new_tickets)
            raise
        self._noted: deque[Answer] = deque()

    def join(self, channel: socket.socket) -> None:
        """Send the executor its ends. Once, before any call."""
        send_packet(channel, JOIN, (self._tickets, self._their_journal))

    def allow(self, numbers: Iterable[int]) -> None:
        """Let the executor begin these calls, which must have been sent."""
        os.write(self._new_tickets, b"".join([number.to_bytes(NUMBER_BYTES, "little") for number in numbers]))

    def take_back(self) -> set[int]:
        """Return the calls that had not begun, and now never will. Every other one has."""
        try:
            data = os.read(self._tickets, _ALL_BYTES)
        except BlockingIOError:
            return set()
        return {int.from_bytes(data[i : i + NUMBER_BYTES], "little") for i in range(0, len(data), NUMBER_BYTES)}

    def look(self) -> int:
        """Read what is noted by now and return the number of the newest answer that is known, 0 if there is none.

        Raises ``InvalidPacket`` or ``msgspec.DecodeError``: the other end is not our code any more.
        """
        try:
            data = os.read(self._journal, _ALL_BYTES)
        except BlockingIOError:
            data = b""
        self._noted.extend(_entries(data))
        return self._noted[-1].number if self._noted else 0

    def noted_before(self, number: int) -> Iterator[Answer]:
        """Take the answers to calls with lower numbers, in their order, out of what was read."""
        while self._noted and self._noted[0].number < number:
            yield self._noted.popleft()

    def close(self) -> None:
        for descriptor in (self._tickets, self._new_tickets, self._journal, self._their_journal):
            os.close(descriptor)


def _entries(data: bytes) -> Iterator[Answer]:
    start = 0
    while start < len(data):
        begin = start + LENGTH_BYTES
        start = begin + int.from_bytes(data[start:begin], "little")
        if start > len(data):
            raise InvalidPacket("a journal that ends within an answer")
        yield decode_answer(data[begin:start])

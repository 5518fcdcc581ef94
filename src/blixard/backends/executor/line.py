"""The executor's ends of what joins it to the backend: calls come in, answers go out."""

from __future__ import annotations

import os
import select
import socket
from collections import deque

from blixard.backends.executor.messages import (
    JOIN,
    LENGTH_BYTES,
    MAX_NOTED_BYTES,
    NOTED_TAG,
    NUMBER_BYTES,
    Answer,
    Call,
    Calls,
    decode_calls,
    encode,
)
from blixard.backends.packets import PacketReader, send_packet

QUIET_MICROSECONDS = 1_000
"""The backend hears of ended calls this soon at least, while others wait here to be run."""


class DirectLine:
    """Of a process that is used once: one call, one answer."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._reader = PacketReader(channel)
        self.number = bytes(NUMBER_BYTES)
        """Of the call that runs."""
        self.is_at_rest = True
        """No other call is known to wait here."""

    def next(self) -> tuple[Calls, Call] | None:
        """Wait for a call and begin it; None: the backend is gone."""
        received = self._reader.receive()
        if received is None:
            return None
        calls = decode_calls(received[0])
        self.number = _number(calls.calls[0])
        return calls, calls.calls[0]

    def answer(self, answer: Answer) -> None:
        send_packet(self._channel, encode(answer))


class PipelinedLine:
    """Of a reusable executor. Begins a call by taking its ticket, which the kernel gives to one side only.

    While more calls wait here, answers are only noted in the journal, a pipe that outlives this process: the backend reads it
    when it is told to, or when it wants to know what runs.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._reader = PacketReader(channel)
        received = self._reader.receive()
        if received is None or received[0] != JOIN:
            raise ConnectionError("the backend was gone before it said how to talk")
        self._tickets, self._journal = received[1]
        self._poll = select.poll()
        self._poll.register(self._tickets, select.POLLIN)
        self._batch: Calls | None = None
        self._calls: deque[Call] = deque()
        self._has_noted = False
        self._told_at = 0
        self.number = bytes(NUMBER_BYTES)

    @property
    def is_at_rest(self) -> bool:
        return not self._calls

    def next(self) -> tuple[Calls, Call] | None:
        ticket = self._take_ticket()
        if not ticket:
            return None
        self.number = ticket
        number = int.from_bytes(ticket, "little")
        while True:
            while self._calls:
                call = self._calls.popleft()
                if call.number == number:
                    assert self._batch is not None
                    return self._batch, call
            received = self._reader.receive()
            if received is None:
                return None
            self._batch = decode_calls(received[0])
            self._calls.extend(self._batch.calls)

    def answer(self, answer: Answer) -> None:
        data = encode(answer)
        if not (self._may_wait(answer, data) and self._note(data)):
            send_packet(self._channel, data)
            self._has_noted = False
            self._told_at = answer.finished_at

    def _take_ticket(self) -> bytes:
        while True:
            try:
                return os.read(self._tickets, NUMBER_BYTES)
            except BlockingIOError:
                self._tell()
                self._poll.poll()

    def _tell(self) -> None:
        """What was to be run next has been taken back: say what is noted, before waiting."""
        if self._has_noted:
            self._has_noted = False
            send_packet(self._channel, NOTED_TAG + self.number)

    def _may_wait(self, answer: Answer, data: bytes) -> bool:
        return (
            bool(self._calls)
            and len(data) <= MAX_NOTED_BYTES
            and answer.finished_at - self._told_at < QUIET_MICROSECONDS
            and answer.retire is None
            and not answer.native_stdout
            and not answer.native_stderr
        )

    def _note(self, data: bytes) -> bool:
        try:
            os.write(self._journal, len(data).to_bytes(LENGTH_BYTES, "little") + data)
        except BlockingIOError:  # smaller than it should be: a user may have used up what he may have of pipe buffers
            return False
        self._has_noted = True
        return True


def _number(call: Call) -> bytes:
    return call.number.to_bytes(NUMBER_BYTES, "little")

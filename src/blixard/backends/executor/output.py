"""sys.stdout and sys.stderr of a job: what is written goes as tagged packets into the channel, in exact order."""

from __future__ import annotations

import contextlib
import io
import socket
import sys
from typing import TYPE_CHECKING, Protocol

from blixard.backends.executor.messages import MAX_OUTPUT_CHUNK, STDERR_TAG, STDOUT_TAG

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class CurrentCall(Protocol):
    """Knows whose output it is."""

    number: bytes


class ChannelWriter(io.RawIOBase):
    """Sends every write at once; a slow reader makes the job wait. Its descriptor is the pipe that child processes write to."""

    def __init__(self, channel: socket.socket, current: CurrentCall, tag: bytes, descriptor: int) -> None:
        self._channel = channel
        self._current = current
        self._tag = tag
        self._descriptor = descriptor

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data).cast("B")
        head = self._tag + self._current.number
        for start in range(0, len(view), MAX_OUTPUT_CHUNK):
            self._channel.send(head + view[start : start + MAX_OUTPUT_CHUNK])
        return len(view)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor


class Streams:
    """Puts our two streams into ``sys`` and sees to it that they are there for every job."""

    def __init__(self, channel: socket.socket, current: CurrentCall) -> None:
        self._channel = channel
        self._current = current
        self._open()

    def _open(self) -> None:
        self._stdout = self._text(STDOUT_TAG, 1, "strict")
        self._stderr = self._text(STDERR_TAG, 2, "backslashreplace")

    def _text(self, tag: bytes, descriptor: int, errors: str) -> io.TextIOWrapper:
        writer = ChannelWriter(self._channel, self._current, tag, descriptor)
        # A raw writer in place of a buffered one: what is written to sys.stdout.buffer must not overtake or wait.
        return io.TextIOWrapper(writer, encoding="utf-8", errors=errors, newline="\n", line_buffering=True)  # type: ignore[arg-type]  # typeshed wants read methods too

    def install(self) -> None:
        if self._stdout.closed or self._stderr.closed:
            self._open()
        sys.stdout = sys.__stdout__ = self._stdout  # type: ignore[misc]  # both names must lead to the job's output
        sys.stderr = sys.__stderr__ = self._stderr  # type: ignore[misc]  # as above

    def finish(self) -> None:
        """Send what a job has left unsent, also in a stream that it put in place of ours, and put ours back."""
        if (
            sys.stdout is self._stdout
            and sys.stderr is self._stderr
            and not self._stdout.closed
            and not self._stderr.closed
        ):
            self._stdout.flush()
            self._stderr.flush()
            return
        for stream in (sys.stdout, sys.stderr, self._stdout, self._stderr):
            _flush(stream)
        self.install()


def _flush(stream: object) -> None:
    # The job's own object at the edge of a job: a print into it would have failed the same way.
    with contextlib.suppress(Exception):
        stream.flush()  # type: ignore[attr-defined]  # a job may put any object there

"""The backend's side of one runner: its supervisor's socket, its channel, and the pipes of its output."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from blixard.backends.attempt import Attempt
from blixard.backends.contract import Stream
from blixard.backends.executor.messages import (
    NOTED_TAG,
    NUMBER_BYTES,
    STDERR_TAG,
    STDOUT_TAG,
    Answer,
    decode_answer,
    decode_calls,
)
from blixard.backends.packets import InvalidPacket, PacketReader, close_all, packet_pair, send_packet
from blixard.backends.pipeline import Pipeline
from blixard.backends.zygote.client import ZygoteClient
from blixard.backends.zygote.messages import (
    KILL,
    TERMINATE,
    ControlMessage,
    Exited,
    Launch,
    Role,
    SpawnFailed,
    Starting,
    decode_control,
)

CHANNEL_BYTES = 128 * 1024
"""Buffer of a channel in each direction. Linux doubles it, and counts some 800 bytes at least for every packet."""
MAX_PACKETS = 1024
"""Read at a time: more than a channel can hold, so what lay there at first has been read, and a chatty job starves nobody."""
PIPE_BYTES = 1024 * 1024
"""Wanted size of a job's output pipes, so that it seldom waits for us."""
_READ_BYTES = 256 * 1024
_MAX_READS = 64
"""Reads from one pipe before other events get their turn."""
_DATA = 1 + NUMBER_BYTES
_OUTPUT = {STDOUT_TAG[0]: Stream.STDOUT, STDERR_TAG[0]: Stream.STDERR}


class RunnerOwner(Protocol):
    """Who is told what happens to a runner; both on the event loop."""

    def answered(self, runner: Runner, attempt: Attempt, answer: Answer) -> None:
        """The call of the attempt has ended; its output has been passed on."""

    def gone(self, runner: Runner, unread: list[Attempt], end: Exited | SpawnFailed | None) -> None:
        """The runner and all it started are gone (``end`` None: by violence from outside). Its output has been passed on.

        ``unread`` were never seen by it; ``runner.sent`` holds what it had begun and not answered.
        """


class Runner:
    """A process that runs calls (with a channel) or one command (without). Unusable after ``gone``."""

    def __init__(self, owner: RunnerOwner, *, code: str | None, is_single_use: bool) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self.code = code
        """The bundle that a reusable executor is bound to."""
        self.is_single_use = is_single_use
        self.sent: deque[Attempt] = deque()
        self.head_since = 0.0
        self.depth = 0
        self.is_gone = False
        self.is_ending = False
        """Takes no more calls: it was told to end, or said that it will."""
        self.has_begun = False
        """The job's own code may have run."""
        self.has_answered = False
        self.is_broken = False
        self.suspect: Attempt | None = None
        """The one that has broken it, if no other can have."""
        self._revoked: list[Attempt] = []
        """Taken back when it broke."""
        self._heard_at = 0
        """When the newest answer that was heard was given, microseconds since 1970."""
        self._held: tuple[Attempt, Answer] | None = None
        self._control: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._far_end: socket.socket | None = None
        self._pipeline: Pipeline | None = None
        self._pipes: dict[Stream, int] = {}
        self._listens_to_pipes = False
        self._has_channel = False

    # -- beginning ----------------------------------------------------------------------------------------------------

    def spawn(self, zygote: ZygoteClient, launch: Launch, stdin: Path | None) -> None:
        """Ask the zygote for the process. Raises ``OSError`` (nothing is left open) if that is not possible now."""
        theirs: dict[Role, int] = {}
        try:
            self._open(theirs, with_channel=not launch.argv)
            theirs[Role.STDIN] = os.open(os.devnull if stdin is None else stdin, os.O_RDONLY | os.O_CLOEXEC)
            zygote.spawn(launch, theirs)
        except OSError:
            self._close()
            raise
        finally:
            for descriptor in theirs.values():
                os.close(descriptor)
        assert self._control is not None
        self._loop.add_reader(self._control, self._hear_control)
        if self._channel is not None:
            self._loop.add_reader(self._channel, self.read_answers)
        if self.is_single_use:
            self.listen_to_pipes()

    def _open(self, theirs: dict[Role, int], *, with_channel: bool) -> None:
        self._has_channel = with_channel
        self._control, their_control = packet_pair()
        theirs[Role.CONTROL] = their_control.detach()
        self._control.setblocking(False)
        if with_channel:
            self._channel, self._far_end = packet_pair()
            self._channel.setblocking(False)
            for sock in (self._channel, self._far_end):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHANNEL_BYTES)
            self._reader = PacketReader(self._channel)
            if not self.is_single_use:
                self._pipeline = Pipeline()
                self._pipeline.join(self._channel)
            theirs[Role.CHANNEL] = os.dup(self._far_end.fileno())
        for stream, role in ((Stream.STDOUT, Role.STDOUT), (Stream.STDERR, Role.STDERR)):
            self._pipes[stream], theirs[role] = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self._pipes[stream], False)
            with contextlib.suppress(OSError):  # a user may have used up what he may have of pipe buffers
                fcntl.fcntl(self._pipes[stream], fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    @property
    def has_channel(self) -> bool:
        return self._has_channel

    # -- calls --------------------------------------------------------------------------------------------------------

    def send(self, attempts: Sequence[Attempt], packet: bytes) -> bool:
        """Put calls, in one packet of ``Calls``, behind those that were sent. False: there is no room now."""
        assert self._channel is not None
        if self._listens_to_pipes and not self.is_single_use:
            self._ignore_pipes()
        try:
            send_packet(self._channel, packet)
        except BlockingIOError:
            return False
        if not self.sent:
            self.head_since = self._loop.time()
        self.sent.extend(attempts)
        if self._pipeline is not None:
            self._pipeline.allow([attempt.number for attempt in attempts])
        return True

    def with_it(self) -> list[Attempt]:
        """Return the attempts that are not through: sent, or waiting for the end of the process."""
        return [*self.sent, *self._revoked, *([] if self._held is None else [self._held[0]])]

    def settle(self) -> list[Attempt]:
        """Take back every call that the process has not begun, and hear every answer that it has given.

        After this at most one call is with the process: the one that runs.
        """
        taken = self._take_back()
        self.hear()
        return taken

    def _take_back(self) -> list[Attempt]:
        numbers = self._take_back_unread() if self._pipeline is None else self._pipeline.take_back()
        taken = [attempt for attempt in self.sent if attempt.number in numbers]
        if taken:
            self.sent = deque(attempt for attempt in self.sent if attempt.number not in numbers)
        return taken

    def _take_back_unread(self) -> set[int]:
        numbers: set[int] = set()
        if self._far_end is None:
            return numbers
        reader = PacketReader(self._far_end, is_hasty=True)
        with contextlib.suppress(BlockingIOError):
            while (received := reader.receive()) is not None:
                close_all(received[1])
                numbers.update(call.number for call in decode_calls(received[0]).calls)
        return numbers

    def hear(self) -> None:
        """Hear every answer that was given until now, told or only noted, and the output before each."""
        if self.is_broken:
            return
        try:
            # Looked at first: the output of every call that is noted now lies in the channel already.
            newest = 0 if self._pipeline is None else self._pipeline.look()
            self.read_answers()
            if not self.is_broken:
                self._take_noted(newest + 1)
        except (InvalidPacket, msgspec.DecodeError, IndexError):
            self._break()

    def read_answers(self) -> None:
        """Hear everything that lies in the channel."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(MAX_PACKETS):
                if self._channel is None or self.is_broken:
                    return
                if not self._receive():
                    break
        self._date_head()

    def _receive(self) -> bool:
        try:
            received = self._reader.receive()
            if received is None:
                return False
            close_all(received[1])
            self._take(received[0])
        except (InvalidPacket, msgspec.DecodeError, IndexError):
            self._break()
        return True

    def _break(self) -> None:
        """What speaks in the channel is not our code: a job has got hold of it. Believe nothing more, and end it."""
        if self.is_broken:
            return
        self.is_broken = True
        self._revoked = self._take_back()
        if len(self.sent) == 1 and not self._has_noted():
            self.suspect = self.sent[0]
        if self._channel is not None:
            self._loop.remove_reader(self._channel)
        self.kill()

    def _has_noted(self) -> bool:
        try:
            return self._pipeline is not None and self._pipeline.look() > 0
        except (InvalidPacket, msgspec.DecodeError):
            return True

    def _take(self, packet: memoryview | bytes) -> None:
        stream = _OUTPUT.get(packet[0])
        if stream is not None:
            self._take_output(stream, int.from_bytes(packet[1:_DATA], "little"), bytes(packet[_DATA:]))
        elif packet[0] == NOTED_TAG[0]:
            self._catch_up(int.from_bytes(packet[1:_DATA], "little") + 1)
        else:
            answer = decode_answer(packet)
            self._catch_up(answer.number)
            self._take_answer(answer)

    def _take_output(self, stream: Stream, number: int, data: bytes) -> None:
        self._catch_up(number)
        if self.sent and self.sent[0].number == number:  # else a process speaks that the job of an earlier call forked
            self.sent[0].write(stream, data)

    def _catch_up(self, number: int) -> None:
        """Take the answers to all calls before this one."""
        if self._pipeline is not None and self.sent and self.sent[0].number < number:
            self._pipeline.look()
            self._take_noted(number)

    def _take_noted(self, before: int) -> None:
        if self._pipeline is not None:
            for answer in self._pipeline.noted_before(before):
                self._take_answer(answer)
            self._date_head()

    def _take_answer(self, answer: Answer) -> None:
        attempt = self.sent[0]
        if attempt.number != answer.number:
            raise InvalidPacket("executors answer in the order of the calls")
        self.sent.popleft()
        self.has_answered = True
        self._heard_at = answer.finished_at
        if answer.native_stdout or answer.native_stderr:
            self._read_native_output(attempt, answer)
        if answer.retire is None and not self.is_single_use:
            self._owner.answered(self, attempt, answer)
        else:  # the outcome waits until nothing of the process is left
            self.is_ending = True
            self._held = (attempt, answer)

    def _date_head(self) -> None:
        """The call that runs began when the last answer was given, which may have been a while before it was heard."""
        if self._heard_at:
            now = self._loop.time()
            self.head_since = min(now, max(self.head_since, now - time.time() + self._heard_at / 1e6))
            self._heard_at = 0

    def _read_native_output(self, attempt: Attempt, answer: Answer) -> None:
        for stream, count in ((Stream.STDOUT, answer.native_stdout), (Stream.STDERR, answer.native_stderr)):
            left = count
            with contextlib.suppress(BlockingIOError):  # while we listen to the pipe, some of it has been read already
                while left > 0 and (data := os.read(self._pipes[stream], min(left, _READ_BYTES))):
                    left -= len(data)
                    attempt.write(stream, data)

    # -- output of native code and child processes --------------------------------------------------------------------

    def listen_to_pipes(self) -> None:
        """Read the pipes as they fill. Only while one call at most is with the process, so that it is clear whose it is."""
        if not self._listens_to_pipes:
            self._listens_to_pipes = True
            for stream in self._pipes:
                self._loop.add_reader(self._pipes[stream], self._read_pipe, stream)

    def _ignore_pipes(self) -> None:
        self._listens_to_pipes = False
        for descriptor in self._pipes.values():
            self._loop.remove_reader(descriptor)

    def _read_pipe(self, stream: Stream) -> None:
        if not self.is_single_use:
            self.hear()  # if the call has ended, what is in the pipe was counted by its answer
            if not self.sent:
                self._drain_leftover(stream)
                return
        self._read_some(stream, _MAX_READS)

    def _drain_leftover(self, stream: Stream) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._pipes[stream], _READ_BYTES)

    def _read_some(self, stream: Stream, reads: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(reads):
                data = os.read(self._pipes[stream], _READ_BYTES)
                if not data:
                    self._loop.remove_reader(self._pipes[stream])
                    return
                if self.sent:
                    self.sent[0].write(stream, data)
                elif self._held is not None:
                    self._held[0].write(stream, data)

    # -- ending -------------------------------------------------------------------------------------------------------

    def terminate(self) -> None:
        """SIGTERM to the job's process group."""
        self._order(TERMINATE)

    def kill(self) -> None:
        """SIGKILL to everything of it; ``gone`` follows."""
        self._order(KILL)

    def _order(self, order: bytes) -> None:
        self.is_ending = True
        if self._control is not None:
            with contextlib.suppress(OSError):  # the supervisor is gone already: we shall hear of it
                self._control.send(order)

    def _hear_control(self) -> None:
        assert self._control is not None
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        message: ControlMessage | None = decode_control(data) if data else None
        if isinstance(message, Starting):
            self.has_begun = True
        else:
            self._end(message)

    def _end(self, message: Exited | SpawnFailed | None) -> None:
        """Hear all that is left to hear, then tell the owner."""
        unread = [*self.settle(), *self._revoked]
        for stream in list(self._pipes):
            self._read_some(stream, 1 << 30)
        self.is_gone = True
        self._close()
        held, self._held = self._held, None
        if held is not None:
            self._owner.answered(self, *held)
        self._owner.gone(self, unread, message)

    def _close(self) -> None:
        for sock in (self._control, self._channel, self._far_end):
            if sock is not None:
                self._loop.remove_reader(sock)
                sock.close()
        if self._pipeline is not None:
            self._pipeline.close()
        for descriptor in self._pipes.values():
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        self._control = self._channel = self._far_end = self._pipeline = None
        self._pipes = {}

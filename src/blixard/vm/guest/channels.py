"""What the agent keeps of one channel: credit both ways, and the descriptors whose data it sends on."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import select
import struct
import termios
from collections.abc import Callable
from typing import TYPE_CHECKING, Any  # decoded JSON

from blixard.vm.guest.protocol import CHUNK_BYTES, KILL, WINDOW, WINDOW_BYTES, Kind, Malformed, Stream
from blixard.vm.guest.room import Group

if TYPE_CHECKING:
    from blixard.vm.guest.agent import Agent

_NOT_EXECUTABLE, _NOT_FOUND = 126, 127
_RESIZE = struct.Struct("<HH")


class Outlet:
    """Sends data of one channel to the host while it has credit; what is over waits, and nothing more is read then."""

    def __init__(self, agent: Agent, number: int) -> None:
        self.agent = agent
        self.number = number
        self.credit = WINDOW_BYTES
        self._waiting: list[tuple[int, memoryview]] = []
        self._sources: dict[int, Callable[[], bool]] = {}
        self._listening: set[int] = set()

    @property
    def is_open(self) -> bool:
        """Say whether more may be read from the sources."""
        return not self._waiting and self.credit > 0 and not self.agent.port.is_congested

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    def send(self, stream: int, data: bytes | memoryview) -> None:
        """Send, or keep until there is credit."""
        if data:
            self._waiting.append((stream, memoryview(data)))
            self.push()

    def push(self) -> None:
        while self._waiting and self.credit > 0:
            stream, data = self._waiting[0]
            piece = data[: min(CHUNK_BYTES, self.credit)]
            self.credit -= len(piece)
            self.agent.port.send(Kind.DATA, self.number, bytes([stream]) + piece)
            if len(piece) == len(data):
                self._waiting.pop(0)
            else:
                self._waiting[0] = (stream, data[len(piece) :])

    def listen(self, descriptor: int, read: Callable[[], bool]) -> None:
        """Call ``read`` whenever there is something; it returns False at the end and is not called again then."""
        self._sources[descriptor] = read
        self.arrange()

    def arrange(self) -> None:
        """Listen to all sources or to none, as credit allows."""
        wanted = set(self._sources) if self.is_open else set()
        for descriptor in self._listening - wanted:
            self.agent.ignore(descriptor)
        for descriptor in wanted - self._listening:
            self.agent.listen(descriptor, self._read)
        self._listening = wanted

    def _read(self, descriptor: int) -> None:
        if descriptor in self._sources and self.is_open and not self._sources[descriptor]():
            del self._sources[descriptor]
        self.arrange()

    def drain(self) -> bool:
        """Read on for what has ended already; say whether all of it has been read and sent."""
        for descriptor in list(self._sources):
            while self.is_open and descriptor in self._sources:
                if not self._sources[descriptor]():
                    del self._sources[descriptor]
        self.arrange()
        return not self._sources and not self._waiting

    def drop(self) -> None:
        """Read and send nothing more."""
        self._sources.clear()
        self._waiting.clear()
        self.arrange()


class Inlet:
    """Feeds what the host sends into a descriptor; returns credit as it is taken."""

    def __init__(self, agent: Agent, number: int, descriptor: int, *, close: bool = True) -> None:
        self._agent = agent
        self._number = number
        self._descriptor = descriptor
        self._closes = close
        self._data = bytearray()
        self._is_ended = False
        self._is_waiting = False

    def feed(self, data: bytes) -> None:
        self._data += data
        self._write()

    def end(self) -> None:
        self._is_ended = True
        self._write()

    def close(self) -> None:
        if self._is_waiting:
            self._agent.ignore(self._descriptor)
            self._is_waiting = False
        if self._descriptor >= 0 and self._closes:
            os.close(self._descriptor)
        self._descriptor = -1
        self._data.clear()

    def _write(self, _: int = 0) -> None:
        if self._descriptor < 0:
            self._data.clear()
            return
        try:
            while self._data:
                count = os.write(self._descriptor, self._data[:CHUNK_BYTES])
                del self._data[:count]
                self._agent.port.send(Kind.WINDOW, self._number, WINDOW.pack(count))
        except BlockingIOError:
            if not self._is_waiting:
                self._is_waiting = True
                self._agent.listen(self._descriptor, self._write, select.EPOLLOUT)
            return
        except OSError:  # the job reads no more of it
            self.close()
            return
        if self._is_waiting:
            self._is_waiting = False
            self._agent.ignore(self._descriptor)
        if self._is_ended and self._closes:
            self.close()


class Program:
    """A program beside the jobs, as root, with pipes or a terminal."""

    def __init__(self, agent: Agent, number: int, order: dict[str, Any]) -> None:
        self.agent = agent
        self.number = number
        self.outlet = Outlet(agent, number)
        self._is_terminal = bool(order["terminal"]) if "terminal" in order else False
        self._code: int | None = None
        self._group = Group(f"program-{number}")
        self._pid = 0
        self._descriptors: list[int] = []
        self._start(order)

    def _start(self, order: dict[str, Any]) -> None:
        if self._is_terminal:
            main, theirs = pty.openpty()
            rows, columns = int(order.get("rows", 24)), int(order.get("columns", 80))
            fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            ends, ours = (theirs, theirs, theirs), [main]
        else:
            stdin, our_stdin = os.pipe2(os.O_CLOEXEC)
            our_stdout, stdout = os.pipe2(os.O_CLOEXEC)
            our_stderr, stderr = os.pipe2(os.O_CLOEXEC)
            ends, ours = (stdin, stdout, stderr), [our_stdin, our_stdout, our_stderr]
        self._pid = os.fork()
        if self._pid == 0:
            self._become_program(order, ends)
        for descriptor in set(ends):
            os.close(descriptor)
        for descriptor in ours:
            os.set_blocking(descriptor, False)
        self._descriptors = ours
        self._inlet = Inlet(self.agent, self.number, ours[0], close=not self._is_terminal)
        self.agent.port.send(Kind.EVENT, self.number, b'{"event":"started"}')
        self.agent.children[self._pid] = self._ended
        for stream, descriptor in ((Stream.STDOUT, ours[0 if self._is_terminal else 1]), (Stream.STDERR, ours[-1])):
            if stream == Stream.STDOUT or not self._is_terminal:
                self.outlet.listen(descriptor, lambda s=stream, d=descriptor: self._read(s, d))  # type: ignore[misc]  # defaults bind the loop's values

    def _become_program(self, order: dict[str, Any], ends: tuple[int, int, int]) -> None:
        code = _NOT_EXECUTABLE
        try:
            self.agent.reset_signals()
            os.setsid()
            for number, descriptor in enumerate(ends):
                os.dup2(descriptor, number)
            os.closerange(3, 1024)
            if self._is_terminal:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            self._group.write("cgroup.procs", "0")
            with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                file.write("0")  # the agent's own would be inherited
            os.chdir(order.get("directory") or "/")
            environment = {**self.agent.environment, **order.get("environment", {})}
            os.execvpe(order["argv"][0], order["argv"], environment)  # noqa: S606 -- the point: no shell
        except OSError as error:
            code = _NOT_FOUND if error.errno == errno.ENOENT else _NOT_EXECUTABLE
            os.write(2, f"cannot run {order['argv'][0]!r}: {error.strerror}\n".encode())
        finally:
            os._exit(code)

    def _read(self, stream: int, descriptor: int) -> bool:
        try:
            data = os.read(descriptor, CHUNK_BYTES)
        except BlockingIOError:
            return self._code is None or not self._group.is_empty()
        except OSError:  # a terminal that nobody has open any more
            return False
        self.outlet.send(stream, data)
        return bool(data)

    def take(self, kind: int, body: bytes) -> None:
        match kind:
            case Kind.DATA:
                if body[0] != Stream.STDIN:
                    raise Malformed("a program takes stdin and nothing else")
                self._inlet.feed(body[1:])
            case Kind.END:
                self._inlet.end()
            case Kind.WINDOW:
                self.outlet.credit += WINDOW.unpack(body)[0]
                self.advance()
            case Kind.SIGNAL:
                self._signal(WINDOW.unpack(body)[0])
            case Kind.RESIZE if self._is_terminal and self._descriptors:
                rows, columns = _RESIZE.unpack(body)
                fcntl.ioctl(self._descriptors[0], termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _signal(self, number: int) -> None:
        if number == KILL:
            self._group.kill()
            return
        try:
            os.killpg(self._pid, number)
        except ProcessLookupError:
            return

    def _ended(self, status: int) -> None:
        self._code = os.waitstatus_to_exitcode(status)
        self._group.kill()

    def advance(self) -> None:
        """Go on as far as possible; called when anything has changed."""
        self.outlet.push()
        self.outlet.arrange()
        if self._code is None or not self._group.is_empty() or not self.outlet.drain():
            return
        self._inlet.close()
        for descriptor in self._descriptors if self._is_terminal else self._descriptors[1:]:
            os.close(descriptor)
        self._descriptors = []
        self._group.remove()
        self.agent.tell(self.number, {"event": "exited", "code": self._code})
        self.agent.close_channel(self.number)

    def abandon(self) -> None:
        """The host is gone: end it."""
        self.outlet.drop()
        self._group.kill()

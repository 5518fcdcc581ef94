"""The worker's side of the zygote: starts it, asks it for children, and hears of their end."""

from __future__ import annotations

import array
import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

from blixard.backends.sandbox.namespaces import KILL_NOW
from blixard.backends.wasm.executor import INTERRUPT
from blixard.backends.wasm.wire import (
    BrokenFrame,
    CompileRequest,
    Exited,
    FrameReader,
    Limits,
    RunRequest,
    Spawn,
    Spawned,
    SpawnFailed,
    Tag,
    decode_notice,
    encode,
    frame,
)

_ENVIRONMENT = frozenset({"PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"})
_PACKET_BYTES = 65536
_READ_BYTES = 1 << 16
FrameHandler = Callable[[Tag, bytes], None]


class ZygoteLost(Exception):
    """The zygote ended or cannot be started: nothing of it is left; the next child starts a new one."""


class Child:
    """One process forked from the zygote. ``gone`` is done, with its exit code, when it is dead, reaped and its output read."""

    def __init__(self, number: int, sock: socket.socket, interrupts: int, loop: asyncio.AbstractEventLoop) -> None:
        self.number = number
        self.pid = 0
        self.runs = 0
        self.loaded: set[str] = set()
        self.kill_signal = signal.SIGKILL
        """For a sandbox its supervisor's own: it ends when everything in it has."""
        self.gone: asyncio.Future[int] = loop.create_future()
        self.on_frame: FrameHandler | None = None
        self._loop = loop
        self._sock = sock
        self._interrupts = interrupts
        self._pidfd: int | None = None
        self._code: int | None = None
        self._hung_up = False
        self._killed = False
        self._unsent = bytearray()
        self._reader = FrameReader()
        loop.add_reader(sock.fileno(), self._read)

    def request(self, request: RunRequest | CompileRequest, on_frame: FrameHandler) -> None:
        """Send one request; ``on_frame`` hears every frame until the next request."""
        self.on_frame = on_frame
        if request.room is not None:
            self.kill_signal = KILL_NOW
        self._send(frame(Tag.REQUEST, encode(request)))

    def interrupt(self, number: int) -> None:
        """Ask the guest of that run to end by the engine's epoch."""
        if self._interrupts < 0:
            return
        try:
            os.write(self._interrupts, INTERRUPT.pack(number))
        except OSError:
            self.kill()  # it has closed the pipe or lets it fill up: it will not answer either

    def kill(self) -> None:
        """End the process, at once or as soon as the process exists."""
        self._killed = True
        if self._pidfd is not None and self._code is None:
            _kill(self._pidfd, self.kill_signal)

    def dismiss(self) -> None:
        """Hang up: an idle child ends by itself."""
        self._close()

    def born(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        if self._killed:
            _kill(pidfd, self.kill_signal)

    def died(self, code: int) -> None:
        self._code = code
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self._finish()

    def _send(self, data: bytes) -> None:
        if self._unsent:
            self._unsent += data
            return
        self._unsent += data
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            self._loop.add_writer(self._sock.fileno(), self._flush)
            return
        except OSError:
            self._unsent.clear()  # it died: its end is reported by the zygote
        if not self._hung_up:
            self._loop.remove_writer(self._sock.fileno())

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close()
            return
        try:
            for tag, body in self._reader.feed(data):
                if self.on_frame is not None:
                    self.on_frame(tag, body)
        except BrokenFrame:
            self.kill()
            self._close()

    def _close(self) -> None:
        if not self._hung_up:
            self._hung_up = True
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
            os.close(self._interrupts)
            self._interrupts = -1
        self._finish()

    def _finish(self) -> None:
        if self._hung_up and self._code is not None and not self.gone.done():
            self.gone.set_result(self._code)


class ZygoteHost:
    """Keeps one zygote alive while children are asked for. ``lock_fd`` is inherited by it and its children.

    Children of a zygote that dies are killed by the kernel; each one's ``gone`` tells.
    """

    def __init__(self, *, fuel: bool, lock_fd: int | None, portable: bool = False) -> None:
        self._fuel = fuel
        self._portable = portable
        self._lock_fd = lock_fd
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._children: dict[int, Child] = {}
        self._numbers = 0
        self._lost: asyncio.Event | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def children(self) -> list[Child]:
        return list(self._children.values())

    def start(self) -> None:
        """Start the zygote if none lives. Raises ``ZygoteLost``."""
        if self._control is not None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = self._launch(theirs.fileno())
        except OSError as error:
            ours.close()
            raise ZygoteLost(f"the Wasm runtime's process cannot be started: {error}") from error
        finally:
            theirs.close()
        ours.setblocking(False)
        self._control = ours
        self._lost = asyncio.Event()
        asyncio.get_running_loop().add_reader(ours.fileno(), self._hear)

    def _launch(self, control: int) -> subprocess.Popen[bytes]:
        files = [control] if self._lock_fd is None else [control, self._lock_fd]
        command = [sys.executable, "-P", "-m", "blixard.backends.wasm.zygote", str(control), str(int(self._fuel))]
        command.append(str(int(self._portable)))
        if self._lock_fd is not None:
            command.append(str(self._lock_fd))
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=files, env=_environment()
        )

    def spawn(self, limits: Limits, files: Sequence[int] = ()) -> Child:
        """Ask for one child that gets ``files`` (the caller keeps and closes its own). Raises ``ZygoteLost``."""
        self.start()
        assert self._control is not None
        self._numbers += 1
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        ours.setblocking(False)
        child = Child(self._numbers, ours, writing, asyncio.get_running_loop())
        passed = array.array("i", [theirs.fileno(), reading, *files])
        self._children[child.number] = child
        try:
            packet = encode(Spawn(number=child.number, limits=limits))
            self._control.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
        except OSError as error:
            self._forget(child, -signal.SIGKILL)
            raise ZygoteLost(f"the Wasm runtime's process does not answer: {error}") from error
        finally:
            theirs.close()
            os.close(reading)
        return child

    async def stop(self) -> None:
        """Kill every child and the zygote, and return when all are gone."""
        for child in self.children():
            child.kill()
        children = [child.gone for child in self.children()]
        if self._control is not None:
            self._control.shutdown(socket.SHUT_WR)
            assert self._lost is not None
            await self._lost.wait()
        for gone in children:
            await gone

    def _hear(self) -> None:
        assert self._control is not None
        try:
            data, files, _, _ = socket.recv_fds(self._control, _PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, files = b"", []
        if not data:
            self._bury()
            return
        self._note(decode_notice(data), files)

    def _note(self, notice: Spawned | SpawnFailed | Exited, files: list[int]) -> None:
        child = self._children[notice.number]
        if isinstance(notice, Spawned):
            child.born(notice.pid, files[0])
        else:
            self._forget(child, notice.code if isinstance(notice, Exited) else -signal.SIGKILL)

    def _forget(self, child: Child, code: int) -> None:
        self._children.pop(child.number, None)
        child.died(code)
        if isinstance(code, int) and not child.pid:
            child.dismiss()

    def _bury(self) -> None:
        """The zygote has hung up. Wait for its process: by then the kernel has killed its children."""
        assert self._control is not None
        assert self._process is not None
        assert self._lost is not None
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()
        self._control = None
        self._process.kill()
        self._process.wait()  # it has closed its last descriptor: the wait is for the kernel only
        self._process = None
        for child in self.children():
            child.kill()
            self._forget(child, -signal.SIGKILL)
        self._lost.set()


def _environment() -> dict[str, str]:
    """Return what an interpreter needs to start: a runtime that a guest has broken out of finds no secrets of ours."""
    return {name: value for name, value in os.environ.items() if name in _ENVIRONMENT}


def _kill(pidfd: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return  # reaped already: the notice is on its way

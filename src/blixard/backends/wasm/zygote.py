"""The process that every executor is forked from: single-threaded, with the Wasm runtime loaded and nothing running.

``python -P -m blixard.backends.wasm.zygote CONTROL_FD FUEL PORTABLE [LOCK_FD]``. It ends, and its children with it, when the worker closes its
end of the control socket or dies.
"""

from __future__ import annotations

import array
import gc
import os
import selectors
import signal
import socket
import sys
import traceback

from blixard.backends.sandbox import kernel
from blixard.backends.sandbox.identity import OwnerMaps
from blixard.backends.sandbox.namespaces import KILL_NOW
from blixard.backends.sandbox.plan import UNPRIVILEGED_ID
from blixard.backends.wasm.engine import make_engine, make_linker
from blixard.backends.wasm.executor import Executor, World, apply_limits
from blixard.backends.wasm.wire import Exited, Spawn, Spawned, SpawnFailed, decode_spawn, encode

MAX_PACKET_BYTES = 4096
MAX_FILES = 4
_BROKEN_EXIT_CODE = 70


class Zygote:
    def __init__(self, control: socket.socket, *, fuel: bool, portable: bool, lock: int | None) -> None:
        self._control = control
        engine = make_engine(fuel=fuel)
        self._world = World(engine, make_linker(engine), fuel, lock, _make_owner_maps(), portable)
        self._children: dict[int, tuple[int, int]] = {}  # pidfd -> (number, pid)
        self._selector = selectors.DefaultSelector()

    def serve(self) -> None:
        gc.collect()
        gc.freeze()  # pages that the collector never touches stay shared with every child
        self._selector.register(self._control, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._control:
                    self._reap(key.fd)
                elif not self._take_request():
                    return

    def _take_request(self) -> bool:
        try:
            data, ancillary, _, _ = self._control.recvmsg(
                MAX_PACKET_BYTES, socket.CMSG_SPACE(MAX_FILES * 4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return False
        if not data:
            return False
        files = _unpack_files(ancillary)
        try:
            self._fork(decode_spawn(data), files)
        finally:
            for file in files:
                os.close(file)
        return True

    def _fork(self, spawn: Spawn, files: list[int]) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            self._send(SpawnFailed(number=spawn.number, message=f"fork: {error.strerror}"))
            return
        if pid == 0:
            self._become_executor(spawn, files)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = (spawn.number, pid)
        self._selector.register(pidfd, selectors.EVENT_READ)
        self._send(Spawned(number=spawn.number, pid=pid), pidfd)

    def _become_executor(self, spawn: Spawn, files: list[int]) -> None:
        code = _BROKEN_EXIT_CODE
        try:
            self._selector.close()
            self._control.close()
            for pidfd in self._children:
                os.close(pidfd)
            apply_limits(spawn.limits)
            Executor(self._world, files).serve()
            code = 0
        except BrokenPipeError:
            code = 0  # the worker hung up
        except BaseException:
            traceback.print_exc()  # the worker sees the exit code; the text goes to its standard error
        finally:
            # Never the interpreter's own way out: threads of the Wasm runtime may still be about.
            os._exit(code)

    def _reap(self, pidfd: int) -> None:
        number, pid = self._children.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._send(Exited(number=number, code=os.waitstatus_to_exitcode(status)))

    def _send(self, notice: Spawned | SpawnFailed | Exited, file: int | None = None) -> None:
        ancillary = [] if file is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
        try:
            self._control.sendmsg([encode(notice)], ancillary)
        except ConnectionError:
            return  # the worker is gone: the next read says so too

    def kill_children(self) -> None:
        for pidfd in self._children:
            signal.pidfd_send_signal(pidfd, KILL_NOW)
        for _, pid in self._children.values():
            os.waitpid(pid, 0)


def _make_owner_maps() -> OwnerMaps | None:
    """Only root can show its files to a job that is not root; the map for root's own files is made once, for all children."""
    if not kernel.has_capability(kernel.CAP_SYS_ADMIN):
        return None
    maps = OwnerMaps(UNPRIVILEGED_ID, UNPRIVILEGED_ID)
    try:
        maps.descriptor((0, 0))
    except OSError:
        return None  # the host knows no mapped mounts: the permissions of the files decide
    return maps


def _unpack_files(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    files = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            files.frombytes(data[: len(data) - len(data) % files.itemsize])
    return list(files)


def main(arguments: list[str]) -> int:
    # Ctrl-C reaches the whole process group: the worker decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    control = socket.socket(fileno=int(arguments[0]))
    control.set_inheritable(False)
    lock = int(arguments[3]) if len(arguments) > 3 else None
    zygote = Zygote(control, fuel=arguments[1] == "1", portable=arguments[2] == "1", lock=lock)
    try:
        zygote.serve()
    finally:
        zygote.kill_children()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)

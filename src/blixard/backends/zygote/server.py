"""The zygote's own program: forks a supervisor per request, reaps, and ends everything when the backend is gone.

``python -I launch.py CONTROL_FD PARENT_PID``
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import threading

from blixard.backends.packets import PacketReader
from blixard.backends.sandbox.identity import OwnerMaps, make_maps
from blixard.backends.zygote.kernel import adopt_orphans, die_with_parent, kill_descendants
from blixard.backends.zygote.messages import READY, Role, SpawnFailed, SpawnRequest, decode_request, encode
from blixard.backends.zygote.supervisor import Supervisor

PRELOADED = (
    "asyncio",
    "base64",
    "blixard.backends.executor.main",
    "blixard.backends.sandbox.bubblewrap",
    "collections",
    "contextlib",
    "csv",
    "dataclasses",
    "datetime",
    "decimal",
    "functools",
    "hashlib",
    "inspect",
    "itertools",
    "json",
    "logging",
    "math",
    "pathlib",
    "pickle",
    "random",
    "re",
    "shutil",
    "statistics",
    "string",
    "subprocess",
    "tempfile",
    "traceback",
    "typing",
    "urllib.parse",
    "uuid",
)
"""What jobs commonly import: loaded once, shared by every fork. Nothing here may start a thread."""


class Zygote:
    def __init__(self, control: socket.socket, maps: OwnerMaps | None) -> None:
        self._control = control
        self._maps = maps
        self._reader = PacketReader(control)
        self._supervisors: set[int] = set()

    def serve(self) -> None:
        """Serve until the backend closes its end."""
        wake = _catch_signals()
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(wake, select.POLLIN)
        self._control.send(READY)
        while True:
            for descriptor, _ in poller.poll():
                if descriptor == wake:
                    if signal.SIGTERM in os.read(wake, 512):
                        return
                    self._reap()
                elif not self._take_request():
                    return

    def _take_request(self) -> bool:
        received = self._reader.receive()
        if received is None:
            return False
        data, descriptors = received
        try:
            request = decode_request(data)
            self._spawn(request, dict(zip(request.roles, descriptors, strict=True)))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _spawn(self, request: SpawnRequest, descriptors: dict[Role, int]) -> None:
        zygote = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._refuse(descriptors[Role.CONTROL], f"fork: {error.strerror}")
            return
        if pid == 0:
            self._control.close()
            Supervisor(request.launch, descriptors, self._maps).run(zygote)
        self._supervisors.add(pid)

    def _refuse(self, control: int, reason: str) -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(control)) as sock:
            sock.send(encode(SpawnFailed("ForkFailed", reason)))

    def _reap(self) -> None:
        """Collect ended supervisors. Whatever else is our child was orphaned by a supervisor's violent death: end it."""
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                self._supervisors.discard(pid)
        self._end_orphans()

    def _end_orphans(self) -> None:
        from blixard.backends.zygote.kernel import children_of

        for pid in children_of(os.getpid()):
            if pid not in self._supervisors:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _forget_inherited_signals() -> None:
    """Handle signals as a fresh session does: what ``nohup`` or a shell had ignored or blocked would reach every job."""
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # Python itself ignores these two
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _catch_signals() -> int:
    _forget_inherited_signals()
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the backend's matter
    return reading


def main() -> None:
    control, parent = int(sys.argv[1]), int(sys.argv[2])
    os.setsid()
    die_with_parent(parent, signal.SIGTERM)
    adopt_orphans()
    os.set_inheritable(control, False)
    for name in sys.argv[3:]:
        os.set_inheritable(int(name), False)  # the session's lock: supervisors keep it, no program of a job gets it
    for module in PRELOADED:
        importlib.import_module(module)
    assert threading.active_count() == 1, "a zygote with threads cannot fork safely"
    gc.collect()
    gc.freeze()  # pages that the collector never touches stay shared with every fork
    try:
        Zygote(socket.socket(fileno=control), make_maps()).serve()
    finally:
        kill_descendants()
        os._exit(0)

"""The guest's first process after init: serves the host over one port, runs jobs and programs, reaps what they leave.

One thread and one loop: every job is a fork of this process, which has loaded what jobs need. It never blocks on a job. If it
ends, the kernel panics, and the host hears that the machine is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn  # decoded JSON

from blixard.vm.guest.channels import Program
from blixard.vm.guest.identity import prepare_identity, take_identity
from blixard.vm.guest.jobs import Job
from blixard.vm.guest.port import Port, open_port
from blixard.vm.guest.protocol import VERSION, Kind, Malformed
from blixard.vm.guest.room import Room, prepare_guest
from blixard.vm.guest.warm_up import MODULES, warm_up_frames

LOOK_SECONDS = 0.5
"""While anything runs, ends are looked for this often, should an event be missed."""
OUT_OF_MEMORY_SCORE = "-1000"
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "xterm",
}
_POWER_OFF = 0x4321FEDC  # linux/reboot.h
Handler = Callable[[int], None]


class Agent:
    def __init__(self, port: Port) -> None:
        self.port = port
        self.environment = ENVIRONMENT
        self.children: dict[int, Handler] = {}
        self.jobs_done = 0
        self._channels: dict[int, Job | Program] = {}
        self._handlers: dict[int, Handler] = {}
        self._epoll = select.epoll()
        self._rooms = 0
        self._ready_room: Room | None = None
        self._wake = self._catch_signals()
        # Edge by edge: without a host the port hangs up for ever, which would keep a level-triggered loop spinning.
        self._epoll.register(port.descriptor, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        self._handlers[port.descriptor] = self._serve_port
        self.listen(self._wake, self._reap)

    def _catch_signals(self) -> int:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        return reading

    @staticmethod
    def reset_signals() -> None:
        """In a fresh fork: be as a program expects to be."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def serve(self) -> NoReturn:
        while True:
            self.turn()

    def turn(self) -> None:
        """Wait for something and handle it."""
        timeout = LOOK_SECONDS if self._channels else -1
        if self._ready_room is None and not self._channels:
            self._ready_room = self._make_room()
        events = self._epoll.poll(timeout)
        for descriptor, _ in events:
            handler = self._handlers.get(descriptor)
            if handler is not None:
                handler(descriptor)
        if not events:
            self._reap(self._wake)

    def listen(self, descriptor: int, handler: Handler, events: int = select.EPOLLIN) -> None:
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, events)

    def ignore(self, descriptor: int) -> None:
        del self._handlers[descriptor]
        with contextlib.suppress(OSError):  # closed already, so the kernel has forgotten it
            self._epoll.unregister(descriptor)

    def _serve_port(self, _: int) -> None:
        if self.port.is_muted:
            return
        was_congested = self.port.is_congested
        self.port.flush()
        frames = self.port.receive()
        if frames is None:
            self._forget_host()
            return
        for kind, number, body in frames:
            self.take(kind, number, body)
        if was_congested and not self.port.is_congested:
            self._advance_all()

    def _forget_host(self) -> None:
        """Whoever connects next knows of nothing: end it all."""
        self.port.forget()
        for channel in list(self._channels.values()):
            channel.abandon()

    def _reap(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake, 512):
                pass
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                handler = self.children.pop(pid, None)
                if handler is not None:
                    handler(status)
        self._advance_all()

    def _advance_all(self) -> None:
        for channel in list(self._channels.values()):
            channel.advance()

    # -- what the host asks -------------------------------------------------------------------------------------------

    def take(self, kind: int, number: int, body: bytes) -> None:
        """Handle one frame of the host."""
        if kind == Kind.REQUEST:
            self._answer(json.loads(body))
        elif kind == Kind.OPEN:
            self._open(number, json.loads(body))
        elif number in self._channels:
            self._channels[number].take(kind, body)

    def _answer(self, request: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"id": request["id"]}
        operation = request["op"]
        if operation == "reseed":
            take_identity(request)
        elif operation == "hello":
            system = os.uname()
            reply |= {"version": VERSION, "kernel": system.release, "python": sys.version.split()[0]}
        elif operation == "status":
            reply |= self._status()
        self.port.send(Kind.REPLY, 0, json.dumps(reply).encode())
        if operation == "shutdown":
            self._power_off()

    def _status(self) -> dict[str, Any]:
        memory = {}
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                name, _, rest = line.partition(":")
                memory[name] = int(rest.split()[0]) // 1024
        return {
            "uptime": time.clock_gettime(time.CLOCK_BOOTTIME),
            "jobs": self.jobs_done,
            "channels": len(self._channels),
            "memory_total_mb": memory["MemTotal"],
            "memory_available_mb": memory["MemAvailable"],
        }

    def _open(self, number: int, order: dict[str, Any]) -> None:
        try:
            match order["kind"]:
                case "job":
                    self._channels[number] = Job(self, number, order)
                case "program":
                    self._channels[number] = Program(self, number, order)
                case kind:
                    raise Malformed(f"an order of the unknown kind {kind!r}")
        except OSError as error:
            message = f"the guest cannot begin it: {error}"
            self.tell(number, {"event": "exited", "code": -9, "error": {"type": "RoomFailed", "message": message}})
            self.port.send(Kind.CLOSED, number)

    def tell(self, number: int, event: dict[str, Any]) -> None:
        self.port.send(Kind.EVENT, number, json.dumps(event).encode())

    def close_channel(self, number: int) -> None:
        del self._channels[number]
        self.port.send(Kind.CLOSED, number)

    def note(self, text: str) -> None:
        """Tell the console; there is nobody else to tell."""
        with contextlib.suppress(OSError):
            os.write(2, f"agent: {text}\n".encode(errors="replace"))

    def _power_off(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.port.flush()
        os.sync()
        ctypes.CDLL(None).reboot(_POWER_OFF)

    # -- rooms --------------------------------------------------------------------------------------------------------

    def take_room(self, *, is_fresh: bool) -> Room:
        """Return a room for a job: the one whose runner waits, or one without a runner yet. Raises ``OSError``."""
        room, self._ready_room = self._ready_room, None
        if room is not None and not is_fresh:
            return room
        if room is not None:
            self._ready_room = room
        return self._make_room(spawn=not is_fresh)

    def watch(self, room: Room) -> None:
        """Hear when the room's runner ends."""
        self.children[room.pid] = room.set_status

    def _make_room(self, *, spawn: bool = True) -> Room:
        self._rooms += 1
        room = Room(self._rooms)
        if spawn:
            room.spawn()
            self.watch(room)
        return room

    # -- making ready -------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Run a job of our own, so that a clone finds all that one needs in memory."""
        self.port.is_muted = True
        for kind, number, body in warm_up_frames():
            self.take(kind, number, body)
        while self._channels:
            self.turn()
        self.port.is_muted = False
        self.jobs_done = 0
        self._ready_room = self._ready_room or self._make_room()
        self._serve_port(self.port.descriptor)


def prepare_process() -> None:
    """Load what jobs need, and see to it that the kernel ends jobs before us."""
    for name in MODULES:
        with contextlib.suppress(ImportError):  # an image may be without some of them
            importlib.import_module(name)
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(OUT_OF_MEMORY_SCORE)
    with open("/proc/sys/vm/panic_on_oom", "w", encoding="ascii") as file:
        file.write("1")  # a guest that is out of memory as a whole is better lost than half alive


def main() -> NoReturn:
    os.umask(0o022)
    os.environ.update(ENVIRONMENT)
    prepare_guest()
    prepare_identity()
    prepare_process()
    agent = Agent(Port(open_port()))
    agent.warm_up()
    gc.collect()
    gc.freeze()  # pages that the collector never touches stay shared with every job
    agent.serve()


if __name__ == "__main__":
    main()

"""A child of the zygote: runs Wasm jobs one after the other, or one in a sandbox of its own, or compiles one module."""

from __future__ import annotations

import os
import resource
import signal
import socket
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import wasmtime

from blixard.backends.sandbox.identity import OwnerMaps
from blixard.backends.sandbox.kernel import die_with_parent
from blixard.backends.sandbox.namespaces import SandboxFailed, enter
from blixard.backends.sandbox.plan import SandboxPlan
from blixard.backends.wasm.compiler import compile_module
from blixard.backends.wasm.engine import Runner
from blixard.backends.wasm.wire import (
    CompileReport,
    CompileRequest,
    Ending,
    Limits,
    Report,
    RunReport,
    RunRequest,
    Tag,
    decode_request,
    encode,
    frame,
    receive_frame,
)

INTERRUPT = struct.Struct("<Q")
"""What the worker writes into the interrupt pipe: the number of the run to end."""


@dataclass(frozen=True)
class World:
    """What the zygote has made ready for all its children. ``lock`` is the session's: guests' processes do not get it."""

    engine: wasmtime.Engine
    linker: wasmtime.Linker
    fuel: bool
    lock: int | None
    maps: OwnerMaps | None
    portable: bool
    """What is compiled shall run on other processors of this kind, too."""


class Executor:
    """Owns the job socket (``files[0]``), the interrupt pipe (``files[1]``) and, for a compile, module and artefact."""

    def __init__(self, world: World, files: list[int]) -> None:
        self._sock = socket.socket(fileno=files[0])
        self._interrupts = files[1]
        self._files = files[2:]
        self._world = world
        self._runner = Runner(world.engine, world.linker, self._send_output)

    def serve(self) -> None:
        """Answer requests until the worker closes the socket."""
        if (request := self._receive()) is None:
            return
        if isinstance(request, CompileRequest):
            self._send(Tag.REPORT, encode(self._compile(request)))
        elif request.room is not None:
            self._send(Tag.REPORT, encode(self._run_in_sandbox(request)))
        else:
            self._serve_runs(request)

    def _serve_runs(self, first: RunRequest) -> None:
        self._watch_interrupts()
        request: RunRequest | CompileRequest | None = first
        while isinstance(request, RunRequest):
            self._send(Tag.REPORT, encode(self._run(request)))
            request = self._receive()

    def _compile(self, request: CompileRequest) -> Report:
        try:
            if request.room is not None:
                self._move_in(request.room)
            return compile_module(*self._files, fuel=self._world.fuel, portable=self._world.portable)
        except SandboxFailed as error:
            return CompileReport(error="SandboxFailed", message=str(error))
        except (OSError, MemoryError) as error:
            return CompileReport(error="CompileFailed", message=f"the compiler ran into a limit: {error!r}")

    def _run_in_sandbox(self, request: RunRequest) -> Report:
        assert request.room is not None
        try:
            # The artefact is not in the sandbox; the runtime maps the guest's initial memory from files it has opened here.
            before = _open_files()
            self._runner.load(request.key, request.artefact)
            self._move_in(request.room, _open_files() - before)
        except wasmtime.WasmtimeError as error:
            return RunReport(ending=Ending.REFUSED, error="ArtefactUnusable", message=str(error))
        except (SandboxFailed, OSError) as error:
            return RunReport(ending=Ending.REFUSED, error="SandboxFailed", message=str(error))
        self._watch_interrupts()
        return self._run(request)

    def _move_in(self, plan: SandboxPlan, mapped: Iterable[int] = ()) -> None:
        """Go on as the only process of a fresh sandbox. Raises ``SandboxFailed`` outside of it."""
        keep = [self._sock.fileno(), self._interrupts, *self._files, *mapped]
        # The supervisor keeps the socket too: it reports a failure, and its end means that the sandbox is gone.
        hold = [self._sock.fileno()] if self._world.lock is None else [self._sock.fileno(), self._world.lock]
        enter(plan, keep=keep, hold=hold, maps=self._world.maps)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        os.close(nothing)

    def _run(self, request: RunRequest) -> RunReport:
        return self._runner.run(request, self._announce if request.announce else _nothing)

    def _announce(self) -> None:
        self._send(Tag.STARTED, b"")

    def _watch_interrupts(self) -> None:
        threading.Thread(target=self._pass_interrupts, name="interrupts", daemon=True).start()

    def _pass_interrupts(self) -> None:
        while data := os.read(self._interrupts, INTERRUPT.size):
            self._runner.interrupt(INTERRUPT.unpack(data)[0])
        # The worker is gone or has given this executor up, whatever the guest is doing.
        os._exit(0)

    def _receive(self) -> RunRequest | CompileRequest | None:
        received = receive_frame(self._sock)
        return None if received is None else decode_request(received[1])

    def _send_output(self, is_error: bool, data: bytes) -> None:
        self._send(Tag.STDERR if is_error else Tag.STDOUT, data)

    def _send(self, tag: Tag, body: bytes) -> None:
        self._sock.sendall(frame(tag, body))


def _open_files() -> set[int]:
    listed = {int(name) for name in os.listdir("/proc/self/fd")}
    return {file for file in listed if _is_open(file)}  # the listing's own is closed again


def _is_open(file: int) -> bool:
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


def _nothing() -> None:
    return None


def apply_limits(limits: Limits) -> None:
    """Lower this process's limits for good."""
    die_with_parent(signal.SIGKILL)
    wanted = (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, limits.open_files or None),
        (resource.RLIMIT_FSIZE, limits.file_bytes or None),
        (resource.RLIMIT_AS, limits.address_bytes or None),
        (resource.RLIMIT_CPU, limits.cpu_seconds or None),
    )
    for kind, value in wanted:
        if value is not None:
            _lower(kind, value)


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (most, most))

"""A job's first process: forked from the agent ahead of time, it moves into the job's room and waits for its order.

What of it costs time under emulation has been done before the guest became a template; a clone only sends the order.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from blixard.backends.executor.calls import Ending, FunctionCaller, run_script
from blixard.backends.executor.messages import decode_task
from blixard.backends.packets import PacketReader, send_packet
from blixard.backends.sandbox import kernel
from blixard.backends.zygote.kernel import adopt_orphans
from blixard.vm.guest.orders import (
    ANSWER_TAG,
    CODE,
    FAILURE_TAG,
    HOME,
    OUTPUT_TAGS,
    TEMPORARY,
    WORK,
    Failure,
    PythonAnswer,
    decode_python_order,
    encode,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CHANNEL_DESCRIPTOR = 3
USER_ID = 1000
NOT_EXECUTABLE_EXIT_CODE = 126
NOT_FOUND_EXIT_CODE = 127
BROKEN_EXIT_CODE = 70
OUTPUT_CHUNK = 32 * 1024
_ABOVE_ALL_GIVEN = 64
_PLACES = (
    ("work", WORK),
    ("home", HOME),
    ("tmp", TEMPORARY),
    ("shared", "/var/tmp"),  # noqa: S108 -- the job's own
    ("memory", "/dev/shm"),  # noqa: S108 -- the job's own
    ("code", CODE),
)
"""Directories of a room, and where the job sees them. No other place of a guest can be written by everybody."""
PRIVATE = tuple(name for name, _ in _PLACES if name != "code")


class Bind:
    """Show ``source`` of the room at ``path``."""

    __slots__ = ("path", "source", "writable")

    def __init__(self, source: str, path: str, writable: bool) -> None:
        self.source = source
        self.path = path
        self.writable = writable


def become_runner(room: str, group: str, descriptors: Sequence[int], binds: Sequence[Bind]) -> NoReturn:
    """Turn the fresh fork of the agent into a job's process. ``descriptors``: stdin, stdout, stderr, channel."""
    code = BROKEN_EXIT_CODE
    try:
        _reset_signals()
        os.setsid()
        _arrange_descriptors(descriptors)
        channel = socket.socket(fileno=CHANNEL_DESCRIPTOR)
        try:
            _move_in(room, group, binds)
        except OSError as error:
            _give_up(channel, Failure("RoomFailed", str(error)), BROKEN_EXIT_CODE)
        sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")  # type: ignore[misc]  # both names must lead to the job's input
        code = _serve(channel)
    except BaseException:  # the edge of a job: its stderr shows what is wrong with ours, and the exit code tells
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _arrange_descriptors(descriptors: Sequence[int]) -> None:
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _ABOVE_ALL_GIVEN) for descriptor in descriptors]
    for number, source in enumerate(high):
        os.dup2(source, number, inheritable=number < CHANNEL_DESCRIPTOR)
    os.closerange(CHANNEL_DESCRIPTOR + 1, 1024)


def _move_in(room: str, group: str, binds: Sequence[Bind]) -> None:
    """Join the cgroup, hide everything that others could write behind the job's own places, and give up being root."""
    _write(f"{group}/cgroup.procs", "0")
    _write("/proc/self/oom_score_adj", "500")  # the agent's own would be inherited
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
    for name, path in _PLACES:
        kernel.mount(f"{room}/{name}", path, None, kernel.MS_BIND)
    for bind in binds:
        kernel.mount(bind.source, bind.path, None, kernel.MS_BIND)
        if not bind.writable:
            flags = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
            kernel.mount(None, bind.path, None, flags)
    os.setgroups([])
    os.setresgid(USER_ID, USER_ID, USER_ID)
    os.setresuid(USER_ID, USER_ID, USER_ID)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else its own /proc/self would be root's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o022)
    os.chdir(WORK)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _serve(channel: socket.socket) -> int:
    """Wait for the order and carry it out. Returns the exit code; a command never returns."""
    packets = PacketReader(channel)
    received = packets.receive()
    if received is None:
        return 0  # the room was given up
    entry, argv, environment = _decode_launch(bytes(received[0]))
    os.environ.clear()
    os.environ.update(environment)
    random.seed()  # the template's state is every clone's
    if entry == "command":
        _execute(channel, argv, environment)
    received = packets.receive()
    if received is None:
        return 0
    adopt_orphans()
    order = bytes(received[0])
    if entry == "wasm":
        from blixard.vm.guest.wasm_job import run_wasm  # an image may be without the Wasm runtime

        return run_wasm(channel, order)
    return _run_python(channel, order)


def _decode_launch(data: bytes) -> tuple[str, list[str], dict[str, str]]:
    """Undo ``encode_launch``."""
    entry, count, *words = data.decode(errors="surrogateescape").split("\0")
    argv = words[: int(count)]
    pairs = words[int(count) :]
    return entry, argv, dict(zip(pairs[::2], pairs[1::2], strict=True))


def encode_launch(entry: str, argv: Sequence[str], environment: dict[str, str]) -> bytes:
    """Return the first packet to a runner. None of the words can have a NUL in it."""
    pairs = [word for pair in environment.items() for word in pair]
    return "\0".join([entry, str(len(argv)), *argv, *pairs]).encode(errors="surrogateescape")


def _give_up(channel: socket.socket, failure: Failure, code: int) -> NoReturn:
    send_packet(channel, FAILURE_TAG + encode(failure))
    os._exit(code)


def _execute(channel: socket.socket, argv: list[str], environment: dict[str, str]) -> NoReturn:
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):  # Python ignores two, and a program would inherit it
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(argv[0], argv, environment)  # noqa: S606 -- the point: no shell
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        code = NOT_FOUND_EXIT_CODE if missing else NOT_EXECUTABLE_EXIT_CODE
        why = "there is no such program on the job's PATH in the guest" if missing else str(error.strerror)
        message = f"cannot run {argv[0][:500]!r}: {why}"
        _give_up(channel, Failure("CommandNotRunnable", message, is_fault_of_job=True, exit_code=code), code)


def _run_python(channel: socket.socket, data: bytes) -> int:
    order = decode_python_order(data)
    task = decode_task(order.task)
    streams = Streams(channel)
    sys.argv = [""]
    runner = os.getpid()
    begun = time.perf_counter()
    if task.path is not None:
        ending = run_script(task, order.arguments)
    else:
        if task.root is not None:
            sys.path.insert(0, task.root)
        caller = FunctionCaller(task)
        ending = caller.load() or caller.call(order.arguments)
    duration = time.perf_counter() - begun
    if os.getpid() != runner:
        _end_as_child(ending, streams)
    streams.finish()
    answer = PythonAnswer(duration, ending.exit_code, ending.result, ending.error)
    send_packet(channel, ANSWER_TAG + encode(answer))
    return ending.exit_code if task.path is not None else 0


def _end_as_child(ending: Ending, streams: Streams) -> NoReturn:
    """The job forked and its child came back here, so this is the child's end, and not an answer."""
    if ending.error is not None and ending.error.traceback is not None:
        print(ending.error.traceback, file=sys.stderr, end="")
    streams.finish()
    os._exit(ending.exit_code)


class _Writer(io.RawIOBase):
    """Sends every write at once; a slow reader makes the job wait. Its descriptor is the pipe that child processes write to."""

    def __init__(self, channel: socket.socket, descriptor: int) -> None:
        self._channel = channel
        self._tag = OUTPUT_TAGS[descriptor - 1 : descriptor]
        self._descriptor = descriptor

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), OUTPUT_CHUNK):
            self._channel.send(self._tag + view[start : start + OUTPUT_CHUNK])
        return len(view)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor


class Streams:
    """sys.stdout and sys.stderr of a Python job: one channel for both keeps their order."""

    def __init__(self, channel: socket.socket) -> None:
        self._ours = (_text(channel, 1, "strict"), _text(channel, 2, "backslashreplace"))
        sys.stdout, sys.stderr = self._ours
        sys.__stdout__, sys.__stderr__ = self._ours  # type: ignore[misc]  # both names must lead to the job's output

    def finish(self) -> None:
        """Send what is left unsent, also in a stream that the job put in place of ours."""
        for stream in (sys.stdout, sys.stderr, *self._ours):
            with contextlib.suppress(Exception):  # the job's own object at the edge of a job
                stream.flush()


def _text(channel: socket.socket, descriptor: int, errors: str) -> io.TextIOWrapper:
    writer = _Writer(channel, descriptor)
    # A raw writer in place of a buffered one: what is written to sys.stdout.buffer must not overtake or wait.
    return io.TextIOWrapper(writer, encoding="utf-8", errors=errors, newline="\n", line_buffering=True)  # type: ignore[arg-type]  # typeshed wants read methods too

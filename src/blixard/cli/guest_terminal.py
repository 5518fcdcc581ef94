"""A program in a guest at this terminal: its streams, its window's size, its signals, its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import struct
import sys
import termios
import tty
from collections.abc import Iterator

from blixard.cli.output import note, write_error, write_out
from blixard.vm.control import ControlClient, ProgramInput, RemoteProgram, RunProgram

READ_BYTES = 32 * 1024
LOST = 125
INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


async def run_in_guest(client: ControlClient, vm_id: str, argv: tuple[str, ...], *, terminal: bool) -> int:
    """Run a program to its end and return its exit code. With ``terminal`` it has this one.

    The first signal is the program's, the second ends it and us.
    """
    rows, columns = window_size()
    environment = {"TERM": os.environ.get("TERM", "dumb")} if terminal else {}
    request = RunProgram(vm=vm_id, argv=argv, terminal=terminal, rows=rows, columns=columns, environment=environment)
    async with client.program(request) as program:
        with _raw_terminal(terminal), _signals_to(program, terminal):
            feeder = asyncio.create_task(_feed(program), name="feed the guest")
            try:
                return await _show(program)
            except asyncio.CancelledError:
                return INTERRUPTED  # leaving the block hangs up, which kills the program
            finally:
                feeder.cancel()
                await asyncio.gather(feeder, return_exceptions=True)


async def _show(program: RemoteProgram) -> int:
    while True:
        try:
            piece = await program.read()
        except ConnectionError:
            note("error: the worker that keeps the machine is gone")
            return LOST
        if piece.data:
            (write_error if piece.stream == 2 else write_out)(piece.data)
        if piece.code is not None:
            if piece.error:
                note(f"error: {piece.error}")
            return piece.code


async def _feed(program: RemoteProgram) -> None:
    """Pass standard input on. A reader of the loop, not a thread: a thread would wait for a key after the program's end."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)
    fd = sys.stdin.fileno()

    def read() -> None:
        loop.remove_reader(fd)
        with contextlib.suppress(BlockingIOError):
            pieces.put_nowait(os.read(fd, READ_BYTES))

    try:
        while True:
            data = await _next_piece(loop, fd, read, pieces)
            await program.send(ProgramInput(data=data) if data else ProgramInput(end=True))
            if not data:
                return
    except ConnectionError:
        return  # whoever reads the output says so
    finally:
        with contextlib.suppress(ValueError, OSError):
            loop.remove_reader(fd)


async def _next_piece(loop: asyncio.AbstractEventLoop, fd: int, read: object, pieces: asyncio.Queue[bytes]) -> bytes:
    try:
        loop.add_reader(fd, read)  # type: ignore[arg-type]  # a function without arguments
    except (PermissionError, OSError):  # an ordinary file is always ready and cannot be waited for
        return os.read(fd, READ_BYTES)
    return await pieces.get()


@contextlib.contextmanager
def _raw_terminal(terminal: bool) -> Iterator[None]:
    """Let every key reach the guest while the block runs."""
    if not terminal or not sys.stdin.isatty():
        yield
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _signals_to(program: RemoteProgram, terminal: bool) -> Iterator[None]:
    """Pass signals on to the program, and the window's size when it changes."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    asked = False
    watcher = asyncio.current_task()

    def pass_on(number: signal.Signals) -> None:
        nonlocal asked
        if asked and watcher is not None:
            watcher.cancel()
        asked = True
        send(ProgramInput(signal=int(number)))

    def send(given: ProgramInput) -> None:
        task = loop.create_task(_send(program, given))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for number in SIGNALS:
        loop.add_signal_handler(number, pass_on, number)
    if terminal:
        loop.add_signal_handler(signal.SIGWINCH, lambda: send(ProgramInput(size=window_size())))
    try:
        yield
    finally:
        for number in (*SIGNALS, signal.SIGWINCH):
            loop.remove_signal_handler(number)
        for task in tasks:
            task.cancel()


async def _send(program: RemoteProgram, given: ProgramInput) -> None:
    with contextlib.suppress(ConnectionError):
        await program.send(given)


def window_size() -> tuple[int, int]:
    """Return rows and columns of this terminal; 24 and 80 where there is none."""
    try:
        rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, b"\0" * 8))
    except OSError:
        return 24, 80
    return (rows, columns) if rows and columns else (24, 80)

"""The control socket of a manager: what other processes of the same person on this machine may ask of it.

A connection carries one request, one line of JSON, answered by one line: ``Reply`` or ``Problem``. A program's connection then
goes on with ``ProgramInput`` lines one way and ``ProgramOutput`` lines the other. The socket has mode 0600.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from blixard import errors
from blixard.domain.vm import VmView
from blixard.errors import BlixardError, InternalError, ServerUnreachable
from blixard.vm.agent_link import Program, ProgramOrder
from blixard.vm.guest.protocol import Stream

if TYPE_CHECKING:
    from blixard.vm.manager import VmManager

MAX_LINE_BYTES = 1 << 20
MAX_CONNECTIONS = 64
PIECE_BYTES = 64 * 1024
T = TypeVar("T")


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True):
    """Base of all requests."""


class ListVms(Request, frozen=True, kw_only=True, tag="list"):
    """Answered with a list of ``VmView``."""


class ListEvents(Request, frozen=True, kw_only=True, tag="events"):
    """Answered with a list of ``VmEvent``."""


class StopOne(Request, frozen=True, kw_only=True, tag="stop"):
    vm: str


class PauseOne(Request, frozen=True, kw_only=True, tag="pause"):
    vm: str


class ResumeOne(Request, frozen=True, kw_only=True, tag="resume"):
    vm: str


class SnapshotOne(Request, frozen=True, kw_only=True, tag="snapshot"):
    """Answered with the snapshot's name."""

    vm: str


class ForkOne(Request, frozen=True, kw_only=True, tag="fork"):
    """``vm``: a machine or a snapshot. Answered with the id of the copy."""

    vm: str


class RunProgram(Request, frozen=True, kw_only=True, tag="program"):
    vm: str
    argv: tuple[str, ...]
    terminal: bool = False
    rows: int = 24
    columns: int = 80
    environment: dict[str, str] = {}


AnyRequest = ListVms | ListEvents | StopOne | PauseOne | ResumeOne | SnapshotOne | ForkOne | RunProgram


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="reply"):
    value: object = None


class Problem(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="problem"):
    """An error of the tree in ``errors.py``, by its ``code``."""

    code: str
    message: str
    hint: str = ""


class ProgramInput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``end``: there is no more input. ``size``: rows and columns of the terminal."""

    data: bytes = b""
    end: bool = False
    signal: int = 0
    size: tuple[int, int] | None = None


class ProgramOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``stream`` 1 or 2. The last has ``code``, 128+n after signal n, or ``error`` if the program never ran."""

    stream: int = 1
    data: bytes = b""
    code: int | None = None
    error: str = ""


_decode_request = msgspec.json.Decoder(AnyRequest).decode
_decode_answer = msgspec.json.Decoder(Reply | Problem).decode
_decode_input = msgspec.json.Decoder(ProgramInput).decode
_decode_output = msgspec.json.Decoder(ProgramOutput).decode


class ControlServer:
    """Answers on one socket. Its tasks end with ``stop``, and with them the programs that they watch."""

    def __init__(self, manager: VmManager, path: Path) -> None:
        self._manager = manager
        self._path = path
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. Raises ``OSError``."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with _short_path(self._path) as path:
                listener.bind(path)
            self._path.chmod(0o600)
            listener.setblocking(False)
            self._server = await asyncio.start_unix_server(self._accept, sock=listener, limit=MAX_LINE_BYTES)
        except BaseException:
            listener.close()
            raise

    async def stop(self) -> None:
        """Close the socket and hang up on everybody. Allowed before ``start`` and twice."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._tasks) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # whoever asked has gone, or we stop
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = _decode_request(await _read_line(reader))
            if isinstance(request, RunProgram):
                await self._run_program(request, reader, writer)
                return
            answer: Reply | Problem = Reply(value=await self._answer(request))
        except BlixardError as error:
            answer = Problem(code=error.code, message=error.message, hint=error.hint or "")
        except (msgspec.MsgspecError, ValueError) as error:
            answer = Problem(code="invalid_request", message=f"this request cannot be read: {error}")
        except OSError as error:
            answer = Problem(code="unavailable", message=str(error))
        await _write_line(writer, answer)

    async def _answer(self, request: AnyRequest) -> object:
        manager = self._manager
        match request:
            case ListVms():
                return manager.list_vms()
            case ListEvents():
                return manager.events()
            case StopOne(vm=vm):
                await manager.stop_vm(vm)
            case PauseOne(vm=vm):
                await manager.pause_vm(vm)
            case ResumeOne(vm=vm):
                await manager.resume_vm(vm)
            case SnapshotOne(vm=vm):
                return await manager.snapshot_vm(vm)
            case ForkOne(vm=vm):
                return await manager.fork_vm(vm)
            case _:
                raise InternalError(f"there is no answer to {request!r}")
        return None

    async def _run_program(
        self, request: RunProgram, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        link = await self._manager.reach_vm(request.vm)
        order = ProgramOrder(
            argv=request.argv,
            terminal=request.terminal,
            rows=request.rows,
            columns=request.columns,
            environment=request.environment,
        )
        program = Program(link, order)
        feeder = asyncio.create_task(_feed(program, reader), name="feed a program in a guest")
        try:
            await _write_line(writer, Reply())
            while (piece := await program.read()) is not None:
                await _write_line(writer, ProgramOutput(stream=2 if piece[0] == Stream.STDERR else 1, data=piece[1]))
            ended = await program.wait()
            code = ended.code if ended.code >= 0 else 128 - ended.code
            failure = ended.error.message if ended.error else ""
            await _write_line(writer, ProgramOutput(code=code, error=failure))
        except errors.MachineLost as error:
            await _write_line(writer, ProgramOutput(code=125, error=error.message))
        finally:
            if not program.channel.exited.done():
                program.channel.kill()
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)


async def _feed(program: Program, reader: asyncio.StreamReader) -> None:
    """Pass input on until the caller hangs up, which ends the program."""
    try:
        while True:
            given = _decode_input(await _read_line(reader))
            if given.data:
                await program.write(given.data)
            if given.end:
                program.end_input()
            if given.signal:
                program.channel.signal(given.signal)
            if given.size is not None:
                program.channel.resize(*given.size)
    except (ConnectionError, ValueError, errors.MachineLost):
        program.channel.kill()


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    """Raises ``ConnectionError`` at the end."""
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise ConnectionError("the other end hung up")
    return line


async def _write_line(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    writer.write(msgspec.json.encode(message) + b"\n")
    await writer.drain()


@contextlib.contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """A name of at most 108 bytes for a socket, however deep its directory lies."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class ControlClient:
    """Speaks to one manager's socket. Every call is a connection of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def ask(self, request: AnyRequest, kind: type[T]) -> T:
        """Return the answer. Raises what the manager raised, and ``ServerUnreachable`` when it is gone."""
        async with self._connect() as (reader, writer):
            return msgspec.convert(await _exchange(request, reader, writer), kind)

    async def vms(self) -> list[VmView]:
        return await self.ask(ListVms(), list[VmView])

    @contextlib.asynccontextmanager
    async def program(self, request: RunProgram) -> AsyncIterator[RemoteProgram]:
        """Start a program in a guest; it is ended when the block is left."""
        async with self._connect() as (reader, writer):
            await _exchange(request, reader, writer)
            yield RemoteProgram(reader, writer)

    @contextlib.asynccontextmanager
    async def _connect(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        try:
            with _short_path(self.path) as path:
                reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE_BYTES)
        except OSError as error:
            raise ServerUnreachable(f"the worker of {self.path.parent} does not answer: {error.strerror}") from error
        try:
            yield reader, writer
        except ConnectionError as error:
            raise ServerUnreachable(f"the worker of {self.path.parent} hung up") from error
        finally:
            writer.close()


async def _exchange(request: AnyRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> object:
    await _write_line(writer, request)
    answer = _decode_answer(await _read_line(reader))
    if isinstance(answer, Problem):
        raise _error_of(answer)
    return answer.value


class RemoteProgram:
    """A program in a guest, seen from another process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, given: ProgramInput) -> None:
        """Raises ``ConnectionError`` when the manager is gone."""
        await _write_line(self._writer, given)

    async def read(self) -> ProgramOutput:
        """Return the next piece; the last one has ``code``. Raises ``ConnectionError`` when the manager is gone."""
        return _decode_output(await _read_line(self._reader))


def _error_of(problem: Problem) -> BlixardError:
    """Return the error of the class that has this code; its own constructor may want other arguments, so it is filled by hand."""
    kind = next((each for each in _all_errors(BlixardError) if each.code == problem.code), BlixardError)
    error = kind.__new__(kind)
    BlixardError.__init__(error, problem.message, hint=problem.hint or None)
    return error


def _all_errors(kind: type[BlixardError]) -> Iterator[type[BlixardError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _all_errors(child)

"""The host's end of the link to one guest's agent. What the guest sends is checked here; nothing it does harms the host."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import struct
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec

from blixard.errors import MachineLost, WrongPhase
from blixard.vm.guest.protocol import (
    CHUNK_BYTES,
    KILL,
    MAX_CHANNEL,
    MAX_TO_GUEST_BYTES,
    MAX_TO_HOST_BYTES,
    VERSION,
    WINDOW,
    WINDOW_BYTES,
    FrameReader,
    Kind,
    Malformed,
    Stream,
    frame,
)

READ_BYTES = 256 * 1024
SEED_BYTES = 256
HELLO_SECONDS = 60.0
"""For the agent to answer the first time; the guest may be booting."""
ANSWER_SECONDS = 30.0
MAX_UNSENT_BYTES = 8 * 1024 * 1024
"""Waiting for a guest that does not read. Beyond that it is lost."""
MAX_CHANNELS = 64
"""Open at a time."""
_RESIZE = struct.Struct("<HH")
_encode = msgspec.json.encode
_T = TypeVar("_T")


class GuestNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest sets its only network card to. ``address`` with its prefix length, as ``10.0.2.15/24``."""

    address: str
    gateway: str
    dns: str
    mac: str = ""


class GuestIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What a clone is given in place of what it has of its template. ``machine_id``: 32 hexadecimal digits."""

    host_name: str
    machine_id: str
    network: GuestNetwork | None = None


def fresh_identity(vm_id: str, network: GuestNetwork | None = None) -> GuestIdentity:
    """Return a new identity; the host name is the machine's id."""
    return GuestIdentity(host_name=vm_id[:63], machine_id=secrets.token_hex(16), network=network)


class GuestHello(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    kernel: str = ""
    python: str = ""


class GuestStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds since the guest's boot (that of its template for a clone), counts, and MB."""

    uptime: float
    jobs: int
    """That have ended."""
    channels: int
    """Jobs and programs under way."""
    memory_total_mb: int
    memory_available_mb: int


class GuestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Of one job, enforced by the guest's kernel. Bytes and counts; None: what the guest has."""

    memory: int | None = None
    processes: int = 128
    cpus: float | None = None
    disk: int = 1024 * 1024 * 1024
    open_files: int = 1024


class GuestBind(msgspec.Struct, frozen=True, kw_only=True):
    """Show the entry ``binds/<name>`` of the job's file stream at the absolute ``path``."""

    path: str
    name: str
    writable: bool = False
    """What the job changes in it is sent back."""


class JobOrder(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="job"):
    """A job. ``entry``: ``command`` executes ``argv``, ``python`` and ``wasm`` take their order from the packets that follow.

    Of the file stream, ``code/`` appears at /bundle, ``work/`` is the working directory. The job starts when that stream has ended.
    """

    entry: str
    argv: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    limits: GuestLimits = GuestLimits()
    binds: tuple[GuestBind, ...] = ()
    max_output: int = 1 << 40
    """Bytes of stdout and stderr together that are sent; what is over is counted."""


class ProgramOrder(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="program"):
    """A program beside the jobs, as root. With ``terminal`` it has one of this size, and its output is all on stdout."""

    argv: tuple[str, ...]
    environment: dict[str, str] = {}
    directory: str = "/"
    terminal: bool = False
    rows: int = 24
    columns: int = 80


class GuestError(msgspec.Struct, frozen=True, kw_only=True):
    """Why something could not be started in the guest."""

    type: str
    message: str
    is_fault_of_job: bool = False
    exit_code: int | None = None


class GuestExit(msgspec.Struct, frozen=True, kw_only=True):
    """How it ended. ``code`` is minus n after signal n; ``out_of_memory``: the kernel ended a process of it for want of memory."""

    code: int
    out_of_memory: bool = False
    output_bytes: int = 0
    """All that a job wrote, also what was not sent."""
    error: GuestError | None = None


class ChannelListener(Protocol):
    """Hears what a job or program sends. Called on the event loop; must not block."""

    def started(self) -> None:
        """The process runs. At most once."""

    def data(self, stream: int, data: bytes) -> bool:
        """A piece of a stream. False: it is not consumed yet, the listener calls ``Channel.consumed`` later."""


class _Reply(msgspec.Struct, frozen=True):
    id: int


class _Event(msgspec.Struct, frozen=True):
    event: str


_decode_reply = msgspec.json.Decoder(_Reply).decode
_decode_event = msgspec.json.Decoder(_Event).decode
_decode_exit = msgspec.json.Decoder(GuestExit).decode


class Channel:
    """One job or program in the guest. ``exited``: nothing of it runs any more; ``closed``: nothing of it is left.

    Both fail with ``MachineLost`` when the machine is lost.
    """

    def __init__(self, link: AgentLink, number: int, listener: ChannelListener) -> None:
        loop = asyncio.get_running_loop()
        self.number = number
        self.exited: asyncio.Future[GuestExit] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.is_started = False
        self._link = link
        self._listener = listener
        self._credit = WINDOW_BYTES
        self._more_credit = asyncio.Event()
        self._allowed = WINDOW_BYTES
        self._unreturned = 0

    async def send(self, stream: int, data: bytes) -> None:
        """Send all of it, as fast as the guest takes it. Returns early when the channel has exited. Raises ``MachineLost``."""
        view = memoryview(data)
        while view and not self.exited.done():
            if self._credit <= 0:
                await self._wait_for_credit()
                continue
            piece = view[: min(CHUNK_BYTES, self._credit)]
            view = view[len(piece) :]
            self._credit -= len(piece)
            await self._link.send(frame(Kind.DATA, self.number, bytes([stream]) + piece))

    async def _wait_for_credit(self) -> None:
        self._more_credit.clear()
        await self._more_credit.wait()
        self._link.check()

    def end(self, stream: int) -> None:
        """Say that the stream is over."""
        self._post(frame(Kind.END, self.number, bytes([stream])))

    def signal(self, number: int) -> None:
        """Send a signal to the process group of the first process; ``KILL`` to every process of the channel."""
        self._post(frame(Kind.SIGNAL, self.number, WINDOW.pack(number)))

    def kill(self) -> None:
        self.signal(KILL)

    def resize(self, rows: int, columns: int) -> None:
        """Tell a program's terminal its size."""
        self._post(frame(Kind.RESIZE, self.number, _RESIZE.pack(rows & 0xFFFF, columns & 0xFFFF)))

    def consumed(self, count: int) -> None:
        """So many bytes of data need no memory any more: the guest may send as many again."""
        self._unreturned += count
        if self._unreturned >= WINDOW_BYTES // 2:
            self._allowed += self._unreturned
            self._post(frame(Kind.WINDOW, self.number, WINDOW.pack(self._unreturned)))
            self._unreturned = 0

    def take(self, kind: int, body: bytes) -> None:
        """Hear a frame of the guest. Raises ``Malformed``."""
        match kind:
            case Kind.DATA:
                self._take_data(body)
            case Kind.WINDOW:
                self._take_window(body)
            case Kind.EVENT:
                self._take_event(body)
            case Kind.CLOSED:
                if not self.exited.done():
                    raise Malformed("a channel is closed that has not exited")
                self._resolve(self.closed, None)
            case Kind.END:
                return
            case _:
                raise Malformed(f"a frame of kind {kind} in a channel")

    def lose(self, cause: str) -> None:
        """The machine is lost."""
        for future in (self.exited, self.closed):
            if not future.done():
                future.set_exception(MachineLost(cause))
                future.exception()  # heard: perhaps nobody waits for it
        self._more_credit.set()

    def _take_data(self, body: bytes) -> None:
        size = len(body) - 1
        self._allowed -= size
        if size <= 0 or self._allowed < 0 or self.exited.done():
            raise Malformed("data that is empty, beyond what was allowed, or of a channel that has exited")
        if body[0] not in (Stream.STDOUT, Stream.STDERR, Stream.PACKET, Stream.FILES):
            raise Malformed(f"data of the stream {body[0]}")
        if self._listener.data(body[0], body[1:]):
            self.consumed(size)

    def _take_window(self, body: bytes) -> None:
        if len(body) != WINDOW.size:
            raise Malformed("a window without a size")
        (count,) = WINDOW.unpack(body)
        if self._credit + count > WINDOW_BYTES:
            raise Malformed("a window larger than the first")
        self._credit += count
        self._more_credit.set()

    def _take_event(self, body: bytes) -> None:
        match _decode_event(body).event:
            case "started" if not self.is_started and not self.exited.done():
                self.is_started = True
                self._listener.started()
            case "exited" if not self.exited.done():
                self._resolve(self.exited, _decode_exit(body))
                self._more_credit.set()
            case event:
                raise Malformed(f"the event {event!r} out of place")

    def _post(self, data: bytes) -> None:
        if not self.closed.done():
            self._link.post(data)

    @staticmethod
    def _resolve(future: asyncio.Future[_T], value: _T) -> None:
        if not future.done():
            future.set_result(value)


class AgentLink:
    """Speaks to one agent. Create on a running event loop with a fresh connection, then ``start`` and ``greet``.

    ``lost`` is done, with the cause, when the connection has broken or the guest does not keep to the protocol; then
    every method raises ``MachineLost``.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader = reader
        self._writer = writer
        self._task: asyncio.Task[None] | None = None
        self._numbers = 0
        self._channels: dict[int, Channel] = {}
        self._replies: dict[int, asyncio.Future[bytes]] = {}

    # -- the link itself ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to listen. The link owns the task; ``close`` ends it."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._listen(), name="guest's agent")

    async def close(self) -> None:
        """Hang up. Harmless at any time."""
        self._lose("the link was closed")
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        with contextlib.suppress(OSError):  # it may have broken; it is being closed
            await self._writer.wait_closed()

    async def greet(self, seconds: float = HELLO_SECONDS) -> GuestHello:
        """Wait until the agent answers; it may still boot. Raises ``MachineLost``, also if it is of another version."""
        hello = await self._ask("hello", GuestHello, seconds)
        if hello.version != VERSION:
            cause = f"the guest's agent speaks version {hello.version} of the protocol, this host {VERSION}"
            self._lose(cause)
            raise MachineLost(cause, hint="build the guest image again: `blixard image build`")
        return hello

    async def reseed(self, identity: GuestIdentity, seconds: float = ANSWER_SECONDS) -> None:
        """Make a clone differ from its template: fresh randomness, the time of now, its names. Raises ``MachineLost``."""
        fields = msgspec.to_builtins(identity)
        fields |= {"seed": secrets.token_hex(SEED_BYTES), "time_ns": time.time_ns()}
        await self._ask("reseed", _Reply, seconds, fields)

    async def ping(self, seconds: float = ANSWER_SECONDS) -> None:
        """Return when the agent has answered. Raises ``MachineLost`` if it does not within this time; the link stays as it is."""
        await self._ask("ping", _Reply, seconds)

    async def status(self, seconds: float = ANSWER_SECONDS) -> GuestStatus:
        return await self._ask("status", GuestStatus, seconds)

    async def shut_down(self, seconds: float = ANSWER_SECONDS) -> None:
        """Ask the guest to end everything and power off. Returns when it has heard it."""
        await self._ask("shutdown", _Reply, seconds)

    def open(self, order: JobOrder | ProgramOrder, listener: ChannelListener) -> Channel:
        """Order a job or a program. Raises ``MachineLost``, and ``WrongPhase`` when too many are open."""
        self.check()
        if len(self._channels) >= MAX_CHANNELS or self._numbers >= MAX_CHANNEL:
            raise WrongPhase(f"{len(self._channels)} jobs and programs run in this guest; {MAX_CHANNELS} are allowed")
        body = _encode(order)
        if len(body) > MAX_TO_GUEST_BYTES:
            raise WrongPhase(f"an order of {len(body)} bytes; {MAX_TO_GUEST_BYTES} fit into a frame")
        self._numbers += 1
        channel = self._channels[self._numbers] = Channel(self, self._numbers, listener)
        self.post(frame(Kind.OPEN, channel.number, body))
        return channel

    def check(self) -> None:
        """Raise ``MachineLost`` if the machine is lost."""
        if self.lost.done():
            raise MachineLost(self.lost.result())

    def post(self, data: bytes) -> None:
        """Send a short message without waiting. A lost machine gets none."""
        if self.lost.done():
            return
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._lose(f"the guest's agent does not read: {MAX_UNSENT_BYTES} bytes wait for it")

    async def send(self, data: bytes) -> None:
        """Send, waiting for room. Raises ``MachineLost``."""
        self.check()
        self._writer.write(data)
        try:
            await self._writer.drain()
        except OSError as error:
            self._lose(f"the connection to the guest's agent broke: {error}")
            self.check()

    # -- what comes in ------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        frames = FrameReader(MAX_TO_HOST_BYTES)
        try:
            while data := await self._reader.read(READ_BYTES):
                for kind, number, body in frames.feed(data):
                    self._take(kind, number, body)
                await asyncio.sleep(0)  # a guest that floods us must not starve the others
            cause = "the guest's agent hung up"
        except (Malformed, msgspec.DecodeError) as error:
            cause = f"the guest's agent does not keep to the protocol: {error}"
        except OSError as error:
            cause = f"the connection to the guest's agent broke: {error}"
        self._lose(cause)

    def _take(self, kind: int, number: int, body: bytes) -> None:
        if number == 0:
            if kind != Kind.REPLY:
                raise Malformed(f"a frame of kind {kind} on the link itself")
            self._take_reply(body)
            return
        channel = self._channels.get(number)
        if channel is None:
            raise Malformed(f"a frame for channel {number}, which is not open")
        channel.take(kind, body)
        if channel.closed.done():
            del self._channels[number]

    def _take_reply(self, body: bytes) -> None:
        waiting = self._replies.pop(_decode_reply(body).id, None)
        if waiting is None:
            raise Malformed("an answer that nobody has asked for")
        if not waiting.done():
            waiting.set_result(body)

    async def _ask(
        self,
        operation: str,
        answer: type[_T],
        seconds: float,
        fields: dict[str, Any] | None = None,  # what to_builtins makes of a struct
    ) -> _T:
        self.check()
        self._numbers += 1
        number = self._numbers
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        self.post(frame(Kind.REQUEST, 0, _encode({"id": number, "op": operation, **(fields or {})})))
        try:
            async with asyncio.timeout(seconds):
                return msgspec.json.decode(await reply, type=answer)
        except TimeoutError as error:
            raise MachineLost(f"the guest's agent has not answered {operation!r} within {seconds:g} s") from error
        except msgspec.DecodeError as error:
            self._lose(f"the guest's agent does not keep to the protocol: {error}")
            raise MachineLost(self.lost.result()) from error

    def _lose(self, cause: str) -> None:
        if self.lost.done():
            return
        self.lost.set_result(cause)
        for channel in self._channels.values():
            channel.lose(cause)
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(MachineLost(cause))
                reply.exception()  # heard: perhaps nobody waits for it
        self._channels.clear()
        self._replies.clear()
        self._writer.close()


class Program:
    """A program in the guest with its streams, for ``vm exec`` and ``vm shell``. What is not read makes the program wait."""

    def __init__(self, link: AgentLink, order: ProgramOrder) -> None:
        self._pieces: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue()
        self.channel = link.open(order, self)
        self.channel.exited.add_done_callback(lambda _: self._pieces.put_nowait(None))

    def started(self) -> None:
        """Nobody waits for it."""

    def data(self, stream: int, data: bytes) -> bool:
        self._pieces.put_nowait((stream, data))
        return False

    async def read(self) -> tuple[int, bytes] | None:
        """Return the next piece of output with its stream (``Stream.STDOUT``, ``Stream.STDERR``); None at the end."""
        piece = await self._pieces.get()
        if piece is None:
            self._pieces.put_nowait(None)
        else:
            self.channel.consumed(len(piece[1]))
        return piece

    async def write(self, data: bytes) -> None:
        """Feed its stdin. Raises ``MachineLost``."""
        await self.channel.send(Stream.STDIN, data)

    def end_input(self) -> None:
        self.channel.end(Stream.STDIN)

    async def wait(self) -> GuestExit:
        """Return how it ended; its output has been heard then. Raises ``MachineLost``."""
        return await asyncio.shield(self.channel.exited)


async def run_program(
    link: AgentLink, argv: tuple[str, ...], *, stdin: bytes = b"", max_output_bytes: int = 1024 * 1024
) -> tuple[GuestExit, bytes, bytes]:
    """Run a program to its end and return its stdout and stderr, each up to this many bytes. Raises ``MachineLost``."""
    program = Program(link, ProgramOrder(argv=argv))
    heard = {int(Stream.STDOUT): bytearray(), int(Stream.STDERR): bytearray()}
    try:
        await program.write(stdin)
        program.end_input()
        while (piece := await program.read()) is not None:
            stream, data = piece
            heard[stream] += data[: max_output_bytes - len(heard[stream])]
        return await program.wait(), bytes(heard[Stream.STDOUT]), bytes(heard[Stream.STDERR])
    finally:
        if not program.channel.exited.done():
            program.channel.kill()


Opener = Callable[[], Coroutine[None, None, tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def connect(open_agent: Opener, seconds: float = HELLO_SECONDS) -> AgentLink:
    """Connect to a machine's agent (``machine.open_agent``) and return the link when it has answered. Raises ``MachineLost``."""
    reader, writer = await open_agent()
    link = AgentLink(reader, writer)
    link.start()
    try:
        await link.greet(seconds)
    except BaseException:
        await link.close()
        raise
    return link

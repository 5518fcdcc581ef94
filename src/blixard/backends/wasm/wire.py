"""What travels between the backend, its zygote and the executors: frames of four bytes of length, one byte of tag, and a body."""

from __future__ import annotations

import enum
import socket
import struct
from collections.abc import Iterator

import msgspec

from blixard.backends.sandbox.plan import SandboxPlan
from blixard.domain.limits import MIB

MAX_FRAME_BYTES = 32 * MIB
"""Far above any request (arguments 1 MiB, spec 256 KiB) and any report (a result of 16 MiB): a longer frame is a broken peer."""

_HEAD = struct.Struct("<IB")


class Tag(enum.IntEnum):
    STDOUT = 1
    STDERR = 2
    STARTED = 3
    REPORT = 4
    REQUEST = 5


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Resource limits of a child of the zygote. Bytes and seconds; 0 leaves the host's limit."""

    open_files: int = 0
    file_bytes: int = 0
    address_bytes: int = 0
    cpu_seconds: int = 0


class Spawn(msgspec.Struct, frozen=True, kw_only=True):
    """Fork one child. Its file descriptors (job socket, interrupt pipe, files of a compile) travel beside this packet."""

    number: int
    limits: Limits


class Spawned(msgspec.Struct, frozen=True, kw_only=True, tag="spawned"):
    """The child runs; its pidfd travels beside this packet."""

    number: int
    pid: int


class SpawnFailed(msgspec.Struct, frozen=True, kw_only=True, tag="spawn_failed"):
    number: int
    message: str


class Exited(msgspec.Struct, frozen=True, kw_only=True, tag="exited"):
    """The child is gone and reaped. ``code`` is negative for a signal."""

    number: int
    code: int


ZygoteNotice = Spawned | SpawnFailed | Exited


class Preopen(msgspec.Struct, frozen=True, array_like=True):
    """``host`` is a directory as the executor sees it; the guest knows it as ``guest``."""

    host: str
    guest: str
    writable: bool


class RunRequest(msgspec.Struct, frozen=True, kw_only=True, tag="run"):
    """Run one module. ``key`` names the artefact for the executor's own cache; ``values`` are the arguments of ``function``."""

    number: int
    key: str
    artefact: str
    argv: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    stdin: str | None = None
    preopens: tuple[Preopen, ...] = ()
    function: str | None = None
    values: tuple[int | float, ...] = ()
    memory_bytes: int
    fuel: int | None = None
    max_output_bytes: int
    room: SandboxPlan | None = None
    announce: bool = False
    """Send ``STARTED`` right before the guest's code runs."""


class CompileRequest(msgspec.Struct, frozen=True, kw_only=True, tag="compile"):
    """Compile the module in the first file that travelled with the spawn into the second."""

    room: SandboxPlan | None = None


Request = RunRequest | CompileRequest


class Ending(enum.StrEnum):
    RETURNED = "returned"
    EXITED = "exited"
    TRAPPED = "trapped"
    INTERRUPTED = "interrupted"
    REFUSED = "refused"
    """Never ran: it could not be instantiated or prepared. ``error`` says which kind."""


class RunReport(msgspec.Struct, frozen=True, kw_only=True, tag="ran", omit_defaults=True):
    ending: Ending
    exit_code: int = 0
    values: tuple[int | float, ...] = ()
    error: str | None = None
    message: str = ""
    backtrace: str | None = None
    output_bytes: int = 0
    """All that the guest wrote, also what was dropped over the cap."""
    memory_bytes: int = 0
    """What the guest's memory had grown to, where it exports it."""


class FunctionType(msgspec.Struct, frozen=True, array_like=True):
    params: tuple[str, ...]
    results: tuple[str, ...]


class CompileReport(msgspec.Struct, frozen=True, kw_only=True, tag="compiled", omit_defaults=True):
    """``error`` is the type of the attempt's error; empty when the artefact was written."""

    error: str = ""
    message: str = ""
    hint: str | None = None
    functions: dict[str, FunctionType] = {}


Report = RunReport | CompileReport

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
decode_spawn = msgspec.msgpack.Decoder(Spawn).decode
decode_notice = msgspec.msgpack.Decoder(ZygoteNotice).decode


class BrokenFrame(Exception):
    """The peer sent what no peer of ours sends."""


def frame(tag: Tag, body: bytes) -> bytes:
    return _HEAD.pack(len(body), tag) + body


class FrameReader:
    """Cuts a byte stream into frames. Raises ``BrokenFrame`` for a length over ``MAX_FRAME_BYTES`` or an unknown tag."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Tag, bytes]]:
        buffer = self._buffer
        buffer += data
        while len(buffer) >= _HEAD.size:
            length, tag = _HEAD.unpack_from(buffer)
            _check_head(length, tag)
            end = _HEAD.size + length
            if len(buffer) < end:
                return
            body = bytes(buffer[_HEAD.size : end])
            del buffer[:end]
            yield Tag(tag), body


def receive_frame(sock: socket.socket) -> tuple[Tag, bytes] | None:
    """Block for the next frame; None when the peer is gone."""
    head = _receive_exactly(sock, _HEAD.size)
    if head is None:
        return None
    length, tag = _HEAD.unpack(head)
    _check_head(length, tag)
    body = _receive_exactly(sock, length)
    return None if body is None else (Tag(tag), body)


def _check_head(length: int, tag: int) -> None:
    if length > MAX_FRAME_BYTES or not Tag.STDOUT <= tag <= Tag.REQUEST:
        raise BrokenFrame(f"a frame of {length} bytes with tag {tag}")


def _receive_exactly(sock: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        if not (part := sock.recv(size - len(data))):
            return None
        data += part
    return data

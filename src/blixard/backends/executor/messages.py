"""What travels in an executor's channel: calls in, output and answers out."""

from __future__ import annotations

import msgspec

from blixard.backends.zygote.messages import InputPlace
from blixard.domain.outcome import AttemptError

STDOUT_TAG = b"1"
STDERR_TAG = b"2"
"""First byte of a packet of output; the number of the call follows, then the data."""
NOTED_TAG = b"3"
"""First byte of a packet that tells: the answer to the call with this number, and those before it, are in the journal.

Any other packet is an answer: its first byte is msgpack's of an array.
"""
JOIN = b"join"
"""First packet to a reusable executor; its ends of the pipes for tickets and journal come with it."""
MAX_OUTPUT_CHUNK = 32 * 1024
NUMBER_BYTES = 8
"""Of the number of a call, in a ticket and in packets of output; little-endian."""
LENGTH_BYTES = 2
"""Of the length before every answer in the journal; little-endian."""
MAX_NOTED_BYTES = 256
"""A larger answer goes through the channel. So the answers to all that one executor can have before it fit into a pipe."""


class Task(msgspec.Struct, frozen=True, array_like=True):
    """What the calls of one spec have in common; they carry it in the same bytes. ``path`` is a script, ``function`` a function."""

    root: str | None
    function: str | None
    encoding: str
    path: str | None
    environment: dict[str, str]
    memory_mb: int | None


class Call(msgspec.Struct, frozen=True, array_like=True):
    """Run one attempt."""

    number: int
    job_id: str
    attempt: int
    arguments: bytes
    inputs: tuple[InputPlace, ...] = ()


class Calls(msgspec.Struct, frozen=True, array_like=True):
    """Calls of one spec and namespace, to be run in this order. ``task`` is the msgpack of a ``Task``.

    A reusable executor begins each only when it has taken the ticket with its number; one without a ticket was taken back.
    """

    namespace: str
    task: bytes
    calls: tuple[Call, ...]


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """How a call ended. Times are microseconds since 1970, ``duration`` is seconds of the job's own code.

    ``native_stdout``, ``native_stderr``: bytes that lie unread in the pipes of descriptors 1 and 2. ``retire`` says why the
    executor ends after this call; None: it goes on.
    """

    number: int
    started_at: int
    finished_at: int
    duration: float
    exit_code: int
    result: bytes | None = None
    error: AttemptError | None = None
    native_stdout: int = 0
    native_stderr: int = 0
    retire: str | None = None


encode = msgspec.msgpack.encode
decode_calls = msgspec.msgpack.Decoder(Calls).decode
decode_task = msgspec.msgpack.Decoder(Task).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode

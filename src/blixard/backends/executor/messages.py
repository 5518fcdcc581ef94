"""What travels in an executor's channel: calls in, output and answers out."""

from __future__ import annotations

import msgspec

from blixard.backends.zygote.messages import InputPlace
from blixard.domain.outcome import AttemptError

STDOUT_TAG = b"1"
STDERR_TAG = b"2"
"""First byte of a packet of output. Any other packet is an answer: its first byte is msgpack's of an array."""
MAX_OUTPUT_CHUNK = 32 * 1024


class Task(msgspec.Struct, frozen=True, array_like=True):
    """What the calls of one spec have in common; they carry it in the same bytes. ``path`` is a script, ``function`` a function."""

    root: str | None
    function: str | None
    encoding: str
    path: str | None
    environment: dict[str, str]
    memory_mb: int | None


class Call(msgspec.Struct, frozen=True, array_like=True):
    """Run one attempt. ``task`` is the msgpack of a ``Task``."""

    number: int
    namespace: str
    job_id: str
    attempt: int
    task: bytes
    arguments: bytes
    inputs: tuple[InputPlace, ...] = ()


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
decode_call = msgspec.msgpack.Decoder(Call).decode
decode_task = msgspec.msgpack.Decoder(Task).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode

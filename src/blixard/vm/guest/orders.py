"""What the host and a job's runner say to each other in packets, past the agent, which does not read them."""

from __future__ import annotations

import msgspec

from blixard.domain.outcome import AttemptError

OUTPUT_TAGS = b"12"
"""First byte of a packet of stdout, of stderr; the agent sends the rest on as such."""
ANSWER_TAG = b"A"
FAILURE_TAG = b"F"
CODE = "/bundle"
WORK = "/work"
HOME = "/home/job"
TEMPORARY = "/tmp"  # noqa: S108 -- the job's own


class PythonOrder(msgspec.Struct, frozen=True, array_like=True):
    """``task`` is the msgpack of a ``Task`` (backends/executor/messages.py)."""

    task: bytes
    arguments: bytes


class PythonAnswer(msgspec.Struct, frozen=True, array_like=True):
    """How a call ended; ``duration`` is seconds of the job's own code."""

    duration: float
    exit_code: int
    result: bytes | None = None
    error: AttemptError | None = None


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """The job's own code never ran, and why."""

    type: str
    message: str
    is_fault_of_job: bool = False
    exit_code: int | None = None


encode = msgspec.msgpack.encode
decode_python_order = msgspec.msgpack.Decoder(PythonOrder).decode
decode_python_answer = msgspec.msgpack.Decoder(PythonAnswer).decode
decode_failure = msgspec.msgpack.Decoder(Failure).decode

"""How ends of processes and answers of executors become outcomes."""

from __future__ import annotations

import signal
import time

import msgspec

from blixard.backends.executor.messages import Answer
from blixard.domain.limits import MAX_ERROR_BYTES, MAX_INLINE_RESULT_BYTES, MAX_NAME_LENGTH, MAX_RESULT_BYTES
from blixard.domain.outcome import AttemptError, Outcome, OutcomeKind

TIMED_OUT_EXIT_CODE = 124
MAX_EXIT_CODE = 255
_CLOCK_SLACK = 1_000_000
_decode = msgspec.json.Decoder().decode
_skip = msgspec.json.Decoder(msgspec.Raw).decode


def now() -> int:
    """Return microseconds since 1970."""
    return time.time_ns() // 1000


def outcome_of_answer(answer: Answer) -> Outcome:
    """What a Python job's executor says. Its exit code decides.

    The process that speaks has run the job's code and may be the job's: nothing it says may break whoever stores it.
    """
    exit_code = min(max(answer.exit_code, 0), MAX_EXIT_CODE)
    if answer.result is not None and not exit_code and not _is_json(answer.result):
        return refused("ChannelMisused", "the job's result is not JSON")
    finished_at = now()
    times = 0 <= answer.started_at <= answer.finished_at <= finished_at + _CLOCK_SLACK
    return Outcome(
        kind=OutcomeKind.FAILED if exit_code else OutcomeKind.COMPLETED,
        started_at=answer.started_at if times else finished_at,
        finished_at=answer.finished_at if times else finished_at,
        exit_code=exit_code,
        result=None if answer.result is None or exit_code else msgspec.Raw(answer.result),
        error=None if answer.error is None else _bounded(answer.error),
    )


def _is_json(data: bytes) -> bool:
    if data == b"null":
        return True
    try:
        # A large result becomes a blob that nothing else is built around: that it is well-formed is enough.
        _decode(data) if len(data) <= MAX_INLINE_RESULT_BYTES else _skip(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return len(data) <= MAX_RESULT_BYTES


def _bounded(error: AttemptError) -> AttemptError:
    if len(error.type) + len(error.message) + len(error.traceback or "") + len(error.hint or "") <= MAX_ERROR_BYTES:
        return error
    return AttemptError(
        type=error.type[:MAX_NAME_LENGTH],
        message=error.message[: MAX_ERROR_BYTES // 4],
        traceback=(error.traceback or "")[-MAX_ERROR_BYTES // 2 :] or None,
        retryable=error.retryable,
    )


def outcome_of_exit(
    code: int, started_at: int | None, *, is_function: bool = False, memory_mb: int | None = None
) -> Outcome:
    """What the end of a job's process says. ``code`` is minus n after signal n. A function owes an answer, whatever its code."""
    if code == 0 and not is_function:
        return Outcome(kind=OutcomeKind.COMPLETED, started_at=started_at, finished_at=now(), exit_code=0)
    exit_code = code if code >= 0 else 128 - code
    return Outcome(
        kind=OutcomeKind.FAILED,
        started_at=started_at,
        finished_at=now(),
        exit_code=exit_code,
        error=_error_of_exit(code, is_function=is_function, memory_mb=memory_mb),
    )


def _error_of_exit(code: int, *, is_function: bool, memory_mb: int | None) -> AttemptError:
    if code < 0:
        return _killed(-code, memory_mb)
    if is_function:
        return AttemptError(
            type="ProcessExited", message=f"the job ended its process with exit code {code} instead of returning"
        )
    return AttemptError(type="ExitCode", message=f"the job ended with exit code {code}")


def _killed(number: int, memory_mb: int | None) -> AttemptError:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hint = None
    if number == signal.SIGKILL:
        hint = "nobody asked Blixard to kill it: the machine may have run out of memory"
    elif memory_mb is not None and number in {signal.SIGSEGV, signal.SIGABRT}:
        hint = f"it may have needed more than its memory limit of {memory_mb} MB"
    return AttemptError(type="KilledBySignal", message=f"the job was killed by {name}", hint=hint)


def timed_out(timeout: float, started_at: int | None) -> Outcome:
    return Outcome(
        kind=OutcomeKind.TIMED_OUT,
        started_at=started_at,
        finished_at=now(),
        exit_code=TIMED_OUT_EXIT_CODE,
        error=AttemptError(
            type="TimedOut",
            message=f"the job ran longer than its timeout of {timeout:g} s",
            hint="raise timeout, or make it shorter",
        ),
    )


def ended_early(kind: OutcomeKind, message: str, started_at: int | None = None) -> Outcome:
    """Cancelled, lost or released."""
    words = {OutcomeKind.CANCELLED: "Cancelled", OutcomeKind.LOST: "Lost"}
    error = AttemptError(type=words[kind], message=message) if kind in words else None
    return Outcome(kind=kind, started_at=started_at, finished_at=now(), error=error)


def refused(kind: str, message: str, *, exit_code: int | None = None, hint: str | None = None) -> Outcome:
    """The job cannot be run as it stands; trying again would not help."""
    error = AttemptError(type=kind, message=message, hint=hint, retryable=False)
    return Outcome(kind=OutcomeKind.FAILED, finished_at=now(), exit_code=exit_code, error=error)

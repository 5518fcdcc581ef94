"""How ends of processes and answers of executors become outcomes."""

from __future__ import annotations

import signal
import time

import msgspec

from blixard.backends.executor.messages import Answer
from blixard.domain.outcome import AttemptError, Outcome, OutcomeKind

TIMED_OUT_EXIT_CODE = 124


def now() -> int:
    """Return microseconds since 1970."""
    return time.time_ns() // 1000


def outcome_of_answer(answer: Answer) -> Outcome:
    """What a Python job's executor says. Its exit code decides."""
    return Outcome(
        kind=OutcomeKind.FAILED if answer.exit_code else OutcomeKind.COMPLETED,
        started_at=answer.started_at,
        finished_at=answer.finished_at,
        exit_code=answer.exit_code,
        result=None if answer.result is None or answer.exit_code else msgspec.Raw(answer.result),
        error=answer.error,
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

"""Turns what an executor reports of a guest into the attempt's outcome."""

from __future__ import annotations

import signal
import time

from blixard.backends.wasm.engine import ABORTED_EXIT_CODE
from blixard.backends.wasm.signature import encode_values
from blixard.backends.wasm.wire import Ending, RunReport
from blixard.domain.limits import MAX_ERROR_BYTES, MIB
from blixard.domain.outcome import AttemptError, Outcome, OutcomeKind

TIMED_OUT_EXIT_CODE = 124
MAX_EXIT_CODE = 255
_MEMORY_HINT_SHARE = 0.5
"""A guest that doubles its memory fails to grow when it has more than half of what is allowed."""
_BLAMELESS = frozenset({"ArtefactUnusable", "SandboxFailed"})
"""Refusals that are ours or the host's: another attempt may succeed."""


def now() -> int:
    """Return microseconds since 1970."""
    return time.time_ns() // 1000


def judge(report: RunReport, *, is_function: bool, memory_limit: int) -> Outcome:
    """Return the outcome of a guest that ended by itself."""
    match report.ending:
        case Ending.RETURNED:
            result = encode_values(report.values) if is_function else None
            return Outcome(kind=OutcomeKind.COMPLETED, exit_code=0, result=result)
        case Ending.EXITED:
            return _judge_exit(report, memory_limit)
        case Ending.REFUSED if report.error in _BLAMELESS:
            return lost(report.message)
        case Ending.REFUSED:
            return _fail(
                None, report.error or "InstantiationFailed", report.message, _hint_refused(report, memory_limit)
            )
        case Ending.INTERRUPTED:
            return lost("the guest was interrupted and nobody asked for it")
        case Ending.TRAPPED:
            hint = _hint_memory(report, memory_limit)
            return _fail(ABORTED_EXIT_CODE, report.error or "WasmTrap", report.message, hint, report.backtrace)


def time_out(timeout: float, report: RunReport | None) -> Outcome:
    error = AttemptError(
        type="TimedOut",
        message=f"the job ran longer than its timeout of {timeout:g} s",
        traceback=report.backtrace if report else None,
    )
    return Outcome(kind=OutcomeKind.TIMED_OUT, exit_code=TIMED_OUT_EXIT_CODE, error=error)


def crash(code: int) -> Outcome:
    """Judge a run whose process ended without a report. Guests cannot end it, so it is not counted as the job's failure."""
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
    return lost(f"the process of the Wasm runtime ended with {how} while it ran the module")


def lost(message: str) -> Outcome:
    return Outcome(kind=OutcomeKind.LOST, error=AttemptError(type="WorkerLost", message=message))


def refused(error: AttemptError) -> Outcome:
    return Outcome(kind=OutcomeKind.FAILED, error=error)


def _judge_exit(report: RunReport, memory_limit: int) -> Outcome:
    if report.exit_code == 0:
        return Outcome(kind=OutcomeKind.COMPLETED, exit_code=0)
    # As a Unix parent would see it, but a failure stays one.
    code = report.exit_code & MAX_EXIT_CODE or 1
    hint = _hint_memory(report, memory_limit)
    return _fail(code, "ProcessExited", f"the module exited with code {report.exit_code}", hint)


def _hint_memory(report: RunReport, memory_limit: int) -> str | None:
    if report.memory_bytes < memory_limit * _MEMORY_HINT_SHARE:
        return None
    return (
        f"its memory had grown to {report.memory_bytes // MIB} MB of the {memory_limit // MIB} MB it may have: "
        "if it ran out of memory, raise requirements.memory_mb"
    )


def _hint_refused(report: RunReport, memory_limit: int) -> str | None:
    if report.error == "MemoryLimit":
        return f"it asks for more than its {memory_limit // MIB} MB from the start: raise requirements.memory_mb"
    return None


def _fail(code: int | None, kind: str, message: str, hint: str | None = None, backtrace: str | None = None) -> Outcome:
    error = AttemptError(
        type=kind, message=message[:MAX_ERROR_BYTES], traceback=backtrace and backtrace[:MAX_ERROR_BYTES], hint=hint
    )
    return Outcome(kind=OutcomeKind.FAILED, exit_code=code, error=error)

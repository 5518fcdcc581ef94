"""Turns what a guest says of a job's end into the attempt's outcome."""

from __future__ import annotations

import signal

import msgspec

from blixard.backends.contract import BackendSettings, Execution
from blixard.backends.executor.messages import Answer
from blixard.backends.microvm.plan import memory_of
from blixard.backends.microvm.run import Run
from blixard.backends.outcomes import ended_early, now, outcome_of_answer, outcome_of_exit, refused, timed_out
from blixard.backends.sandbox.hints import explain_denial
from blixard.backends.wasm.verdict import judge
from blixard.backends.wasm.wire import CompileReport, decode_report
from blixard.domain.limits import MIB
from blixard.domain.outcome import AttemptError, Outcome, OutcomeKind
from blixard.domain.payload import FunctionPayload, WasmPayload
from blixard.vm.agent_link import GuestError, GuestExit
from blixard.vm.guest.orders import ANSWER_TAG, FAILURE_TAG, decode_failure, decode_python_answer

MISUSED = "the job wrote into descriptor 3, which is Blixard's own"


def outcome_of(execution: Execution, run: Run, end: GuestExit, settings: BackendSettings) -> Outcome:
    """Return the outcome of a job whose machine lived to tell its end."""
    outcome = _outcome_of(execution, run, end, settings)
    if run.trouble_with_files and outcome.kind is OutcomeKind.COMPLETED:
        error = AttemptError(type="FilesNotWritten", message=run.trouble_with_files)
        outcome = Outcome(kind=OutcomeKind.FAILED, started_at=outcome.started_at, finished_at=now(), error=error)
    return with_output(_explain(execution, outcome, end, settings), execution, run, end)


def with_output(outcome: Outcome, execution: Execution, run: Run, end: GuestExit | None = None) -> Outcome:
    """Say how much the job has written. The guest may say what it likes: it counts only if there was more than was sent."""
    written = max(run.output_bytes, min(end.output_bytes, 1 << 53) if end is not None else 0)
    truncated = written > execution.spec.max_output_bytes
    return msgspec.structs.replace(outcome, output_bytes=written, output_truncated=truncated)


def early(execution: Execution, run: Run) -> Outcome:
    """Return the outcome of a job that was ended because somebody, or its timeout, wanted it."""
    if run.ending is OutcomeKind.TIMED_OUT:
        return timed_out(execution.spec.timeout or 0.0, run.started_at)
    if run.ending is OutcomeKind.CANCELLED:
        return ended_early(OutcomeKind.CANCELLED, "cancelled while it ran", run.started_at)
    return ended_early(OutcomeKind.LOST, "the worker ended it", run.started_at)


def _outcome_of(execution: Execution, run: Run, end: GuestExit, settings: BackendSettings) -> Outcome:
    if run.is_broken:
        return refused("ChannelMisused", MISUSED)
    if run.ending is not None:
        return early(execution, run)
    if end.error is not None:
        return _of_guest_error(end.error)
    if run.packets:
        try:
            return _of_packet(execution, run, end, settings, run.packets[0])
        except (msgspec.DecodeError, ValueError):
            return refused("ChannelMisused", MISUSED)
    is_function = isinstance(execution.spec.payload, FunctionPayload)
    return outcome_of_exit(end.code, run.started_at, is_function=is_function)


def _of_guest_error(error: GuestError) -> Outcome:
    if error.type == "ChannelMisused":
        return refused("ChannelMisused", MISUSED)
    if error.type == "FilesNotPlaced":
        hint = "ask for more memory with memory_mb: a virtual machine keeps its files in memory"
        return refused(error.type, error.message, hint=hint)
    return ended_early(OutcomeKind.LOST, error.message)


def _of_packet(execution: Execution, run: Run, end: GuestExit, settings: BackendSettings, packet: bytes) -> Outcome:
    """Raises ``DecodeError`` and ``ValueError`` for what is not from our code."""
    tag, body = packet[:1], packet[1:]
    payload = execution.spec.payload
    if tag == FAILURE_TAG:
        failure = decode_failure(body)
        if not failure.is_fault_of_job:
            return ended_early(OutcomeKind.LOST, failure.message)
        return refused(failure.type, failure.message, exit_code=failure.exit_code)
    if tag != ANSWER_TAG:
        raise ValueError("neither an answer nor a failure")
    if isinstance(payload, WasmPayload):
        return _of_wasm(execution, run, body, settings)
    answer = decode_python_answer(body)
    code = answer.exit_code
    if not isinstance(payload, FunctionPayload) and end.code not in (code, -signal.SIGKILL):
        return outcome_of_exit(end.code, run.started_at)  # after its answer a script can still end otherwise
    finished = now()
    return outcome_of_answer(
        Answer(
            number=0,
            started_at=run.started_at or finished,
            finished_at=finished,
            duration=answer.duration,
            exit_code=code,
            result=answer.result,
            error=answer.error,
        )
    )


def _of_wasm(execution: Execution, run: Run, body: bytes, settings: BackendSettings) -> Outcome:
    report = decode_report(body)
    if isinstance(report, CompileReport):
        raise ValueError("not the report of a run")  # noqa: TRY004 -- it is the job's word, and no bug
    payload = execution.spec.payload
    is_function = isinstance(payload, WasmPayload) and payload.function is not None
    outcome = judge(report, is_function=is_function, memory_limit=memory_of(execution, settings) * MIB)
    return msgspec.structs.replace(outcome, started_at=run.started_at, finished_at=now())


def _explain(execution: Execution, outcome: Outcome, end: GuestExit, settings: BackendSettings) -> Outcome:
    """Say which wall the job ran into, where that can be known."""
    error = outcome.error
    if error is None or outcome.kind is not OutcomeKind.FAILED:
        return outcome
    if end.out_of_memory and (outcome.exit_code in (None, 128 + signal.SIGKILL) or error.type == "MemoryError"):
        limit = memory_of(execution, settings)
        error = msgspec.structs.replace(
            error,
            type="MemoryLimit",
            message=f"the job needs more than its memory limit of {limit} MB",
            hint="ask for more with memory_mb; what a job writes into its private directories counts, too",
        )
        return msgspec.structs.replace(outcome, error=error)
    return msgspec.structs.replace(outcome, error=explain_denial(error, execution.spec.grants))

"""What an ended job left: its result, and its end in words."""

from __future__ import annotations

import signal

from blixard.client.contract import AsyncClient
from blixard.domain.outcome import AttemptError, OutcomeKind
from blixard.domain.state_machine import JobState
from blixard.protocol.jobs import JobResult


async def result_bytes(client: AsyncClient, result: JobResult) -> bytes | None:
    """Return the result's JSON text, fetched if it is a blob; None if there is no result."""
    if result.result_blob is not None:
        return await client.get_blob(result.result_blob)
    return None if result.result is None else bytes(result.result)


def index_in_batch(result: JobResult) -> int:
    """Return the place of a job of a batch among its inputs."""
    return result.index if result.index is not None else int(result.id.rpartition(".")[2])


def describe_end(result: JobResult) -> str:
    """Say in one sentence how a job ended that did not complete."""
    reason = f": {describe_error(result.error)}" if result.error is not None else ""
    if is_cancelled(result):
        return f"job {result.id} was cancelled"
    if result.outcome is OutcomeKind.TIMED_OUT:
        return f"job {result.id} ran longer than its timeout{reason}"
    if result.outcome is OutcomeKind.LOST:
        return f"job {result.id} lost its worker too often{reason}"
    return f"job {result.id} failed{reason or _exit_reason(result.exit_code)}"


def is_cancelled(result: JobResult) -> bool:
    return result.state is JobState.CANCELLED or result.outcome is OutcomeKind.CANCELLED


def describe_error(error: AttemptError) -> str:
    return f"{error.type}: {error.message}" if error.message else error.type


def _exit_reason(code: int | None) -> str:
    if code is None:
        return ""
    if code > 128:
        try:
            return f": killed by {signal.Signals(code - 128).name}"
        except ValueError:
            pass
    return f": exit code {code}"

"""From the end of a job to a value or an error."""

from __future__ import annotations

from blixard.client.contract import AsyncClient
from blixard.domain.outcome import OutcomeKind
from blixard.domain.state_machine import JobState
from blixard.errors import BlixardError, JobCancelled, JobFailed, JobTimedOut, WorkerLost
from blixard.protocol.jobs import JobResult


async def result_bytes(client: AsyncClient, result: JobResult) -> bytes | None:
    """Return the result's JSON text, fetched if it is a blob. Raises what ``error_of`` returns for a job without a result."""
    if (error := error_of(result)) is not None:
        raise error
    if result.result_blob is not None:
        return await client.get_blob(result.result_blob)
    return None if result.result is None else bytes(result.result)


def error_of(result: JobResult) -> BlixardError | None:
    """Return why the job has no result; None if it completed."""
    if result.state is JobState.COMPLETED:
        return None
    error = result.error
    reason = f": {error.type}: {error.message}" if error and error.message else f": {error.type}" if error else ""
    hint = error.hint if error else None
    if result.state is JobState.CANCELLED:
        return JobCancelled(f"job {result.id} was cancelled", job_id=result.id, hint=hint)
    if result.outcome is OutcomeKind.LOST:
        return WorkerLost(f"job {result.id} lost its worker too often{reason}", hint=hint)
    cls, what = (
        (JobTimedOut, "ran longer than its timeout")
        if result.outcome is OutcomeKind.TIMED_OUT
        else (JobFailed, "failed")
    )
    return cls(
        f"job {result.id} {what}{reason}",
        job_id=result.id,
        exit_code=result.exit_code,
        traceback=error.traceback if error else None,
        hint=hint,
    )

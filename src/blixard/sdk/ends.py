"""From the end of a job to a value or an error."""

from __future__ import annotations

from blixard.client.contract import AsyncClient
from blixard.client.endings import describe_end, is_cancelled, result_bytes
from blixard.domain.outcome import OutcomeKind
from blixard.domain.state_machine import JobState
from blixard.errors import BlixardError, JobCancelled, JobFailed, JobTimedOut, WorkerLost
from blixard.protocol.jobs import JobResult


async def fetch_result(client: AsyncClient, result: JobResult) -> bytes | None:
    """Return the result's JSON text. Raises what ``error_of`` returns for a job without a result."""
    if (error := error_of(result)) is not None:
        raise error
    return await result_bytes(client, result)


def error_of(result: JobResult) -> BlixardError | None:
    """Return why the job has no result; None if it completed."""
    if result.state is JobState.COMPLETED:
        return None
    text, error = describe_end(result), result.error
    hint = error.hint if error else None
    if is_cancelled(result):
        return JobCancelled(text, job_id=result.id, hint=hint)
    if result.outcome is OutcomeKind.LOST:
        return WorkerLost(text, hint=hint)
    cls = JobTimedOut if result.outcome is OutcomeKind.TIMED_OUT else JobFailed
    traceback = error.traceback if error else None
    return cls(text, job_id=result.id, exit_code=result.exit_code, traceback=traceback, hint=hint)

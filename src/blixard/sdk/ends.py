"""From the end of a job to a value or an error."""

from __future__ import annotations

import builtins

from blixard.client.contract import AsyncClient
from blixard.client.endings import describe_end, is_cancelled, result_bytes
from blixard.domain.outcome import AttemptError, OutcomeKind
from blixard.domain.state_machine import JobState
from blixard.errors import BlixardError, JobCancelled, JobFailed, JobTimedOut, WorkerLost
from blixard.protocol.jobs import JobResult


async def fetch_result(client: AsyncClient, result: JobResult) -> bytes | None:
    """Return the result's JSON text. Raises what ``error_of`` returns for a job without a result."""
    return inline_result(result) if result.result_blob is None else await result_bytes(client, result)


def inline_result(result: JobResult) -> bytes | None:
    """Return the JSON text of a result that is no blob. Raises what ``error_of`` returns for a job without one."""
    if (error := error_of(result)) is not None:
        raise error
    return None if result.result is None else bytes(result.result)


def with_type(error: BlixardError, cause: AttemptError | None) -> BlixardError:
    """Return the error as one that ``except ValueError`` catches, too, if the job raised an exception that Python itself has."""
    cls = vars(builtins).get(cause.type) if cause else None
    if not isinstance(error, JobFailed) or not isinstance(cls, type) or not issubclass(cls, Exception):
        return error
    if issubclass(cls, StopIteration | StopAsyncIteration):
        return error  # raised again within a generator it would say that the generator has ended
    try:
        both = type("JobFailed", (JobFailed, cls), {"__module__": JobFailed.__module__})
        typed: BlixardError = both(
            error.message, job_id=error.job_id, exit_code=error.exit_code, traceback=error.traceback, hint=error.hint
        )
    except TypeError:
        return error  # some, as UnicodeError, cannot be made from a message alone
    return typed


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

"""The one table between the error tree and HTTP: the server turns an error into a ``Problem``, the client turns it back.

What comes back is of the same class with the same message, hint and fields. A code that this version does not know becomes
the nearest class by status.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from http import HTTPStatus
from typing import cast

from blixard import errors
from blixard.errors import BlixardError
from blixard.protocol.workers import Problem

TYPE_PREFIX = "/api/v1/docs#problem-"
"""Relative to the server (RFC 9457, section 3.1.1): its page lists every problem."""
INTERNAL_MESSAGE = "the server hit a bug; its log has the details under the request id"
RETRY_AFTER_SECONDS = 1
"""What answers 503 ask a client to wait."""


@dataclasses.dataclass(frozen=True)
class ProblemRow:
    """``fields`` are what the class carries besides message, hint and ``field``: text, or None."""

    error: type[BlixardError]
    status: int
    fields: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()


_JOB_ERROR = {"fields": ("job_id", "traceback"), "numbers": ("exit_code",)}

TABLE: tuple[ProblemRow, ...] = (
    ProblemRow(errors.BlixardError, 500),
    ProblemRow(errors.CallerError, 400),
    ProblemRow(errors.InvalidRequest, 400),
    ProblemRow(errors.LimitExceeded, 413),
    ProblemRow(errors.ConfigError, 400),
    ProblemRow(errors.NotFound, 404),
    ProblemRow(errors.JobNotFound, 404, ("job_id",)),
    ProblemRow(errors.WorkerNotFound, 404, ("worker",)),
    ProblemRow(errors.BatchNotFound, 404, ("batch_id",)),
    ProblemRow(errors.BlobNotFound, 404, ("digest",)),
    ProblemRow(errors.TokenNotFound, 404, ("token_id",)),
    ProblemRow(errors.ImageNotFound, 404, ("image",)),
    ProblemRow(errors.VmNotFound, 404, ("vm",)),
    ProblemRow(errors.Conflict, 409),
    ProblemRow(errors.InvalidTransition, 409, ("job_id", "state", "wanted")),
    ProblemRow(errors.IdTaken, 409, ("job_id",)),
    ProblemRow(errors.Unauthenticated, 401),
    ProblemRow(errors.Forbidden, 403),
    ProblemRow(errors.NotSupportedHere, 422),
    ProblemRow(errors.JobError, 422, **_JOB_ERROR),
    ProblemRow(errors.JobFailed, 422, **_JOB_ERROR),
    ProblemRow(errors.JobTimedOut, 422, **_JOB_ERROR),
    ProblemRow(errors.JobCancelled, 422, **_JOB_ERROR),
    ProblemRow(errors.WorkerError, 409),
    ProblemRow(errors.WorkerLost, 409),
    ProblemRow(errors.SessionExpired, 410),
    ProblemRow(errors.LeaseLost, 409),
    ProblemRow(errors.MachineLost, 409),
    ProblemRow(errors.Unavailable, 503),
    ProblemRow(errors.StoreUnavailable, 503),
    ProblemRow(errors.StoreFull, 507),
    ProblemRow(errors.VmUnavailable, 503),
    ProblemRow(errors.NotEnoughMemory, 503),
    ProblemRow(errors.ServerUnreachable, 502),
    ProblemRow(errors.OutcomeUnknown, 504),
    ProblemRow(errors.WaitTimedOut, 504),
    ProblemRow(errors.InternalError, 500),
    ProblemRow(errors.ConstraintFailed, 500),
    ProblemRow(errors.WrongPhase, 500),
)
_BY_ERROR: Mapping[type[BlixardError], ProblemRow] = {row.error: row for row in TABLE}
_BY_CODE: Mapping[str, ProblemRow] = {row.error.code: row for row in TABLE}
_BY_STATUS: Mapping[int, type[BlixardError]] = {
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    413: errors.LimitExceeded,
    502: errors.ServerUnreachable,
    503: errors.Unavailable,
    504: errors.OutcomeUnknown,
}


def problem_of(error: BaseException, *, request_id: str | None = None, status: int | None = None) -> Problem:
    """Return what the caller may know of ``error``: everything of an error of ours, nothing of a bug.

    ``status`` replaces the table's where HTTP has a better word for the same class (405, 415).
    """
    row = _row_of(error)
    if row is None or issubclass(row.error, errors.InternalError):
        return _internal(row.error if row else errors.InternalError, request_id)
    ours = cast("BlixardError", error)
    return Problem(
        type=TYPE_PREFIX + row.error.code,
        title=HTTPStatus(status or row.status).phrase,
        status=status or row.status,
        detail=ours.message,
        code=row.error.code,
        hint=ours.hint,
        field=getattr(ours, "field", None),
        request_id=request_id,
        extra=_extra(ours, row),
    )


def error_of(problem: Problem) -> BlixardError:
    """Return the exception that the problem was made from: same class, message, hint and fields."""
    row = _BY_CODE.get(problem.code)
    kind = row.error if row else _kind_for(problem.status)
    error = kind.__new__(kind)
    # Not the class's own __init__: those build a message from the fields, and the server's words must come through as sent.
    BlixardError.__init__(error, problem.detail, hint=_hint(problem, kind))
    if isinstance(error, errors.InvalidRequest):
        error.field = problem.field
    for name in row.fields if row else ():
        setattr(error, name, problem.extra.get(name))
    for name in row.numbers if row else ():
        setattr(error, name, int(problem.extra[name]) if name in problem.extra else None)
    return error


def status_of(error: BaseException) -> int:
    """Return the status that ``problem_of`` would give."""
    row = _row_of(error)
    return row.status if row else 500


def _row_of(error: BaseException) -> ProblemRow | None:
    """Return the row of the class or of its nearest ancestor, so that a class added to the tree is never a hole."""
    return next((_BY_ERROR[kind] for kind in type(error).__mro__ if kind in _BY_ERROR), None)


def _extra(error: BlixardError, row: ProblemRow) -> dict[str, str]:
    values = ((name, getattr(error, name)) for name in (*row.fields, *row.numbers))
    return {name: str(value) for name, value in values if value is not None}


def _internal(kind: type[BlixardError], request_id: str | None) -> Problem:
    return Problem(
        type=TYPE_PREFIX + kind.code,
        title=HTTPStatus.INTERNAL_SERVER_ERROR.phrase,
        status=500,
        detail=INTERNAL_MESSAGE,
        code=kind.code,
        request_id=request_id,
    )


def _hint(problem: Problem, kind: type[BlixardError]) -> str | None:
    if issubclass(kind, errors.InternalError) and problem.request_id:
        return f"please report it with the request id {problem.request_id}"
    return problem.hint


def _kind_for(status: int) -> type[BlixardError]:
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return errors.CallerError if 400 <= status < 500 else errors.InternalError

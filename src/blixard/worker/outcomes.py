"""Outcomes that the worker itself decides, without a backend's word."""

from __future__ import annotations

import msgspec

from blixard.backends.contract import StopReason
from blixard.domain.limits import MAX_RESULT_BYTES
from blixard.domain.outcome import AttemptError, Outcome, OutcomeKind
from blixard.errors import BlixardError, CallerError

_KINDS = {
    StopReason.CANCEL: OutcomeKind.CANCELLED,
    StopReason.RELEASE: OutcomeKind.RELEASED,
    StopReason.KILL: OutcomeKind.RELEASED,
}


def not_started(reason: StopReason) -> Outcome:
    """The attempt was stopped before any code of the job ran: even a kill costs it nothing."""
    return Outcome(kind=_KINDS[reason])


def not_prepared(error: Exception) -> Outcome:
    """What the job needs could not be brought here. A blob that does not exist stays so; other troubles may be this worker's."""
    if isinstance(error, CallerError):
        return Outcome(kind=OutcomeKind.FAILED, error=_describe(error, retryable=False))
    return Outcome(kind=OutcomeKind.LOST, error=_describe(error, retryable=True))


def broken(error: Exception) -> Outcome:
    """Our own code failed under the job."""
    return Outcome(kind=OutcomeKind.LOST, error=_describe(error, retryable=True))


def too_large(outcome: Outcome, size: int) -> Outcome:
    error = AttemptError(
        type="ResultTooLarge",
        message=f"the result is {size} bytes of JSON; {MAX_RESULT_BYTES} are allowed",
        hint="write it to a file or store of your own and return its name",
        retryable=False,
    )
    return msgspec.structs.replace(outcome, kind=OutcomeKind.FAILED, result=None, error=error)


def _describe(error: Exception, *, retryable: bool) -> AttemptError:
    hint = error.hint if isinstance(error, BlixardError) else None
    text = str(error) or "no message"
    return AttemptError(type=type(error).__name__, message=text, hint=hint, retryable=retryable)


def given_back(outcome: Outcome) -> Outcome:
    """A worker that was stopped ended the job: it runs again elsewhere and no count goes up."""
    error = AttemptError(type="WorkerStopped", message="its worker was stopped while it ran")
    return msgspec.structs.replace(outcome, kind=OutcomeKind.RELEASED, error=error)

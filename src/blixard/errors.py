"""Every error that Blixard raises, as one tree.

BlixardError
├── CallerError                 the caller's mistake: nothing was changed
│   ├── InvalidRequest          a value is wrong; names the field and the fix
│   │   └── LimitExceeded       a value is larger than a named limit
│   ├── ConfigError             a setting is wrong; names its file or variable
│   ├── NotFound                no such thing
│   │   └── JobNotFound, WorkerNotFound, BatchNotFound, BlobNotFound, TokenNotFound, ImageNotFound, VmNotFound
│   ├── Conflict                the thing is not in a state that allows this
│   │   ├── InvalidTransition   the job's state machine refuses
│   │   └── IdTaken             the id belongs to a different job
│   ├── Unauthenticated         no valid token
│   ├── Forbidden               the token lacks the scope
│   └── NotSupportedHere        this host cannot give the isolation or feature asked for
├── JobError                    the job itself ended without a result
│   ├── JobFailed               its code failed; carries exit code and remote traceback
│   ├── JobTimedOut             it ran longer than its timeout
│   └── JobCancelled            somebody cancelled it
├── WorkerError                 a worker is gone or may not go on
│   ├── WorkerLost              too many workers died while running the job
│   ├── SessionExpired          the worker's session was declared dead; register again
│   ├── LeaseLost               the attempt belongs to somebody else now
│   └── MachineLost             a virtual machine ended, hangs or does not answer
├── Unavailable                 try again later; nothing is known to be wrong with the request
│   ├── StoreUnavailable        the database cannot be opened, read or written
│   │   └── StoreFull           the disk is full
│   ├── VmUnavailable           there is no VM manager
│   ├── NotEnoughMemory         the host has not the memory that a machine needs
│   ├── ServerUnreachable       no answer from the server
│   ├── OutcomeUnknown          the write may or may not have happened; repeat it with the same id
│   └── WaitTimedOut            the caller stopped waiting; the job goes on
└── InternalError               our own bug
    ├── ConstraintFailed        the database refused a row that should not have been written
    └── WrongPhase              a part was used before it started, or after it stopped
"""

from __future__ import annotations


class BlixardError(Exception):
    """Base of the tree. ``code`` is stable and travels over HTTP; ``hint`` says what to do next."""

    code = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CallerError(BlixardError):
    """The request cannot be carried out as it stands; nothing was changed."""

    code = "caller_error"


class InvalidRequest(CallerError):
    """A value is not acceptable; ``field`` names it."""

    code = "invalid_request"

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.field = field


class LimitExceeded(InvalidRequest):
    """A value is larger than the named limit."""

    code = "limit_exceeded"


class ConfigError(CallerError):
    """A setting is unknown or wrong; the message names the file and line, or the variable."""

    code = "config_error"


class NotFound(CallerError):
    """No such thing in this namespace."""

    code = "not_found"


class JobNotFound(NotFound):
    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}", hint="`blixard jobs` lists the jobs that exist")
        self.job_id = job_id


class WorkerNotFound(NotFound):
    code = "worker_not_found"

    def __init__(self, worker: str) -> None:
        super().__init__(f"there is no worker {worker!r}", hint="`blixard workers` lists them")
        self.worker = worker


class BatchNotFound(NotFound):
    code = "batch_not_found"

    def __init__(self, batch_id: str) -> None:
        super().__init__(f"there is no batch {batch_id!r}")
        self.batch_id = batch_id


class BlobNotFound(NotFound):
    code = "blob_not_found"

    def __init__(self, digest: str) -> None:
        super().__init__(f"there is no blob {digest}", hint="upload it first, then submit again")
        self.digest = digest


class TokenNotFound(NotFound):
    code = "token_not_found"

    def __init__(self, token_id: str) -> None:
        super().__init__(f"there is no token {token_id!r}", hint="`blixard token list` shows them")
        self.token_id = token_id


class ImageNotFound(NotFound):
    """No guest image has this name or digest on this machine."""

    code = "image_not_found"

    def __init__(self, image: str, *, reason: str = "") -> None:
        super().__init__(
            f"there is no guest image {image!r} on this machine{': ' if reason else ''}{reason}",
            hint="`blixard image list` shows the images, `blixard image build` makes one",
        )
        self.image = image


class VmNotFound(NotFound):
    """No virtual machine of this machine's managers has this id."""

    code = "vm_not_found"

    def __init__(self, vm: str) -> None:
        super().__init__(f"there is no virtual machine {vm!r}", hint="`blixard vms` shows them")
        self.vm = vm


class Conflict(CallerError):
    """The thing exists but is not in a state that allows this."""

    code = "conflict"


class InvalidTransition(Conflict):
    code = "invalid_transition"

    def __init__(self, job_id: str, state: str, wanted: str, *, hint: str | None = None) -> None:
        super().__init__(f"job {job_id!r} is {state} and cannot become {wanted}", hint=hint)
        self.job_id = job_id
        self.state = state
        self.wanted = wanted


class IdTaken(Conflict):
    code = "id_taken"

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"the id {job_id!r} belongs to a different job",
            hint="submit with another id, or leave the id out to get a new one",
        )
        self.job_id = job_id


class Unauthenticated(CallerError):
    code = "unauthenticated"


class Forbidden(CallerError):
    code = "forbidden"


class NotSupportedHere(CallerError):
    """The host cannot give what was asked for, and less is never given silently. `blixard doctor` says what is missing."""

    code = "not_supported_here"


class JobError(BlixardError):
    """The job ended without a result."""

    code = "job_error"

    def __init__(
        self,
        message: str,
        *,
        job_id: str,
        exit_code: int | None = None,
        traceback: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.job_id = job_id
        self.exit_code = exit_code
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.message}\n\n{self.traceback}" if self.traceback else self.message


class JobFailed(JobError):
    code = "job_failed"


class JobTimedOut(JobError):
    code = "job_timed_out"


class JobCancelled(JobError):
    code = "job_cancelled"


class WorkerError(BlixardError):
    code = "worker_error"


class WorkerLost(WorkerError):
    """More workers than ``max_lost`` died while running the job."""

    code = "worker_lost"


class SessionExpired(WorkerError):
    """The session was declared dead: its jobs belong to others. End them, and register again."""

    code = "session_expired"


class LeaseLost(WorkerError):
    """The attempt is stale: another attempt owns the job, or it has ended. Nothing was changed."""

    code = "lease_lost"


class MachineLost(WorkerError):
    """A virtual machine ended, hangs or does not answer. The attempt on it is lost; the message has the cause."""

    code = "machine_lost"


class Unavailable(BlixardError):
    code = "unavailable"


class StoreUnavailable(Unavailable):
    code = "store_unavailable"


class StoreFull(StoreUnavailable):
    """The disk is full: the write did not happen. Free space; nothing that was acknowledged is lost."""

    code = "store_full"


class VmUnavailable(Unavailable):
    """There is no VM manager in this process."""

    code = "vm_unavailable"

    def __init__(
        self, message: str = "VM manager is not available (SKIP_VM_MANAGER may be set)", *, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint or "`blixard doctor` says what this machine lacks")


class NotEnoughMemory(Unavailable):
    """The host has not the memory that a virtual machine needs now."""

    code = "not_enough_memory"


class ServerUnreachable(Unavailable):
    code = "server_unreachable"


class OutcomeUnknown(Unavailable):
    """The connection broke after the request was sent. Repeating it with the same ids is safe."""

    code = "outcome_unknown"


class WaitTimedOut(Unavailable):
    """The wait ended before the job did; the job goes on."""

    code = "wait_timed_out"


class InternalError(BlixardError):
    """A bug in Blixard. Please report it with the request id."""

    code = "internal_error"


class ConstraintFailed(InternalError):
    """A CHECK, UNIQUE or NOT NULL constraint refused the statement; nothing was changed."""

    code = "constraint_failed"


class WrongPhase(InternalError):
    """A part was used before it was started, or after it was stopped."""

    code = "wrong_phase"

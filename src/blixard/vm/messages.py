"""Everything that the parts of the VM layer say to each other. Commands ask for something, events tell what has happened.

A ``ticket`` names the call that waits for the answer; ``at`` is seconds on the manager's monotonic clock.
"""

from __future__ import annotations

import enum

import msgspec

from blixard.domain.requirements import VmMode
from blixard.domain.vm import VmState
from blixard.errors import BlixardError
from blixard.vm.lease import VmNeed
from blixard.vm.policy import VmShape


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages."""


class Asking(Message, frozen=True, kw_only=True):
    """One that a caller waits for."""

    ticket: str


# Commands to the router


class RouteJob(Asking, frozen=True, kw_only=True):
    """Give this job a machine: of its own, or a service machine of its namespace; ``vm_id`` names the one it must be."""

    need: VmNeed
    vm_id: str | None = None


class AbandonRoute(Message, frozen=True, kw_only=True):
    """Whoever asked has gone: whatever was or would have been handed to the ticket is given back."""

    ticket: str


class ReturnVm(Asking, frozen=True, kw_only=True):
    """The job of ``lease`` (the ticket of its ``RouteJob``) has ended."""

    lease: str
    broken: bool = False


class StartServiceVm(Asking, frozen=True, kw_only=True):
    """Start one that waits for jobs of the namespace."""

    need: VmNeed


class StopVm(Asking, frozen=True, kw_only=True):
    vm_id: str
    cause: str = "stopped by hand"


class StopRouting(Asking, frozen=True, kw_only=True):
    """Refuse what waits and what comes; end every machine. Answered when none is left."""

    cause: str


# Commands to the pool


class StartMachine(Message, frozen=True, kw_only=True):
    """Make a machine run: a clone of its shape's template, which is made first if there is none, or of a snapshot.

    ``warm``: nobody waits for it, so it may run a job of ours that does nothing, after which the first real one is quicker.
    """

    vm_id: str
    shape: VmShape
    template: str | None = None
    warm: bool = False


class ReseedMachine(Message, frozen=True, kw_only=True):
    """Give a machine that was kept ready fresh randomness, the time and its name; answered by ``MachineReady``."""

    vm_id: str


class StopMachine(Message, frozen=True, kw_only=True):
    """End it, whatever it does; answered by ``MachineGone`` once nothing is left."""

    vm_id: str
    cause: str


class PauseVm(Asking, frozen=True, kw_only=True):
    vm_id: str


class ResumeVm(Asking, frozen=True, kw_only=True):
    vm_id: str


class SnapshotVm(Asking, frozen=True, kw_only=True):
    """Save a copy of a running machine; answered with the snapshot's name. ``then_fork``: start a copy of it, too,
    held for a person until it is stopped; answered with its id.

    To fork, ``vm_id`` may also name a snapshot that was taken before.
    """

    vm_id: str
    then_fork: bool = False


class ReachVm(Asking, frozen=True, kw_only=True):
    """Answer the ticket with the link to the machine's agent, for a program beside the job."""

    vm_id: str


class PrepareShape(Asking, frozen=True, kw_only=True):
    """Make image and template of the shape, if they are not there."""

    shape: VmShape


class PingMachine(Message, frozen=True, kw_only=True):
    vm_id: str
    timeout: float


class MeasureMachine(Message, frozen=True, kw_only=True):
    vm_id: str


# Commands to the monitors


class Tick(Message, frozen=True, kw_only=True):
    at: float


class CheckNow(Asking, frozen=True, kw_only=True):
    """Ping one machine without waiting for its turn; answered with its health."""

    vm_id: str


# Events


class EndKind(enum.StrEnum):
    STOPPED = "stopped"
    """As it was told to."""
    FAILED = "failed"
    """By itself: it died, hung, or never came to be."""


class VmStateChanged(Message, frozen=True, kw_only=True):
    """The router's books: ``is_spare`` while it belongs to nobody and waits for whoever comes."""

    vm_id: str
    state: VmState
    shape: VmShape
    mode: VmMode
    namespace: str = ""
    job_id: str = ""
    labels: dict[str, str] = {}
    jobs: int = 0
    note: str = ""
    is_spare: bool = False


class VmRemoved(Message, frozen=True, kw_only=True):
    """The router has struck it off its books: nobody hears of this machine again."""

    vm_id: str


class VmAssigned(Message, frozen=True, kw_only=True):
    """The router has decided: this machine is the ticket's."""

    ticket: str
    vm_id: str


class MachineReady(Message, frozen=True, kw_only=True):
    """Its agent has answered and has been given randomness, time and name."""

    vm_id: str


class MachineGone(Message, frozen=True, kw_only=True):
    """Nothing of it is left: no process, no file. Its permit is free."""

    vm_id: str
    kind: EndKind
    cause: str
    error: BlixardError | None = None
    """Why it could not be started."""


class MachinePaused(Message, frozen=True, kw_only=True):
    ticket: str
    vm_id: str


class MachineResumed(Message, frozen=True, kw_only=True):
    ticket: str
    vm_id: str


class SnapshotTaken(Message, frozen=True, kw_only=True):
    ticket: str
    vm_id: str
    name: str
    shape: VmShape
    then_fork: bool


class HealthCheckPassed(Message, frozen=True, kw_only=True):
    vm_id: str
    seconds: float


class HealthCheckFailed(Message, frozen=True, kw_only=True):
    vm_id: str
    cause: str


class VmDegraded(Message, frozen=True, kw_only=True):
    vm_id: str
    cause: str


class VmRecovered(Message, frozen=True, kw_only=True):
    vm_id: str


class VmUnhealthy(Message, frozen=True, kw_only=True):
    """It missed so many answers that it counts as dead."""

    vm_id: str
    cause: str


class CircuitBreakerOpened(Message, frozen=True, kw_only=True):
    """Machines of this shape fail one after the other: none is started for a while."""

    shape: VmShape
    cause: str
    seconds: float


class CircuitBreakerHalfOpened(Message, frozen=True, kw_only=True):
    """The next one may try; if it fails the breaker opens again at once."""

    shape: VmShape


class CircuitBreakerClosed(Message, frozen=True, kw_only=True):
    shape: VmShape


class MemoryMeasured(Message, frozen=True, kw_only=True):
    vm_id: str
    private_memory: int


class VmShouldRecycle(Message, frozen=True, kw_only=True):
    """It has had its time or memory: replace it as soon as it runs no job."""

    vm_id: str
    cause: str


class IdleVmDetected(Message, frozen=True, kw_only=True):
    vm_id: str
    cause: str


class Answered(Message, frozen=True, kw_only=True):
    """The call of this ticket has its answer."""

    ticket: str
    value: object = None


class Refused(Message, frozen=True, kw_only=True):
    ticket: str
    error: BlixardError

"""Does each machine still answer, and does each kind of machine still start? Pings, thresholds, circuit breakers."""

from __future__ import annotations

from blixard.domain.vm import VmHealth, VmState
from blixard.errors import MachineLost, VmNotFound
from blixard.vm.messages import (
    Answered,
    CheckNow,
    CircuitBreakerClosed,
    CircuitBreakerHalfOpened,
    CircuitBreakerOpened,
    HealthCheckFailed,
    HealthCheckPassed,
    MachineGone,
    MachineReady,
    Message,
    PingMachine,
    Refused,
    Tick,
    VmDegraded,
    VmRecovered,
    VmRemoved,
    VmStateChanged,
    VmUnhealthy,
)
from blixard.vm.policy import HealthRules, VmShape

ANSWERING = (VmState.READY, VmState.BUSY)


class Pulse:
    """What is known of one machine's answers."""

    def __init__(self, shape: VmShape) -> None:
        self.shape = shape
        self.health = VmHealth.UNKNOWN
        self.failures = 0
        self.successes = 0
        self.is_asked = False
        self.asked_at = 0.0
        self.is_reachable = False
        self.tickets: list[str] = []


class Breaker:
    def __init__(self) -> None:
        self.failures = 0
        self.open_until: float | None = None
        self.is_half_open = False


class HealthChecker:
    """Does no I/O: told of ticks and answers, it says what to ask and what it makes of it.

    A machine is pinged while its processors run. It is degraded after the first missed answer, recovered after
    ``recovery_threshold`` answers in a row, unhealthy, which is final, after ``failure_threshold`` missed ones in a row.
    """

    def __init__(self, rules: HealthRules) -> None:
        self._rules = rules
        self._pulses: dict[str, Pulse] = {}
        self._breakers: dict[VmShape, Breaker] = {}
        self._now = 0.0
        self._out: list[Message] = []

    def handle(self, message: Message) -> list[Message]:
        self._out = []
        match message:
            case Tick(at=at):
                self._tick(at)
            case VmStateChanged():
                self._follow(message)
            case MachineReady(vm_id=vm_id) if pulse := self._pulses.get(vm_id):
                self._worked(pulse.shape)
                pulse.health = VmHealth.HEALTHY if pulse.health is VmHealth.UNKNOWN else pulse.health
            case MachineGone(vm_id=vm_id, error=MachineLost() as error) if pulse := self._pulses.get(vm_id):
                self._broke(pulse.shape, str(error))  # it did not start; a running one that ends may be its job's doing
            case VmRemoved(vm_id=vm_id):
                self._forget(vm_id)
            case HealthCheckPassed(vm_id=vm_id) if pulse := self._pulses.get(vm_id):
                self._passed(vm_id, pulse)
            case HealthCheckFailed(vm_id=vm_id, cause=cause) if pulse := self._pulses.get(vm_id):
                self._failed(vm_id, pulse, cause)
            case CheckNow():
                self._check_now(message)
        return self._out

    def _follow(self, message: VmStateChanged) -> None:
        pulse = self._pulses.setdefault(message.vm_id, Pulse(message.shape))
        is_reachable = message.state in ANSWERING
        if is_reachable and not pulse.is_reachable:  # it has just answered, or was paused: its turn comes later
            pulse.asked_at, pulse.failures = self._now, 0
        pulse.is_reachable = is_reachable

    def _tick(self, at: float) -> None:
        self._now = at
        for vm_id, pulse in self._pulses.items():
            if pulse.is_reachable and not pulse.is_asked and at - pulse.asked_at >= self._rules.interval:
                self._ask(vm_id, pulse)
        for shape, breaker in self._breakers.items():
            if breaker.open_until is not None and at >= breaker.open_until:
                breaker.open_until, breaker.is_half_open = None, True
                self._out.append(CircuitBreakerHalfOpened(shape=shape))

    def _ask(self, vm_id: str, pulse: Pulse) -> None:
        pulse.is_asked, pulse.asked_at = True, self._now
        self._out.append(PingMachine(vm_id=vm_id, timeout=self._rules.timeout))

    def _check_now(self, message: CheckNow) -> None:
        pulse = self._pulses.get(message.vm_id)
        if pulse is None:
            self._out.append(Refused(ticket=message.ticket, error=VmNotFound(message.vm_id)))
        elif not pulse.is_reachable:
            self._out.append(Answered(ticket=message.ticket, value=pulse.health))
        else:
            pulse.tickets.append(message.ticket)
            if not pulse.is_asked:
                self._ask(message.vm_id, pulse)

    def _passed(self, vm_id: str, pulse: Pulse) -> None:
        pulse.is_asked, pulse.failures = False, 0
        pulse.successes += 1
        if pulse.health is VmHealth.UNKNOWN:
            pulse.health = VmHealth.HEALTHY
        elif pulse.health is VmHealth.DEGRADED and pulse.successes >= self._rules.recovery_threshold:
            pulse.health = VmHealth.HEALTHY
            self._out.append(VmRecovered(vm_id=vm_id))
        self._answer(pulse)

    def _failed(self, vm_id: str, pulse: Pulse, cause: str) -> None:
        pulse.is_asked, pulse.successes = False, 0
        if not pulse.is_reachable:  # paused or stopped while it was asked: no wonder
            self._answer(pulse)
            return
        pulse.failures += 1
        if pulse.failures >= self._rules.failure_threshold:
            pulse.health = VmHealth.UNHEALTHY
            pulse.is_reachable = False
            self._out.append(VmUnhealthy(vm_id=vm_id, cause=f"{pulse.failures} pings in a row failed: {cause}"))
        elif pulse.health is not VmHealth.DEGRADED:
            pulse.health = VmHealth.DEGRADED
            self._out.append(VmDegraded(vm_id=vm_id, cause=cause))
        self._answer(pulse)

    def _answer(self, pulse: Pulse) -> None:
        self._out += [Answered(ticket=ticket, value=pulse.health) for ticket in pulse.tickets]
        pulse.tickets.clear()

    def _forget(self, vm_id: str) -> None:
        pulse = self._pulses.pop(vm_id, None)
        for ticket in pulse.tickets if pulse else []:
            self._out.append(Refused(ticket=ticket, error=VmNotFound(vm_id)))

    def _broke(self, shape: VmShape, cause: str) -> None:
        breaker = self._breakers.setdefault(shape, Breaker())
        breaker.failures += 1
        if breaker.open_until is None and (breaker.is_half_open or breaker.failures >= self._rules.breaker_threshold):
            breaker.open_until, breaker.is_half_open = self._now + self._rules.breaker_seconds, False
            seconds = self._rules.breaker_seconds
            text = f"the last {breaker.failures} virtual machines of this size failed, the newest because: {cause}"
            self._out.append(CircuitBreakerOpened(shape=shape, cause=text, seconds=seconds))

    def _worked(self, shape: VmShape) -> None:
        breaker = self._breakers.pop(shape, None)
        if breaker is not None and (breaker.is_half_open or breaker.open_until is not None):
            self._out.append(CircuitBreakerClosed(shape=shape))

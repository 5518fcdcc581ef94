"""The router under every order of messages that the pool and its callers may send."""

from __future__ import annotations

import itertools

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from blixard.domain.requirements import VmMode
from blixard.domain.vm import VmState
from blixard.errors import MachineLost
from blixard.vm.lease import VmNeed
from blixard.vm.messages import (
    AbandonRoute,
    Answered,
    CircuitBreakerClosed,
    CircuitBreakerHalfOpened,
    CircuitBreakerOpened,
    EndKind,
    IdleVmDetected,
    MachineGone,
    MachinePaused,
    MachineReady,
    MachineResumed,
    Message,
    Refused,
    ReseedMachine,
    ReturnVm,
    RouteJob,
    SnapshotTaken,
    StartMachine,
    StartServiceVm,
    StopMachine,
    StopRouting,
    StopVm,
    VmAssigned,
    VmDegraded,
    VmRecovered,
    VmRemoved,
    VmShouldRecycle,
    VmStateChanged,
    VmUnhealthy,
)
from blixard.vm.policy import RoutingRules, VmShape, shape_of
from blixard.vm.router import VmRouter

MAX_VMS, MEMORY_MB = 4, 2048
SIZES = (256, 300, 1024)
needs = st.builds(
    VmNeed,
    namespace=st.sampled_from(("red", "blue")),
    memory_mb=st.sampled_from(SIZES),
    mode=st.sampled_from(VmMode),
    network=st.booleans(),
    labels=st.sampled_from(({}, {"zone": "a"})),
)


class MachineModel:
    """What the pool would know of one machine."""

    def __init__(self, shape: VmShape) -> None:
        self.shape = shape
        self.is_starting = True
        self.is_stopping = False
        self.namespaces: set[str] = set()
        self.lessees: list[str] = []
        self.mode = VmMode.EPHEMERAL


class RouterMachine(RuleBasedStateMachine):
    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()
        rules = RoutingRules(max_vms=MAX_VMS, memory_mb=MEMORY_MB, pool=2, max_jobs_per_vm=3)
        self.router = VmRouter(rules, lambda: f"vm{next(self.numbers)}")
        self.machines: dict[str, MachineModel] = {}
        self.needs: dict[str, VmNeed] = {}
        self.open: set[str] = set()
        """Tickets without an answer."""
        self.leases: dict[str, str] = {}
        self.callers: set[str] = set()
        self.broken: set[VmShape] = set()
        """Shapes of which no machine may be started, or only one on trial: jobs wait for those that run."""

    # What follows from a message, as the pool and the callers would see it

    def send(self, message: Message) -> None:
        for follows in self.router.handle(message):
            self.hear(follows)

    def hear(self, message: Message) -> None:
        match message:
            case StartMachine(vm_id=vm_id, shape=shape):
                assert vm_id not in self.machines
                self.machines[vm_id] = MachineModel(shape)
            case ReseedMachine(vm_id=vm_id):
                machine = self.machines[vm_id]
                assert not machine.is_starting
                assert not machine.lessees, "a used machine is given to another job"
                machine.is_starting = True
            case StopMachine(vm_id=vm_id):
                assert not self.machines[vm_id].is_stopping
                self.machines[vm_id].is_stopping = True
            case VmAssigned(ticket=ticket, vm_id=vm_id):
                self.assign(ticket, vm_id)
            case VmStateChanged(vm_id=vm_id, mode=mode):
                if vm_id in self.machines:
                    self.machines[vm_id].mode = mode
            case Answered(ticket=ticket):
                assert ticket in self.callers
                self.callers.discard(ticket)
            case Refused(ticket=ticket):
                assert ticket in self.open or ticket in self.callers
                self.open.discard(ticket)
                self.callers.discard(ticket)
            case VmRemoved(vm_id=vm_id):
                assert vm_id not in self.machines
            case _:
                raise AssertionError(f"the router said {message!r}")

    def assign(self, ticket: str, vm_id: str) -> None:
        machine, need = self.machines[vm_id], self.needs[ticket]
        assert ticket in self.open, "answered twice, or after it was abandoned"
        assert not machine.is_starting
        assert not machine.is_stopping
        assert vm_id not in self.leases.values(), "two jobs in one machine at the same time"
        assert machine.shape.memory_mb >= need.memory_mb
        assert machine.shape.network == need.network
        machine.namespaces.add(need.namespace)
        machine.lessees.append(ticket)
        self.open.discard(ticket)
        self.leases[ticket] = vm_id

    def pick(self, data: st.DataObject, found: list[str]) -> str:
        return data.draw(st.sampled_from(sorted(found)))

    def starting(self) -> list[str]:
        return [vm_id for vm_id, m in self.machines.items() if m.is_starting and not m.is_stopping]

    # What callers do

    @rule(target=tickets, need=needs)
    def route(self, need: VmNeed) -> str:
        ticket = f"job{next(self.numbers)}"
        self.needs[ticket] = need
        self.open.add(ticket)
        self.send(RouteJob(ticket=ticket, need=need))
        return ticket

    @rule(ticket=consumes(tickets))
    def abandon(self, ticket: str) -> None:
        self.open.discard(ticket)
        self.leases.pop(ticket, None)
        self.send(AbandonRoute(ticket=ticket))

    @rule(ticket=tickets, broken=st.booleans())
    def give_back(self, ticket: str, broken: bool) -> None:
        """Also twice, and what was never handed out."""
        if ticket in self.open:
            return
        self.leases.pop(ticket, None)
        caller = f"call{next(self.numbers)}"
        self.callers.add(caller)
        self.send(ReturnVm(ticket=caller, lease=ticket, broken=broken))

    @rule(need=needs)
    def start_service(self, need: VmNeed) -> None:
        caller = f"call{next(self.numbers)}"
        self.callers.add(caller)
        self.send(StartServiceVm(ticket=caller, need=need))

    @precondition(lambda self: self.machines)
    @rule(data=st.data())
    def stop_by_hand(self, data: st.DataObject) -> None:
        caller = f"call{next(self.numbers)}"
        self.callers.add(caller)
        self.send(StopVm(ticket=caller, vm_id=self.pick(data, [*self.machines, "vm-unknown"])))

    @precondition(lambda self: self.machines)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        caller = f"call{next(self.numbers)}"
        self.callers.add(caller)
        vm_id = self.pick(data, list(self.machines))
        shape = self.machines[vm_id].shape
        self.send(SnapshotTaken(ticket=caller, vm_id=vm_id, name="copy", shape=shape, then_fork=True))

    # What machines do

    @precondition(lambda self: self.starting())
    @rule(data=st.data())
    def become_ready(self, data: st.DataObject) -> None:
        vm_id = self.pick(data, self.starting())
        self.machines[vm_id].is_starting = False
        self.send(MachineReady(vm_id=vm_id))

    @precondition(lambda self: self.machines)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """It ends as it was told, or by itself."""
        vm_id = self.pick(data, list(self.machines))
        machine = self.machines.pop(vm_id)
        self.leases = {ticket: vm for ticket, vm in self.leases.items() if vm != vm_id}
        kind = EndKind.STOPPED if machine.is_stopping else EndKind.FAILED
        error = MachineLost("no") if machine.is_starting and not machine.is_stopping else None
        self.send(MachineGone(vm_id=vm_id, kind=kind, cause="gone", error=error))

    @precondition(lambda self: self.machines)
    @rule(data=st.data(), kind=st.sampled_from((MachinePaused, MachineResumed)))
    def pause(self, data: st.DataObject, kind: type[MachinePaused | MachineResumed]) -> None:
        caller = f"call{next(self.numbers)}"
        self.callers.add(caller)
        self.send(kind(ticket=caller, vm_id=self.pick(data, [*self.machines, "vm-unknown"])))
        assert caller not in self.callers

    @precondition(lambda self: self.machines)
    @rule(data=st.data())
    def recover(self, data: st.DataObject) -> None:
        self.send(VmRecovered(vm_id=self.pick(data, list(self.machines))))

    @precondition(lambda self: self.machines)
    @rule(data=st.data(), kind=st.sampled_from((VmDegraded, VmUnhealthy, VmShouldRecycle, IdleVmDetected)))
    def complain(
        self, data: st.DataObject, kind: type[VmDegraded | VmUnhealthy | VmShouldRecycle | IdleVmDetected]
    ) -> None:
        vm_id = self.pick(data, list(self.machines))
        was_stopping, is_leased = self.machines[vm_id].is_stopping, vm_id in self.leases.values()
        self.send(kind(vm_id=vm_id, cause="for a test"))
        if is_leased and kind is not VmUnhealthy:
            assert self.machines[vm_id].is_stopping == was_stopping, "a running job was ended"

    @rule(size=st.sampled_from((256, 512, 1024)), network=st.booleans(), state=st.integers(0, 2))
    def breaker(self, size: int, network: bool, state: int) -> None:
        shape = VmShape(memory_mb=size, network=network)
        messages: tuple[Message, ...] = (
            CircuitBreakerOpened(shape=shape, cause="for a test", seconds=1),
            CircuitBreakerHalfOpened(shape=shape),
            CircuitBreakerClosed(shape=shape),
        )
        if state == 0:
            self.broken.add(shape)
        elif state == 2:
            self.broken.discard(shape)
        self.send(messages[state])

    # What holds always

    @invariant()
    def there_are_never_too_many(self) -> None:
        assert len(self.machines) <= MAX_VMS
        assert sum(m.shape.memory_mb for m in self.machines.values()) <= MEMORY_MB
        assert self.router.total == len(self.machines)

    @invariant()
    def no_machine_is_shared_between_namespaces(self) -> None:
        for machine in self.machines.values():
            assert len(machine.namespaces) <= 1
            if machine.mode is VmMode.EPHEMERAL:
                assert len(machine.lessees) <= 1

    @invariant()
    def nobody_waits_without_a_cause(self) -> None:
        """A job that waits has a machine on its way, or there is no room and nothing idle that could make some."""
        promised = {vm.holder for vm in self.router.books()}
        unserved = [
            ticket for ticket in self.open if ticket not in promised and shape_of(self.needs[ticket]) not in self.broken
        ]
        if not unserved:
            return
        idle = [
            vm
            for vm in self.router.books()
            if vm.state is VmState.READY and not (vm.holder or vm.is_paused or vm.is_held)
        ]
        room = len(self.machines) < MAX_VMS
        used = sum(m.shape.memory_mb for m in self.machines.values())
        stopping = any(m.is_stopping for m in self.machines.values())
        assert stopping or not idle, "something idle could have made room"
        assert stopping or not room or used + 1024 > MEMORY_MB

    def teardown(self) -> None:
        """Everything ends: each job has an answer, each caller, and no machine is left in the books."""
        caller = f"call{next(self.numbers)}"
        self.callers.add(caller)
        self.send(StopRouting(ticket=caller, cause="the test ends"))
        assert all(m.is_stopping for m in self.machines.values())
        for vm_id in list(self.machines):
            del self.machines[vm_id]
            self.send(MachineGone(vm_id=vm_id, kind=EndKind.STOPPED, cause="gone"))
        assert not self.open, "jobs without an answer"
        assert not self.callers, "callers without an answer"
        assert self.router.total == 0


RouterMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestRouter = RouterMachine.TestCase

"""Which machine a job gets: the one place that decides, one message at a time.

The router keeps the books of all machines: one that is in them holds a permit, from before it starts until nothing of it is
left. It does no I/O and never waits, so each decision is atomic, and a test can drive it with messages alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from blixard.domain.requirements import VmMode
from blixard.domain.vm import VmState
from blixard.errors import (
    BlixardError,
    Conflict,
    MachineLost,
    NotEnoughMemory,
    NotSupportedHere,
    Unavailable,
    VmNotFound,
    VmUnavailable,
)
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
from blixard.vm.policy import MAX_TRIES, MAX_WAITING, RoutingRules, VmShape, fits, has_labels, mode_of, shape_of


class Wish:
    """A job that wants a machine."""

    def __init__(self, request: RouteJob, shape: VmShape, mode: VmMode) -> None:
        self.ticket = request.ticket
        self.need = request.need
        self.vm_id = request.vm_id
        self.shape = shape
        self.mode = mode
        self.tries = 0


class Vm:
    """What the books say of one machine. ``holder`` is the ticket of the job that has it, from when it is promised."""

    def __init__(self, vm_id: str, shape: VmShape, mode: VmMode) -> None:
        self.id = vm_id
        self.shape = shape
        self.mode = mode
        self.state = VmState.STARTING
        self.namespace = ""
        self.labels: dict[str, str] = {}
        self.wish: Wish | None = None
        self.holder: str | None = None
        self.caller: str | None = None
        """Waits for it to be ready, without a job."""
        self.closers: list[str] = []
        """Wait for its end."""
        self.jobs = 0
        self.note = ""
        self.retiring = ""
        self.is_degraded = False
        self.is_paused = False
        self.is_held = False
        """A copy that a person asked for: no job gets it."""
        self.was_ready = False

    @property
    def is_spare(self) -> bool:
        return self.mode is VmMode.EPHEMERAL and self.holder is None and not self.is_held and not self.retiring

    @property
    def is_free(self) -> bool:
        return self.state is VmState.READY and not (
            self.is_paused or self.is_degraded or self.retiring or self.is_held or self.holder
        )


class VmRouter:
    """``new_id`` names machines."""

    def __init__(self, rules: RoutingRules, new_id: Callable[[], str]) -> None:
        self._rules = rules
        self._new_id = new_id
        self._vms: dict[str, Vm] = {}
        self._waiting: OrderedDict[str, Wish] = OrderedDict()
        self._broken: dict[VmShape, str] = {}
        self._trial: set[VmShape] = set()
        """Shapes of which one machine may try whether they work again."""
        self._wanted: VmShape | None = None
        """What the pool keeps ready: the shape of the last job that wanted a machine of its own."""
        self._pool_rests = False
        self._stopped = ""
        self._last_words: list[str] = []
        """Wait until there are no machines any more."""
        self._out: list[Message] = []

    @property
    def total(self) -> int:
        return len(self._vms)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def handle(self, message: Message) -> list[Message]:
        """Take one message in, and return what follows from it."""
        self._out = []
        self._take(message)
        self._serve_waiting()
        if not isinstance(
            message, RouteJob | MachineReady
        ):  # a job that begins now has the processors to itself for a moment
            self._fill_pool()
        if self._last_words and not self._vms:
            self._out += [Answered(ticket=ticket) for ticket in self._last_words]
            self._last_words.clear()
        return self._out

    def _take(self, message: Message) -> None:
        match message:
            case RouteJob():
                self._route(message)
            case AbandonRoute():
                self._abandon(message.ticket)
            case ReturnVm():
                self._take_back(message)
            case StartServiceVm():
                self._start_service(message)
            case StopVm():
                self._stop_by_hand(message)
            case StopRouting():
                self._stop_all(message)
            case SnapshotTaken() if message.then_fork:
                self._fork(message)
            case MachineReady() | MachinePaused() | MachineResumed() | MachineGone():
                self._hear_of_machine(message)
            case _:
                self._hear_of_health(message)

    def _hear_of_machine(self, message: MachineReady | MachinePaused | MachineResumed | MachineGone) -> None:
        vm = self._vms.get(message.vm_id)
        match message:
            case MachinePaused() | MachineResumed():
                self._pause(vm, message)
            case _ if vm is None:
                return
            case MachineReady():
                self._became_ready(vm)
            case MachineGone():
                self._is_gone(vm, message)

    def _pause(self, vm: Vm | None, message: MachinePaused | MachineResumed) -> None:
        if vm is None:
            self._say(Refused(ticket=message.ticket, error=VmNotFound(message.vm_id)))
            return
        vm.is_paused = isinstance(message, MachinePaused)
        self._tell(vm)
        self._say(Answered(ticket=message.ticket))

    def _hear_of_health(self, message: Message) -> None:
        match message:
            case VmShouldRecycle(vm_id=vm_id, cause=cause) if vm := self._vms.get(vm_id):
                self._retire(vm, cause)
            case IdleVmDetected(vm_id=vm_id, cause=cause) if (vm := self._vms.get(vm_id)) and self._is_idle(vm):
                if vm.is_spare:
                    self._pool_rests = True
                self._stop(vm, cause)
            case VmDegraded(vm_id=vm_id) | VmRecovered(vm_id=vm_id) if vm := self._vms.get(vm_id):
                vm.is_degraded = isinstance(message, VmDegraded)
            case VmUnhealthy(vm_id=vm_id, cause=cause) if vm := self._vms.get(vm_id):
                self._stop(vm, cause)
            case CircuitBreakerOpened(shape=shape, cause=cause):
                self._broken[shape] = cause
                self._trial.discard(shape)
            case CircuitBreakerHalfOpened(shape=shape) if shape in self._broken:
                self._trial.add(shape)
            case CircuitBreakerClosed(shape=shape):
                self._broken.pop(shape, None)
                self._trial.discard(shape)

    # Jobs

    def _route(self, request: RouteJob) -> None:
        try:
            self._waiting[request.ticket] = self._wish(request)
        except BlixardError as error:
            self._say(Refused(ticket=request.ticket, error=error))

    def _wish(self, request: RouteJob) -> Wish:
        if self._stopped:
            raise VmUnavailable(self._stopped)
        if len(self._waiting) >= MAX_WAITING:
            raise Unavailable(f"{MAX_WAITING} jobs wait for a virtual machine already (MAX_WAITING)")
        shape, mode = shape_of(request.need), mode_of(request.need, self._rules)
        self._check_size(shape)
        if mode is VmMode.EPHEMERAL:
            self._wanted = shape
            self._pool_rests = False
        return Wish(request, shape, mode)

    def _check_size(self, shape: VmShape) -> None:
        if shape.memory_mb > self._rules.memory_mb:
            raise NotEnoughMemory(
                f"the machine needs {shape.memory_mb} MB, and all of them together may have {self._rules.memory_mb} MB here",
                hint="ask for less memory, raise vm.memory, or run it on a larger host",
            )

    def _abandon(self, ticket: str) -> None:
        self._waiting.pop(ticket, None)
        vm = self._held_by(ticket)
        if vm is None:
            return
        if vm.state is VmState.STARTING and not vm.was_ready and vm.mode is VmMode.EPHEMERAL:
            vm.holder, vm.wish, vm.namespace, vm.labels = None, None, "", {}  # nobody has been in it: it is a spare
            self._tell(vm)
        elif vm.state is VmState.STARTING and vm.mode is VmMode.SERVICE:
            vm.holder, vm.wish = None, None
            self._tell(vm)
        else:
            self._leave(vm, broken=False)

    def _take_back(self, message: ReturnVm) -> None:
        vm = self._held_by(message.lease)
        if vm is None:
            self._say(Answered(ticket=message.ticket))  # it is gone already, or given back before
            return
        if message.broken or vm.mode is VmMode.EPHEMERAL:
            vm.closers.append(message.ticket)
        else:
            self._say(Answered(ticket=message.ticket))
        self._leave(vm, broken=message.broken)

    def _leave(self, vm: Vm, *, broken: bool) -> None:
        """The job of this machine has ended: a machine of its own ends, a service machine goes on unless it has had its time."""
        vm.holder, vm.wish = None, None
        if vm.state is VmState.STOPPING:
            return
        vm.jobs += vm.state is VmState.BUSY
        if vm.mode is VmMode.SERVICE and vm.jobs >= self._rules.max_jobs_per_vm:
            vm.retiring = vm.retiring or f"it has run {vm.jobs} jobs"
        if broken:
            self._stop(vm, "its job left it in doubt")
        elif vm.mode is VmMode.EPHEMERAL:
            self._stop(vm, "its job has ended")
        elif vm.retiring:
            self._stop(vm, vm.retiring)
        else:
            self._move(vm, VmState.READY)

    def _held_by(self, ticket: str) -> Vm | None:
        return next((vm for vm in self._vms.values() if vm.holder == ticket), None)

    # Decisions

    def _serve_waiting(self) -> None:
        """Give machines to those who wait, oldest first. Who came later never takes the room that an earlier one waits for."""
        coming = sum(vm.state is VmState.STOPPING for vm in self._vms.values())
        room_is_claimed = False
        for wish in list(self._waiting.values()):
            try:
                is_served = self._serve(wish, may_start=not room_is_claimed)
            except BlixardError as error:
                self._refuse(wish, error)
                continue
            if is_served or wish.vm_id is not None or not self._may_start(wish):
                continue
            room_is_claimed = True
            if coming:
                coming -= 1
            else:
                self._make_room(wish)

    def _serve(self, wish: Wish, *, may_start: bool) -> bool:
        if wish.vm_id is not None:
            self._assign(self._named(wish), wish)
            return True
        vm = self._find_service(wish) if wish.mode is VmMode.SERVICE else self._find_spare(wish)
        if vm is not None:
            self._assign(vm, wish)
            return True
        if not self._may_start(wish):
            self._check_hope(wish)
        elif may_start and self._has_room(wish.shape):
            self._start_for(wish)
            return True
        return False

    def _may_start(self, wish: Wish) -> bool:
        is_allowed = wish.mode is VmMode.EPHEMERAL or self._rules.auto_create
        return is_allowed and (wish.shape not in self._broken or wish.shape in self._trial)

    def _check_hope(self, wish: Wish) -> None:
        """No machine may be started for this job: raise unless there is one that it can wait for."""
        if wish.mode is VmMode.SERVICE and any(self._serves(vm, wish.need) for vm in self._vms.values()):
            return
        if wish.shape in self._broken:
            raise VmUnavailable(self._broken[wish.shape], hint="see `blixard doctor`; it is tried again by itself")
        raise NotSupportedHere(
            "no service machine fits this job, and vm.auto_create is off", hint="start one, or set vm.auto_create"
        )

    def _named(self, wish: Wish) -> Vm:
        vm = self._vms.get(wish.vm_id or "")
        if vm is None:
            raise VmNotFound(wish.vm_id or "")
        if not vm.is_free or not self._serves(vm, wish.need):
            raise Conflict(f"virtual machine {vm.id!r} is {vm.state} and cannot take this job now")
        return vm

    def _serves(self, vm: Vm, need: VmNeed) -> bool:
        """Say whether jobs with this need may run in this service machine: never in one of another namespace."""
        return (
            vm.mode is VmMode.SERVICE
            and not vm.retiring
            and not vm.is_held
            and vm.namespace == need.namespace
            and fits(vm.shape, need)
            and has_labels(vm.labels, need.labels)
        )

    def _find_service(self, wish: Wish) -> Vm | None:
        able = [vm for vm in self._vms.values() if vm.is_free and self._serves(vm, wish.need)]
        return min(able, key=lambda vm: (vm.shape.memory_mb, vm.shape.vcpus, -vm.jobs), default=None)

    def _find_spare(self, wish: Wish) -> Vm | None:
        spares = [vm for vm in self._vms.values() if vm.is_spare and vm.shape == wish.shape and not vm.is_paused]
        ready = [vm for vm in spares if vm.is_free]
        return next(iter([*ready, *(vm for vm in spares if vm.state is VmState.STARTING)]), None)

    def _assign(self, vm: Vm, wish: Wish) -> None:
        self._waiting.pop(wish.ticket, None)
        vm.wish, vm.holder, vm.namespace = wish, wish.ticket, wish.need.namespace
        if vm.state is VmState.STARTING:  # a spare that is still on its way: it is ours as soon as it is ready
            self._tell(vm)
        elif vm.mode is VmMode.EPHEMERAL:
            self._move(vm, VmState.STARTING)
            self._say(ReseedMachine(vm_id=vm.id))
        else:
            self._hand_over(vm)

    def _hand_over(self, vm: Vm) -> None:
        assert vm.holder is not None
        self._move(vm, VmState.BUSY)
        self._say(VmAssigned(ticket=vm.holder, vm_id=vm.id))

    def _has_room(self, shape: VmShape) -> bool:
        used = sum(vm.shape.memory_mb for vm in self._vms.values())
        return len(self._vms) < self._rules.max_vms and used + shape.memory_mb <= self._rules.memory_mb

    def _make_room(self, wish: Wish) -> None:
        """End the machine that is missed least: a spare nobody wants now, else the service machine that has been free for longest."""
        idle = [vm for vm in self._vms.values() if self._is_idle(vm)]
        victim = min(idle, key=lambda vm: not vm.is_spare, default=None)
        if victim is not None:
            self._stop(victim, f"room for a job of namespace {wish.need.namespace!r}")

    def _is_idle(self, vm: Vm) -> bool:
        return vm.state is VmState.READY and vm.holder is None and not vm.is_paused and not vm.is_held

    def _start_for(self, wish: Wish) -> None:
        self._waiting.pop(wish.ticket, None)
        wish.tries += 1
        vm = self._add(wish.shape, wish.mode)
        vm.wish, vm.holder, vm.namespace, vm.labels = wish, wish.ticket, wish.need.namespace, dict(wish.need.labels)
        self._start(vm)

    def _add(self, shape: VmShape, mode: VmMode) -> Vm:
        vm = Vm(self._new_id(), shape, mode)
        self._vms[vm.id] = vm
        self._trial.discard(shape)
        return vm

    def _start(self, vm: Vm, template: str | None = None, *, warm: bool = False) -> None:
        self._tell(vm)
        self._say(StartMachine(vm_id=vm.id, shape=vm.shape, template=template, warm=warm))

    def _fill_pool(self) -> None:
        """Start one more spare, if it takes nothing from anybody who waits; one at a time, since jobs come first."""
        shape = self._wanted
        if shape is None or self._waiting or self._pool_rests or self._stopped or shape in self._broken:
            return
        spares = sum(vm.is_spare and vm.shape == shape for vm in self._vms.values())
        is_starting = any(vm.state is VmState.STARTING for vm in self._vms.values())
        if spares < self._rules.pool and not is_starting and self._has_room(shape):
            self._start(self._add(shape, VmMode.EPHEMERAL), warm=True)

    # Machines that no job asked for

    def _start_service(self, message: StartServiceVm) -> None:
        shape = shape_of(message.need)
        try:
            self._check_size(shape)
            self._check_room(shape)
        except BlixardError as error:
            self._say(Refused(ticket=message.ticket, error=error))
            return
        vm = self._add(shape, VmMode.SERVICE)
        vm.namespace, vm.labels, vm.caller = message.need.namespace, dict(message.need.labels), message.ticket
        self._start(vm)

    def _fork(self, message: SnapshotTaken) -> None:
        origin = self._vms.get(message.vm_id)
        try:
            self._check_room(message.shape)
        except BlixardError as error:
            self._say(Refused(ticket=message.ticket, error=error))
            return
        vm = self._add(message.shape, VmMode.SERVICE)
        vm.namespace = origin.namespace if origin else ""
        vm.caller, vm.is_held, vm.note = message.ticket, True, f"a copy of {message.vm_id}"
        self._start(vm, message.name)

    def _check_room(self, shape: VmShape) -> None:
        if self._stopped:
            raise VmUnavailable(self._stopped)
        if not self._has_room(shape):
            raise Unavailable(
                f"{len(self._vms)} of {self._rules.max_vms} virtual machines run, and there is no room for one more of {shape.memory_mb} MB",
                hint="wait for one to end, stop one with `blixard vm stop`, or raise vm.max_vms and vm.memory",
            )

    # Ends

    def _became_ready(self, vm: Vm) -> None:
        if vm.state is not VmState.STARTING:
            return
        vm.was_ready = True
        if vm.caller is not None:
            self._say(Answered(ticket=vm.caller, value=vm.id))
            vm.caller = None
        if vm.holder is not None:
            self._hand_over(vm)
        elif vm.retiring:
            self._stop(vm, vm.retiring)
        else:
            self._move(vm, VmState.READY)

    def _is_gone(self, vm: Vm, message: MachineGone) -> None:
        del self._vms[vm.id]
        self._say(VmRemoved(vm_id=vm.id))
        for ticket in vm.closers:
            self._say(Answered(ticket=ticket, value=message.cause))
        error = message.error or MachineLost(f"virtual machine {vm.id} ended: {message.cause}")
        if vm.caller is not None:
            self._say(Refused(ticket=vm.caller, error=error))
        wish = vm.wish
        if wish is not None and vm.state is not VmState.BUSY:  # promised, never handed over
            self._try_again(wish, vm, error)
        if vm.is_spare and message.kind is EndKind.FAILED and not vm.was_ready:
            self._pool_rests = True  # until the next job of its own asks

    def _try_again(self, wish: Wish, vm: Vm, error: BlixardError) -> None:
        """A machine that was kept ready and is dead when it is wanted costs its job nothing but time."""
        if vm.was_ready and wish.tries < MAX_TRIES and not self._stopped:
            wish.tries += 1
            self._waiting[wish.ticket] = wish
            self._waiting.move_to_end(wish.ticket, last=False)
        else:
            self._say(Refused(ticket=wish.ticket, error=error))

    def _retire(self, vm: Vm, cause: str) -> None:
        if vm.state is VmState.STOPPING:
            return
        vm.retiring = vm.retiring or cause
        if vm.state is VmState.READY and vm.holder is None:
            self._stop(vm, cause)

    def _stop_by_hand(self, message: StopVm) -> None:
        vm = self._vms.get(message.vm_id)
        if vm is None:
            self._say(Refused(ticket=message.ticket, error=VmNotFound(message.vm_id)))
            return
        vm.closers.append(message.ticket)
        self._stop(vm, message.cause)

    def _stop_all(self, message: StopRouting) -> None:
        cause = self._stopped = message.cause
        self._last_words.append(message.ticket)
        for wish in list(self._waiting.values()):
            self._refuse(wish, VmUnavailable(cause))
        for vm in self._vms.values():
            self._stop(vm, cause)

    def _stop(self, vm: Vm, cause: str) -> None:
        if vm.state is VmState.STOPPING:
            return
        if vm.wish is not None and vm.state is VmState.BUSY:
            vm.wish = None  # its holder learns of it by the lease
        vm.retiring = vm.note = cause
        self._move(vm, VmState.STOPPING)
        self._say(StopMachine(vm_id=vm.id, cause=cause))

    def _refuse(self, wish: Wish, error: BlixardError) -> None:
        self._waiting.pop(wish.ticket, None)
        self._say(Refused(ticket=wish.ticket, error=error))

    # Words

    def _move(self, vm: Vm, state: VmState) -> None:
        vm.state = state
        if state is VmState.READY:  # last in the books: free for the shortest time
            self._vms[vm.id] = self._vms.pop(vm.id)
        self._tell(vm)

    def _tell(self, vm: Vm) -> None:
        shown = VmState.PAUSED if vm.is_paused and vm.state in {VmState.READY, VmState.BUSY} else vm.state
        self._say(
            VmStateChanged(
                vm_id=vm.id,
                state=shown,
                shape=vm.shape,
                mode=vm.mode,
                namespace=vm.namespace,
                job_id=vm.wish.need.job_id if vm.wish else "",
                labels=vm.labels,
                jobs=vm.jobs,
                note=vm.note,
                is_spare=vm.is_spare,
            )
        )

    def _say(self, message: Message) -> None:
        self._out.append(message)

    def books(self) -> Iterator[Vm]:
        """For tests: every machine that holds a permit."""
        return iter(self._vms.values())

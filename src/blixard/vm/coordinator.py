"""Owns every task of the VM layer and carries every message between its parts; nothing calls round it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import msgspec

from blixard.domain.ids import new_id
from blixard.domain.vm import VmHealth, VmState, VmStats, VmView
from blixard.errors import BlixardError, VmNotFound, VmUnavailable, WrongPhase
from blixard.vm.channels import COMMANDS, EVENTS, Channel
from blixard.vm.messages import (
    AbandonRoute,
    Answered,
    Asking,
    CheckNow,
    CircuitBreakerClosed,
    CircuitBreakerHalfOpened,
    CircuitBreakerOpened,
    EndKind,
    HealthCheckFailed,
    HealthCheckPassed,
    IdleVmDetected,
    MachineGone,
    MachinePaused,
    MachineReady,
    MachineResumed,
    MeasureMachine,
    MemoryMeasured,
    Message,
    PauseVm,
    PingMachine,
    PrepareShape,
    ReachVm,
    Refused,
    ReseedMachine,
    ResumeVm,
    ReturnVm,
    RouteJob,
    SnapshotTaken,
    SnapshotVm,
    StartMachine,
    StartServiceVm,
    StopMachine,
    StopRouting,
    StopVm,
    Tick,
    VmAssigned,
    VmDegraded,
    VmRecovered,
    VmRemoved,
    VmShouldRecycle,
    VmStateChanged,
    VmUnhealthy,
)

TICK_SECONDS = 1.0
MAX_EVENTS = 1_000
"""Kept for whoever asks what has happened."""
KILL_SECONDS = 10.0
"""For machines that are killed to be gone."""
STOPPING = "the VM manager stops"
logger = logging.getLogger(__name__)


class Clock(Protocol):
    def now(self) -> int:
        """Microseconds since 1970."""

    def monotonic(self) -> float:
        """Seconds that never jump."""


class Part(Protocol):
    def handle(self, message: Message) -> list[Message]:
        """Take one message in and return what follows from it. Never waits."""


class Name(enum.StrEnum):
    ROUTER = "router"
    POOL = "pool"
    HEALTH = "health"
    MONITOR = "monitor"


_ALL_BOOKS = (Name.HEALTH, Name.MONITOR)
READERS: dict[type[Message], tuple[Name, ...]] = {
    **dict.fromkeys((RouteJob, AbandonRoute, ReturnVm, StartServiceVm, StopVm, StopRouting), (Name.ROUTER,)),
    **dict.fromkeys((StartMachine, ReseedMachine, StopMachine, PingMachine, MeasureMachine), (Name.POOL,)),
    **dict.fromkeys((VmAssigned, PauseVm, ResumeVm, SnapshotVm, ReachVm, PrepareShape), (Name.POOL,)),
    CheckNow: (Name.HEALTH,),
    Tick: (*_ALL_BOOKS, Name.ROUTER),
    VmStateChanged: _ALL_BOOKS,
    VmRemoved: _ALL_BOOKS,
    MachineReady: (Name.HEALTH, Name.ROUTER),
    MachineGone: (Name.HEALTH, Name.ROUTER),
    **dict.fromkeys((MachinePaused, MachineResumed, SnapshotTaken), (Name.ROUTER,)),
    **dict.fromkeys((HealthCheckPassed, HealthCheckFailed), (Name.HEALTH,)),
    **dict.fromkeys((VmDegraded, VmRecovered, VmUnhealthy, VmShouldRecycle, IdleVmDetected), (Name.ROUTER,)),
    **dict.fromkeys((CircuitBreakerOpened, CircuitBreakerHalfOpened, CircuitBreakerClosed), (Name.ROUTER,)),
    MemoryMeasured: (Name.MONITOR,),
}
"""Who hears what."""
TOLD = (
    MachineReady,
    MachineGone,
    MachinePaused,
    MachineResumed,
    SnapshotTaken,
    VmAssigned,
    VmDegraded,
    VmRecovered,
    VmUnhealthy,
    VmShouldRecycle,
    IdleVmDetected,
    CircuitBreakerOpened,
    CircuitBreakerHalfOpened,
    CircuitBreakerClosed,
)
"""Events that a person may want to hear of."""


class VmEvent(msgspec.Struct, frozen=True, kw_only=True):
    """``at``: microseconds since 1970. ``details``: the fields of the message."""

    at: int
    type: str
    details: dict[str, str]


class Phase(enum.Enum):
    CREATED = enum.auto()
    RUNNING = enum.auto()
    STOPPING = enum.auto()
    STOPPED = enum.auto()


class VmCoordinator:
    """``make_parts`` is called once, when the tasks start, with the ways to emit a message and to start an owned task."""

    def __init__(self, clock: Clock, limit: int, make_parts: MakeParts) -> None:
        self.phase = Phase.CREATED
        self.views: dict[str, VmView] = {}
        """The machines as the messages tell of them: what everybody but the router reads."""
        self.events: deque[VmEvent] = deque(maxlen=MAX_EVENTS)
        self._clock = clock
        self._limit = limit
        self._make_parts = make_parts
        self._commands: Channel[Message] = Channel("commands", COMMANDS)
        self._inbox: Channel[Message] = Channel("events", EVENTS)
        self._channels: dict[Name, Channel[Message]] = {name: Channel(name, EVENTS) for name in Name}
        self._waiting: dict[str, asyncio.Future[object]] = {}
        self._routes: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()  # Any: tasks of all results
        self._main: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._started = 0
        self._failed = 0

    def start_background_tasks(self) -> None:
        """Start the tasks of all parts. Raises ``WrongPhase`` if they were started before."""
        if self.phase is not Phase.CREATED:
            raise WrongPhase(f"the VM manager is {self.phase.name.lower()} and cannot be started")
        self.phase = Phase.RUNNING
        self._main = asyncio.get_running_loop().create_task(self._run(), name="VM coordinator")

    async def ask(self, make: Callable[[str], Asking]) -> object:
        """Send a command, made with a new ticket, and return its answer. Cancelling the call gives up what was asked for.

        Raises what the answer says, ``WrongPhase`` before ``start_background_tasks``, ``VmUnavailable`` once it stops.
        """
        if self.phase is Phase.CREATED:
            raise WrongPhase("the VM manager is used before start_background_tasks()")
        self._check_alive()
        message, answer = self._expect(make)
        try:
            await self._commands.send(message)
            return await answer
        except WrongPhase as error:
            raise VmUnavailable(STOPPING) from error
        except asyncio.CancelledError:
            self._give_up(message)
            raise
        finally:
            self._waiting.pop(message.ticket, None)

    async def tell(self, make: Callable[[str], Asking]) -> object:
        """As ``ask``, for what gives something back: it is on its way before this first waits, also while everything stops."""
        if self.phase in {Phase.CREATED, Phase.STOPPED} or self._failure is not None:
            return None  # there is nothing left that could be given back
        message, answer = self._expect(make)
        self._post(message)
        try:
            return await answer
        finally:
            self._waiting.pop(message.ticket, None)

    def _expect(self, make: Callable[[str], Asking]) -> tuple[Asking, asyncio.Future[object]]:
        message = make(new_id("ticket"))
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._waiting[message.ticket] = answer
        return message, answer

    async def shutdown(self, seconds: float) -> None:
        """End every machine in order, then every task; kill what has not ended within ``seconds``. Allowed before start and twice."""
        if self._main is None:
            self.phase = Phase.STOPPED
            return
        if self.phase is Phase.RUNNING:
            self.phase = Phase.STOPPING
            self._commands.close()
            try:
                async with asyncio.timeout(seconds):
                    await self.tell(lambda ticket: StopRouting(ticket=ticket, cause=STOPPING))
            except TimeoutError:
                logger.warning("virtual machines did not end within %g s; they are killed", seconds)
            except VmUnavailable:
                logger.debug("the VM manager had ended by itself")
            finally:
                self._main.cancel()
        await asyncio.wait([self._main], timeout=KILL_SECONDS)
        if not self._main.done():
            logger.error("these tasks of the VM manager do not end: %s", sorted(t.get_name() for t in self._tasks))
        self.phase = Phase.STOPPED

    def stats(self) -> VmStats:
        by_state: dict[VmState, int] = {}
        for view in self.views.values():
            by_state[view.state] = by_state.get(view.state, 0) + 1
        waiting = len(self._routes)
        total = len(self.views)
        return VmStats(
            limit=self._limit,
            total=total,
            waiting=waiting,
            by_state=by_state,
            started=self._started,
            failed=self._failed,
        )

    def view(self, vm_id: str) -> VmView:
        """Raises ``VmNotFound``."""
        if vm_id not in self.views:
            raise VmNotFound(vm_id)
        return self.views[vm_id]

    def note(self, event_type: str, details: dict[str, str]) -> None:
        self.events.append(VmEvent(at=self._clock.now(), type=event_type, details=details))

    # Tasks

    async def _run(self) -> None:
        try:
            parts = self._make_parts(self._post, self._spawn)
            for name in READERS[Tick]:  # before anything else: what they measure starts now, not when the clock began
                self._channels[name].post(Tick(at=self._clock.monotonic()))
            async with asyncio.TaskGroup() as self._group:
                self._spawn(self._read(self._commands), "read commands")
                self._spawn(self._read(self._inbox), "read events")
                for name, part in parts.items():
                    self._spawn(self._serve(part, self._channels[name]), f"VM {name}")
                self._spawn(self._tick(), "VM clock")
        except Exception as error:  # the edge of the VM layer: its machines are ended, and every call says why
            self._failure = error
            logger.exception("the VM manager broke; its machines were ended")
        finally:
            self._close_channels()
            self._fail_all(VmUnavailable("the VM manager has ended"))

    def _spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:  # Any: tasks of all results
        task = self._group.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _read(self, channel: Channel[Message]) -> None:
        while (message := await channel.receive()) is not None:
            self._carry(message)

    async def _serve(self, part: Part, channel: Channel[Message]) -> None:
        while (message := await channel.receive()) is not None:
            for follows in part.handle(message):
                self._post(follows)

    async def _tick(self) -> None:
        while True:
            self._post(Tick(at=self._clock.monotonic()))
            await asyncio.sleep(TICK_SECONDS)

    def _close_channels(self) -> None:
        for channel in (self._commands, self._inbox, *self._channels.values()):
            channel.close()

    # Messages

    def _post(self, message: Message) -> None:
        with contextlib.suppress(WrongPhase):  # tasks that end while everything stops have nobody left to tell
            self._inbox.post(message)

    def _carry(self, message: Message) -> None:
        if isinstance(message, Answered | Refused):
            self._answer(message)
            return
        if isinstance(message, RouteJob) and message.ticket not in self._waiting:
            return  # given up before it was read
        self._write_down(message)
        for reader in READERS[type(message)]:
            self._channels[reader].post(message)

    def _answer(self, message: Answered | Refused) -> None:
        self._routes.discard(message.ticket)
        future = self._waiting.get(message.ticket)
        if future is None or future.done():
            return
        if isinstance(message, Answered):
            future.set_result(message.value)
        else:
            future.set_exception(message.error)

    def _give_up(self, message: Asking) -> None:
        """Whoever asked for a machine is gone; the machine may be on its way, or the request not yet read."""
        if isinstance(message, RouteJob):
            self._post(AbandonRoute(ticket=message.ticket))

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise VmUnavailable(f"the VM manager broke: {self._failure!r}")
        if self.phase is not Phase.RUNNING:
            raise VmUnavailable(STOPPING)

    def _fail_all(self, error: BlixardError) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    # The books that everybody reads

    def _write_down(self, message: Message) -> None:
        match message:
            case RouteJob(ticket=ticket):
                self._routes.add(ticket)
            case AbandonRoute(ticket=ticket):
                self._routes.discard(ticket)
            case VmStateChanged():
                self._see(message)
            case MachineReady(vm_id=vm_id):
                self._change(vm_id, health=VmHealth.HEALTHY)
            case MemoryMeasured(vm_id=vm_id, private_memory=size):
                self._change(vm_id, private_memory=size)
            case VmDegraded(vm_id=vm_id):
                self._change(vm_id, health=VmHealth.DEGRADED)
            case VmRecovered(vm_id=vm_id):
                self._change(vm_id, health=VmHealth.HEALTHY)
            case VmUnhealthy(vm_id=vm_id):
                self._change(vm_id, health=VmHealth.UNHEALTHY)
            case VmRemoved(vm_id=vm_id):
                self.views.pop(vm_id, None)
            case MachineGone(kind=kind):
                self._failed += kind is EndKind.FAILED
        if isinstance(message, TOLD):
            self._tell(message)

    def _see(self, message: VmStateChanged) -> None:
        known = self.views.get(message.vm_id)
        self._started += known is None
        shape = message.shape
        self.views[message.vm_id] = VmView(
            id=message.vm_id,
            state=message.state,
            mode=message.mode,
            namespace=message.namespace,
            job_id=message.job_id,
            image=shape.image,
            memory_mb=shape.memory_mb,
            vcpus=shape.vcpus,
            network=shape.network,
            labels=message.labels,
            jobs=message.jobs,
            note=message.note,
            created_at=known.created_at if known else self._clock.now(),
            health=known.health if known else VmHealth.UNKNOWN,
            private_memory=known.private_memory if known else 0,
        )

    def _change(self, vm_id: str, **fields: object) -> None:
        if vm_id in self.views:
            self.views[vm_id] = msgspec.structs.replace(self.views[vm_id], **fields)

    def _tell(self, message: Message) -> None:
        fields = {name: str(getattr(message, name)) for name in message.__struct_fields__}
        self.note(type(message).__name__, fields)
        logger.debug("%s %s", type(message).__name__, fields)


MakeParts = Callable[
    [Callable[[Message], None], Callable[[Coroutine[Any, Any, Any], str], asyncio.Task[Any]]], dict[Name, Part]
]
"""From ``emit`` and ``spawn`` to the four parts."""

"""The machines themselves: started, kept, handed over, ended. A permit is held from before a machine starts until nothing of it is left."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from blixard.errors import BlixardError, Conflict, InternalError, LimitExceeded, MachineLost, NotFound, VmNotFound
from blixard.vm.agent_link import GuestNetwork, fresh_identity
from blixard.vm.hypervisor.contract import Hypervisor, Machine, Template
from blixard.vm.lease import VmLease
from blixard.vm.messages import (
    Answered,
    EndKind,
    HealthCheckFailed,
    HealthCheckPassed,
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
    SnapshotTaken,
    SnapshotVm,
    StartMachine,
    StopMachine,
    VmAssigned,
)
from blixard.vm.policy import VmShape
from blixard.vm.templates import Connect, Spawn, TemplateShelf

if TYPE_CHECKING:
    from blixard.vm.agent_link import AgentLink

RESEED_SECONDS = 20.0
CAUSE_SECONDS = 0.5
"""When the link breaks first: how long the machine's own end, which has the better cause, is waited for."""
MAX_SNAPSHOTS = 20
GUEST_NETWORK = GuestNetwork(address="10.0.2.15/24", gateway="10.0.2.2", dns="10.0.2.3")
"""What user-mode networking gives to every guest."""
T = TypeVar("T")
logger = logging.getLogger(__name__)


class _Stopped(Exception):
    """It was told to stop before it was ready."""


class Guest:
    """One machine and the link to its agent, from the order to start it until nothing is left."""

    def __init__(self, order: StartMachine, directory: Path) -> None:
        self.id = order.vm_id
        self.shape = order.shape
        self.template = order.template
        self.is_to_warm = order.warm
        self.directory = directory
        self.machine: Machine | None = None
        self.link: AgentLink | None = None
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stopping = asyncio.Event()
        self.stop_cause = ""
        self.is_ready = False

    def stop(self, cause: str) -> None:
        if not self.stopping.is_set():
            self.stop_cause = cause
            self.stopping.set()
            self.lose(cause)

    def lose(self, cause: str) -> None:
        if not self.lost.done():
            self.lost.set_result(cause)

    def living(self) -> tuple[Machine, AgentLink]:
        """Return machine and link. Raises ``Conflict`` before it is ready, ``MachineLost`` afterwards."""
        if self.lost.done():
            raise MachineLost(f"virtual machine {self.id} ends: {self.lost.result()}")
        if self.machine is None or self.link is None or not self.is_ready:
            raise Conflict(f"virtual machine {self.id!r} is still starting")
        return self.machine, self.link


class Lease:
    """A ``VmLease``. ``ticket`` tells one job's hold of a service machine from the next one's."""

    def __init__(self, ticket: str, guest: Guest, link: AgentLink) -> None:
        self.ticket = ticket
        self.id = guest.id
        self.link = link
        self.lost = guest.lost


WarmUp = Callable[[VmLease], Awaitable[None]]


class Permits:
    """Counts machines; what the router decides is checked here once more, where they are started."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held: set[str] = set()
        self.most = 0
        """The largest number ever held at once."""

    def take(self, vm_id: str) -> None:
        if len(self.held) >= self.limit:
            raise InternalError(f"virtual machine {vm_id} would be number {self.limit + 1} of {self.limit}")
        self.held.add(vm_id)
        self.most = max(self.most, len(self.held))

    def give_back(self, vm_id: str) -> None:
        self.held.discard(vm_id)


class VmPool:
    """Does what the router has decided, each machine in a task of its own. Tasks belong to whoever gave ``spawn``.

    ``runtime`` is this manager's own directory; each machine has one below it.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        shelf: TemplateShelf,
        runtime: Path,
        *,
        limit: int,
        start_timeout: float,
        connect: Connect,
        emit: Callable[[Message], None],
        spawn: Spawn,
        warm_up: WarmUp | None = None,
    ) -> None:
        self._warm_up = warm_up
        self._hypervisor = hypervisor
        self._shelf = shelf
        self._runtime = runtime
        self._start_timeout = start_timeout
        self._connect = connect
        self._emit = emit
        self._spawn = spawn
        self._guests: dict[str, Guest] = {}
        self._snapshots: dict[str, tuple[Template, VmShape]] = {}
        self._snapshots_made = 0
        self.permits = Permits(limit)

    def handle(self, message: Message) -> list[Message]:
        """Begin what is asked for; the answer comes by ``emit``."""
        match message:
            case StartMachine():
                self._start(message)
            case StopMachine(vm_id=vm_id, cause=cause) if guest := self._guests.get(vm_id):
                guest.stop(cause)
            case ReseedMachine(vm_id=vm_id) if guest := self._guests.get(vm_id):
                self._spawn(self._reseed_again(guest), f"reseed {vm_id}")
            case PingMachine(vm_id=vm_id) if guest := self._guests.get(vm_id):
                self._spawn(self._ping(guest, message.timeout), f"ping {vm_id}")
            case MeasureMachine(vm_id=vm_id) if guest := self._guests.get(vm_id):
                return self._measure(guest)
            case VmAssigned() | ReachVm() | PauseVm() | ResumeVm() | SnapshotVm() | PrepareShape():
                return self._answer(message)
        return []

    @property
    def is_empty(self) -> bool:
        return not self._guests

    # Calls that have an answer

    def _answer(self, message: VmAssigned | ReachVm | PauseVm | ResumeVm | SnapshotVm | PrepareShape) -> list[Message]:
        match message:
            case VmAssigned() | ReachVm():
                return [self._hand_over(message)]
            case PauseVm() | ResumeVm():
                work: Coroutine[object, object, None] = self._pause_or_resume(message)
            case SnapshotVm():
                work = self._snapshot(message)
            case PrepareShape():
                work = self._prepare(message)
        self._spawn(self._refusing(message.ticket, work), f"{type(message).__name__} {message.ticket}")
        return []

    async def _refusing(self, ticket: str, work: Coroutine[object, object, None]) -> None:
        try:
            await work
        except BlixardError as error:
            self._emit(Refused(ticket=ticket, error=error))
        except OSError as error:
            self._emit(Refused(ticket=ticket, error=MachineLost(str(error))))

    def _hand_over(self, message: VmAssigned | ReachVm) -> Message:
        try:
            guest = self._find(message.vm_id)
            _, link = guest.living()
        except BlixardError as error:
            lost = MachineLost(str(error)) if isinstance(message, VmAssigned) else error
            return Refused(ticket=message.ticket, error=lost)
        value = link if isinstance(message, ReachVm) else Lease(message.ticket, guest, link)
        return Answered(ticket=message.ticket, value=value)

    def _find(self, vm_id: str) -> Guest:
        guest = self._guests.get(vm_id)
        if guest is None:
            raise VmNotFound(vm_id)
        return guest

    async def _pause_or_resume(self, message: PauseVm | ResumeVm) -> None:
        guest = self._find(message.vm_id)
        machine, _ = guest.living()
        if isinstance(message, PauseVm):
            await machine.pause()
            self._emit(MachinePaused(ticket=message.ticket, vm_id=guest.id))
        else:
            await machine.resume()
            self._emit(MachineResumed(ticket=message.ticket, vm_id=guest.id))

    async def _snapshot(self, message: SnapshotVm) -> None:
        name, shape = message.vm_id, None
        if message.then_fork and name in self._snapshots:
            shape = self._snapshots[name][1]
        else:
            name, shape = await self._save(self._find(message.vm_id))
        self._emit(
            SnapshotTaken(
                ticket=message.ticket, vm_id=message.vm_id, name=name, shape=shape, then_fork=message.then_fork
            )
        )
        if not message.then_fork:
            self._emit(Answered(ticket=message.ticket, value=name))

    async def _save(self, guest: Guest) -> tuple[str, VmShape]:
        machine, _ = guest.living()
        if len(self._snapshots) >= MAX_SNAPSHOTS:
            raise LimitExceeded(
                f"there are {MAX_SNAPSHOTS} snapshots already (MAX_SNAPSHOTS)", hint="they go with their worker"
            )
        self._snapshots_made += 1
        name = f"{guest.id}.{self._snapshots_made}"
        template = await self._hypervisor.snapshot(machine, self._runtime / f"snapshot-{name}")
        self._snapshots[name] = (template, guest.shape)
        return name, guest.shape

    async def _prepare(self, message: PrepareShape) -> None:
        template = await self._shelf.get(message.shape)
        self._emit(Answered(ticket=message.ticket, value=template))

    # One machine's life

    def _start(self, order: StartMachine) -> None:
        self.permits.take(order.vm_id)
        guest = self._guests[order.vm_id] = Guest(order, self._runtime / order.vm_id)
        self._spawn(self._live(guest), f"machine {order.vm_id}")

    async def _live(self, guest: Guest) -> None:
        kind, cause, error = EndKind.FAILED, "it was abandoned", None
        try:
            await self._unless_stopped(guest, self._begin(guest))
            guest.is_ready = True
            self._emit(MachineReady(vm_id=guest.id))
            cause = await self._until_end(guest)
            kind = EndKind.STOPPED if guest.stopping.is_set() else EndKind.FAILED
        except _Stopped:
            kind, cause = EndKind.STOPPED, guest.stop_cause
        except (BlixardError, OSError) as failure:
            cause, error = str(failure), _as_blixard(failure)
        except Exception as failure:  # the edge of one machine: a bug that one shows must not end the others
            logger.exception("machine %s broke", guest.id)
            cause, error = repr(failure), InternalError(f"starting a virtual machine failed: {failure!r}")
        finally:
            guest.lose(cause)
            await self._end(guest)
        self._emit(MachineGone(vm_id=guest.id, kind=kind, cause=cause, error=error))

    async def _unless_stopped(self, guest: Guest, work: Coroutine[Any, Any, T]) -> T:  # Any: whatever it awaits
        """Await ``work``, which an order to stop ends. Raises ``_Stopped``."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(guest.stopping.wait())
        try:
            await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Stopped
            return task.result()
        finally:
            for each in (task, stopping):
                each.cancel()
            await asyncio.gather(task, stopping, return_exceptions=True)

    async def _begin(self, guest: Guest) -> None:
        """Clone, connect, reseed. What was begun is found in ``guest`` and ended by ``_end``, whatever happens."""
        guest.directory.mkdir(mode=0o700)
        template = await self._template_of(guest)
        try:
            async with asyncio.timeout(self._start_timeout):
                guest.machine = await self._clone(guest, template)
                guest.link = await self._connect(guest.machine, self._start_timeout)
                await self._reseed(guest)
                if guest.is_to_warm and self._warm_up is not None:
                    await self._warm_up(Lease("", guest, guest.link))
        except TimeoutError as error:
            raise MachineLost(f"it was not ready within {self._start_timeout:g} s") from error

    async def _clone(self, guest: Guest, template: Template) -> Machine:
        try:
            return await self._hypervisor.clone(guest.id, template, guest.directory)
        except NotFound:  # somebody removed it, or it has rotted: it is made anew, once
            if guest.template:
                raise
            self._shelf.forget(template)
            return await self._hypervisor.clone(guest.id, await self._shelf.get(guest.shape), guest.directory)

    async def _template_of(self, guest: Guest) -> Template:
        return self._snapshots[guest.template][0] if guest.template else await self._shelf.get(guest.shape)

    async def _reseed(self, guest: Guest) -> None:
        assert guest.link is not None
        await guest.link.reseed(
            fresh_identity(guest.id, GUEST_NETWORK if guest.shape.network else None), RESEED_SECONDS
        )

    async def _reseed_again(self, guest: Guest) -> None:
        try:
            guest.living()
            await self._reseed(guest)
        except BlixardError as error:
            guest.stop(f"it was kept ready and does not answer: {error}")
            return
        self._emit(MachineReady(vm_id=guest.id))

    async def _until_end(self, guest: Guest) -> str:
        """Return the cause once the machine is told to stop, ends, or its agent is lost."""
        assert guest.machine is not None
        assert guest.link is not None
        gone = asyncio.ensure_future(guest.machine.wait())
        stopping = asyncio.ensure_future(guest.stopping.wait())
        ends: list[asyncio.Future[Any]] = [gone, stopping, guest.link.lost]  # Any: futures of all results
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                return guest.stop_cause
            await asyncio.wait([gone], timeout=CAUSE_SECONDS)
            return gone.result() if gone.done() else guest.link.lost.result()
        finally:
            for task in (gone, stopping):
                task.cancel()
            await asyncio.gather(gone, stopping, return_exceptions=True)

    async def _end(self, guest: Guest) -> None:
        try:
            if guest.link is not None:
                await guest.link.close()
            if guest.machine is not None:
                await guest.machine.destroy()
        finally:
            shutil.rmtree(guest.directory, ignore_errors=True)
            self._guests.pop(guest.id, None)
            self.permits.give_back(guest.id)

    # Watching

    async def _ping(self, guest: Guest, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            _, link = guest.living()
            await link.ping(seconds)
        except BlixardError as error:
            self._emit(HealthCheckFailed(vm_id=guest.id, cause=str(error)))
            return
        self._emit(HealthCheckPassed(vm_id=guest.id, seconds=loop.time() - began))

    def _measure(self, guest: Guest) -> list[Message]:
        if guest.machine is None:
            return []
        return [MemoryMeasured(vm_id=guest.id, private_memory=guest.machine.private_memory())]


def _as_blixard(error: BlixardError | OSError) -> BlixardError:
    return error if isinstance(error, BlixardError) else MachineLost(f"the machine could not be started: {error}")

"""The facade of the VM layer. All it does is turn calls into messages to the coordinator."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, cast

import msgspec

from blixard.domain.ids import new_id
from blixard.domain.requirements import VmMode
from blixard.domain.vm import VmHealth, VmState, VmStats, VmView
from blixard.errors import Conflict, InternalError, WrongPhase
from blixard.vm.agent_link import connect as connect_agent
from blixard.vm.control import ControlServer
from blixard.vm.coordinator import Clock, Name, Part, Phase, VmCoordinator, VmEvent
from blixard.vm.health import HealthChecker
from blixard.vm.hypervisor.contract import Hypervisor, HypervisorInfo, Machine, Template
from blixard.vm.lease import DEFAULT_IMAGE, VmLease, VmNeed
from blixard.vm.messages import (
    CheckNow,
    Message,
    PauseVm,
    PrepareShape,
    ReachVm,
    ResumeVm,
    ReturnVm,
    RouteJob,
    SnapshotVm,
    StartServiceVm,
    StopVm,
)
from blixard.vm.monitor import ResourceMonitor
from blixard.vm.owner import CONTROL, OwnerDirectory, end_the_dead
from blixard.vm.policy import VmManagerConfig, shape_of
from blixard.vm.pool import Lease, VmPool, WarmUp
from blixard.vm.router import VmRouter
from blixard.vm.templates import Connect, ImageSource, TemplateShelf

if TYPE_CHECKING:
    from pathlib import Path

    from blixard.vm.agent_link import AgentLink


async def _connect(machine: Machine, seconds: float) -> AgentLink:
    return await connect_agent(machine.open_agent, seconds)


class VmManager:
    """Keeps virtual machines for the jobs of one process. Follows ``VmLeaser``. All methods belong on one event loop.

    Nothing boots before the first job, ``prepare`` or ``start_service_vms``. Machines die with this process; what a killed
    one has left is ended by the next manager that starts on the same directory. ``warm_up`` runs a job that does nothing in a
    machine that is to be kept ready.
    """

    def __init__(
        self,
        config: VmManagerConfig,
        hypervisor: Hypervisor,
        images: ImageSource,
        clock: Clock,
        *,
        connect: Connect = _connect,
        warm_up: WarmUp | None = None,
    ) -> None:
        self._warm_up = warm_up
        self.config = config
        self._hypervisor = hypervisor
        self._images = images
        self._connect = connect
        self._owner: OwnerDirectory | None = None
        self._control: ControlServer | None = None
        self._pool: VmPool | None = None
        self._starting: asyncio.Lock = asyncio.Lock()
        self._is_shut = False
        self._coordinator = VmCoordinator(clock, config.routing.max_vms, self._make_parts)

    @property
    def phase(self) -> Phase:
        return self._coordinator.phase

    @property
    def directory(self) -> Path:
        """Return the runtime directory of this manager. Raises ``WrongPhase`` before ``start``."""
        if self._owner is None:
            raise WrongPhase("the VM manager has no runtime directory before start()")
        return self._owner.path

    def info(self) -> HypervisorInfo:
        """Return what this host allows; may take seconds the first time."""
        return self._hypervisor.info()

    # Life

    async def start(self) -> None:
        """End what dead managers have left, then begin: runtime directory, tasks, control socket. Boots nothing.

        Calling it twice is harmless. Raises ``WrongPhase`` after ``shutdown``, ``OSError`` when the directory cannot be written.
        """
        async with self._starting:
            if self._is_shut:
                raise WrongPhase("the VM manager has stopped and cannot be started again")
            if self._owner is not None:
                return
            await self.recover_vms()
            self._owner = await asyncio.to_thread(OwnerDirectory.create, self._run, f"process {os.getpid()}")
            self.start_background_tasks()
            self._control = ControlServer(self, self._owner.path / CONTROL)
            await self._control.start()

    def start_background_tasks(self) -> None:
        """Start the coordinator's tasks; ``start`` does it. Raises ``WrongPhase`` when they run, or before there is a directory."""
        if self._owner is None:
            raise WrongPhase("start_background_tasks() needs the runtime directory that start() makes")
        self._coordinator.start_background_tasks()

    async def shutdown(self) -> None:
        """Refuse new jobs, end all machines, then all tasks, within ``shutdown_timeout``; nothing is left then.

        Allowed before ``start``, during it, and twice.
        """
        self._is_shut = True
        async with self._starting:
            if self._control is not None:
                await self._control.stop()
            await self._coordinator.shutdown(self.config.shutdown_timeout)
            self._hypervisor.close()
            if self._owner is not None:
                await asyncio.to_thread(self._owner.remove)

    async def recover_vms(self) -> int:
        """End the machines of managers that died and remove their files; return how many managers there were."""
        return await asyncio.to_thread(end_the_dead, self._run, self._hypervisor)

    async def start_service_vms(self) -> list[str]:
        """Start the configured number of service machines and return their ids once all are ready."""
        need = self.default_need(mode=VmMode.SERVICE)
        return list(await asyncio.gather(*(self.start_vm(need) for _ in range(self.config.service_vms))))

    async def prepare(self, need: VmNeed | None = None) -> Template:
        """Make the image and the template that this need calls for, if they are not there yet, so that its first job is quick."""
        shape = shape_of(need or self.default_need())
        return cast("Template", await self._coordinator.ask(lambda ticket: PrepareShape(ticket=ticket, shape=shape)))

    def default_need(self, *, mode: VmMode = VmMode.EPHEMERAL) -> VmNeed:
        """Return the need of a job that asks for nothing in particular."""
        config = self.config
        return VmNeed(
            namespace=config.namespace, memory_mb=config.memory_mb, image=config.image, vcpus=config.vcpus, mode=mode
        )

    # Jobs

    async def acquire(self, need: VmNeed, *, vm_id: str | None = None) -> VmLease:
        """See ``VmLeaser``. ``vm_id``: this service machine and no other; ``Conflict`` if it is not free."""
        if need.image == DEFAULT_IMAGE:
            need = msgspec.structs.replace(need, image=self.config.image)
        lease = await self._coordinator.ask(lambda ticket: RouteJob(ticket=ticket, need=need, vm_id=vm_id))
        return cast("Lease", lease)

    async def release(self, lease: VmLease, *, broken: bool) -> None:
        """See ``VmLeaser``."""
        if not isinstance(lease, Lease):
            raise InternalError("a lease is released that this manager has not given")
        await self._coordinator.tell(lambda ticket: ReturnVm(ticket=ticket, lease=lease.ticket, broken=broken))

    # Machines

    async def start_vm(self, need: VmNeed) -> str:
        """Start a service machine for the need's namespace; return its id when it is ready. Raises ``Unavailable`` without room."""
        return cast("str", await self._ask(lambda ticket: StartServiceVm(ticket=ticket, need=need)))

    async def stop_vm(self, vm_id: str, *, cause: str = "stopped by hand") -> None:
        """End it, whatever it runs; its job's attempt is lost with this cause. Returns when nothing is left. Raises ``VmNotFound``."""
        await self._ask(lambda ticket: StopVm(ticket=ticket, vm_id=vm_id, cause=cause))

    async def pause_vm(self, vm_id: str) -> None:
        """Stop its processors. A job's timeout goes on. Raises ``VmNotFound``, ``Conflict``, ``MachineLost``."""
        await self._ask(lambda ticket: PauseVm(ticket=ticket, vm_id=vm_id))

    async def resume_vm(self, vm_id: str) -> None:
        await self._ask(lambda ticket: ResumeVm(ticket=ticket, vm_id=vm_id))

    async def snapshot_vm(self, vm_id: str) -> str:
        """Save a copy of the machine as it is; return its name. It is kept as long as this manager lives."""
        return cast("str", await self._ask(lambda ticket: SnapshotVm(ticket=ticket, vm_id=vm_id)))

    async def fork_vm(self, source: str) -> str:
        """Start a copy of a machine or a snapshot, held for a person: no job gets it. Return its id when it is ready."""
        return cast("str", await self._ask(lambda ticket: SnapshotVm(ticket=ticket, vm_id=source, then_fork=True)))

    async def reach_vm(self, vm_id: str) -> AgentLink:
        """Return the link to a machine's agent, for a program beside its job. Raises ``VmNotFound``, ``Conflict``, ``MachineLost``."""
        if self.get_vm(vm_id).state is VmState.PAUSED:
            raise Conflict(f"virtual machine {vm_id!r} is paused", hint=f"let it go on: `blixard vm resume {vm_id}`")
        return cast("AgentLink", await self._ask(lambda ticket: ReachVm(ticket=ticket, vm_id=vm_id)))

    async def check_vm(self, vm_id: str) -> VmHealth:
        """Ping it now and return how it is. Raises ``VmNotFound``."""
        return cast("VmHealth", await self._ask(lambda ticket: CheckNow(ticket=ticket, vm_id=vm_id)))

    # Looking

    def get_vm(self, vm_id: str) -> VmView:
        """Raises ``VmNotFound``."""
        return self._coordinator.view(vm_id)

    def list_vms(self, *states: VmState) -> list[VmView]:
        """Return the machines in these states, all without any, oldest first."""
        found = [view for view in self._coordinator.views.values() if not states or view.state in states]
        return sorted(found, key=lambda view: (view.created_at, view.id))

    def stats(self) -> VmStats:
        return self._coordinator.stats()

    def events(self) -> list[VmEvent]:
        """Return what has happened, oldest first, as far back as is kept."""
        return list(self._coordinator.events)

    def note_event(self, event_type: str, details: dict[str, str]) -> None:
        """Add to the events."""
        self._coordinator.note(event_type, details)

    @property
    def most_permits(self) -> int:
        """The largest number of machines that there ever were at once."""
        return self._pool.permits.most if self._pool else 0

    async def _ask(self, make: Callable[[str], Any]) -> object:  # Any: one of the kinds of Asking
        return await self._coordinator.ask(make)

    @property
    def _run(self) -> Path:
        return self.config.directory / "run"

    def _make_parts(
        self, emit: Callable[[Message], None], spawn: Callable[[Coroutine[Any, Any, Any], str], asyncio.Task[Any]]
    ) -> dict[Name, Part]:
        config = self.config
        shelf = TemplateShelf(
            self._hypervisor,
            self._images,
            config.directory / "templates",
            self.directory,
            connect=self._connect,
            spawn=spawn,
            start_timeout=config.start_timeout,
        )
        self._pool = VmPool(
            self._hypervisor,
            shelf,
            self.directory,
            limit=config.routing.max_vms,
            start_timeout=config.start_timeout,
            connect=self._connect,
            emit=emit,
            spawn=spawn,
            warm_up=self._warm_up,
        )
        return {
            Name.ROUTER: VmRouter(config.routing, lambda: new_id("vm")),
            Name.POOL: self._pool,
            Name.HEALTH: HealthChecker(config.health),
            Name.MONITOR: ResourceMonitor(config.monitor, config.routing),
        }

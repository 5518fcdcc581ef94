"""Virtual machines as the rest of Blixard sees them. There may be none: then every call says so, or what that means."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blixard.domain.requirements import VmMode
from blixard.domain.vm import VmHealth, VmState, VmStats, VmView
from blixard.errors import VmNotFound, VmUnavailable

if TYPE_CHECKING:
    from blixard.backends.contract import Execution, ExecutionBackend, ExecutionObserver
    from blixard.domain.outcome import Outcome
    from blixard.vm.lease import VmLease, VmLeaser, VmNeed
    from blixard.vm.manager import VmManager

MakeBackend = Callable[["VmLeaser"], "ExecutionBackend"]


class VmService:
    """A front of one ``VmManager``, or of none: then calls raise ``VmUnavailable``, but those whose answer is None, 0 or False.

    ``make_backend`` returns what runs jobs on the machines of a leaser; it is started and stopped with this service.
    """

    def __init__(
        self, vm_manager: VmManager | None, make_backend: MakeBackend | None = None, *, reason: str = ""
    ) -> None:
        self._manager = vm_manager
        self._make_backend = make_backend
        self._backend: ExecutionBackend | None = None
        self.reason = reason
        """Why there is no manager, for a person."""

    @classmethod
    def unavailable(cls, reason: str = "") -> VmService:
        """Return the service of a process without virtual machines."""
        return cls(None, reason=reason)

    def is_available(self) -> bool:
        return self._manager is not None

    @property
    def vm_manager(self) -> VmManager:
        if self._manager is None:
            raise VmUnavailable(hint=self.reason or None)
        return self._manager

    # Life

    async def start(self) -> None:
        """Start the manager; nothing boots yet. Raises ``OSError`` when its directory cannot be written."""
        await self.vm_manager.start()

    async def shutdown(self) -> None:
        """End what runs and every machine. Allowed twice."""
        manager = self.vm_manager
        if self._backend is not None:
            await self._backend.stop()
        await manager.shutdown()

    async def recover_vms(self) -> int:
        """End the machines of managers that died on this directory; return how many managers there were."""
        return await self.vm_manager.recover_vms()

    # Machines

    async def create_and_start_vm(self, need: VmNeed) -> VmView:
        """Start a service machine and return it ready."""
        manager = self.vm_manager
        return manager.get_vm(await manager.start_vm(need))

    async def start_vm(self, need: VmNeed) -> VmView:
        """Do as ``create_and_start_vm``."""
        return await self.create_and_start_vm(need)

    async def stop_vm(self, vm_id: str) -> None:
        """End a machine, whatever it runs. Raises ``VmNotFound``."""
        await self.vm_manager.stop_vm(vm_id)

    async def destroy_vm(self, vm_id: str) -> None:
        """Do as ``stop_vm``: nothing is left of a machine that was stopped."""
        await self.stop_vm(vm_id)

    def get_vm(self, vm_id: str) -> VmView | None:
        try:
            return self.vm_manager.get_vm(vm_id)
        except VmNotFound:
            return None

    def list_all_vms(self) -> list[VmView]:
        return self.vm_manager.list_vms()

    def list_vms_by_state(self, state: VmState) -> list[VmView]:
        return self.vm_manager.list_vms(state)

    def list_running_vms(self) -> list[VmView]:
        return self.vm_manager.list_vms(VmState.READY, VmState.BUSY, VmState.PAUSED)

    def get_stats(self) -> VmStats:
        return self.vm_manager.stats()

    async def is_vm_healthy(self, vm_id: str) -> bool:
        """Ask it now. Raises ``VmNotFound``."""
        return await self.vm_manager.check_vm(vm_id) is VmHealth.HEALTHY

    def get_vm_state(self, vm_id: str) -> VmState:
        """Raises ``VmNotFound``."""
        return self.vm_manager.get_vm(vm_id).state

    async def update_vm_state(self, vm_id: str, state: VmState) -> None:
        """Bring a machine into a state that a person may ask for: paused, going on, or stopping. Raises ``ValueError`` for others."""
        manager = self.vm_manager
        match state:
            case VmState.PAUSED:
                await manager.pause_vm(vm_id)
            case VmState.READY | VmState.BUSY:
                await manager.resume_vm(vm_id)
            case VmState.STOPPING:
                await manager.stop_vm(vm_id)
            case _:
                raise ValueError(f"a virtual machine cannot be made {state}")

    def log_vm_event(self, vm_id: str, event_type: str, details: dict[str, str] | None = None) -> None:
        self.vm_manager.note_event(event_type, {"vm_id": vm_id, **(details or {})})

    # Jobs

    async def execute_job(self, execution: Execution, observer: ExecutionObserver) -> Outcome:
        """Run a job on a machine that the router chooses, to its end, and return how it ended."""
        return await (await self._own_backend()).execute(execution, observer)

    async def submit_job(self, execution: Execution, observer: ExecutionObserver) -> Outcome:
        """Do as ``execute_job``: an outcome is only ever that of a job that has ended."""
        return await self.execute_job(execution, observer)

    async def execute_job_on_vm(self, vm_id: str, execution: Execution, observer: ExecutionObserver) -> Outcome:
        """Run a job on this service machine. Raises ``VmNotFound``, ``Conflict`` when it is not free or belongs to another namespace."""
        manager = self.vm_manager
        if self._make_backend is None:
            raise VmUnavailable("this VM service was made without a backend for jobs")
        backend = self._make_backend(OneVm(manager, vm_id))
        await backend.start()
        try:
            return await backend.execute(execution, observer)
        finally:
            await backend.stop()

    async def _own_backend(self) -> ExecutionBackend:
        manager = self.vm_manager
        if self._backend is None:
            if self._make_backend is None:
                raise VmUnavailable("this VM service was made without a backend for jobs")
            self._backend = self._make_backend(manager)
            await self._backend.start()
        return self._backend

    # What has an answer without a manager, too

    def get_available_service_vm(self, namespace: str) -> VmView | None:
        """Return a service machine of the namespace that runs nothing."""
        found = self._ready()
        return next((vm for vm in found if vm.mode is VmMode.SERVICE and vm.namespace == namespace), None)

    def find_idle_vm(self, memory_mb: int = 0, vcpus: int = 1) -> VmView | None:
        """Return a machine of at least this size that runs nothing."""
        return next((vm for vm in self._ready() if vm.memory_mb >= memory_mb and vm.vcpus >= vcpus), None)

    def registry(self) -> dict[str, VmView] | None:
        """Return the machines by id."""
        return {vm.id: vm for vm in self._manager.list_vms()} if self._manager else None

    def count_all(self) -> int:
        return len(self._manager.list_vms()) if self._manager else 0

    def count_by_state(self, state: VmState) -> int:
        return len(self._manager.list_vms(state)) if self._manager else 0

    def _ready(self) -> list[VmView]:
        return self._manager.list_vms(VmState.READY) if self._manager else []


class OneVm:
    """A ``VmLeaser`` that leases one machine and no other."""

    def __init__(self, manager: VmManager, vm_id: str) -> None:
        self._manager = manager
        self._vm_id = vm_id

    async def acquire(self, need: VmNeed) -> VmLease:
        return await self._manager.acquire(need, vm_id=self._vm_id)

    async def release(self, lease: VmLease, *, broken: bool) -> None:
        await self._manager.release(lease, broken=broken)

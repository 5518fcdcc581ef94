"""The one place where the outer parts are made: production's here, the tests' in ``blixard.testing.infrastructure``."""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from blixard.backends.contract import BackendSettings, ExecutionBackend
from blixard.backends.slots import Slots
from blixard.domain.limits import MIB
from blixard.domain.requirements import Isolation, WorkerType
from blixard.domain.worker import WorkerOffer
from blixard.errors import NotSupportedHere, VmUnavailable
from blixard.services.clock import Clock, SystemClock
from blixard.services.control_plane import ControlPlane, ControlPlaneConfig, build_control_plane
from blixard.services.maintenance.loop import MaintenanceConfig
from blixard.services.maintenance.promoter import PromoterConfig
from blixard.services.maintenance.pruner import PrunerConfig
from blixard.storage.blobs import BlobStore, open_blob_store
from blixard.storage.database import Database
from blixard.storage.logs import LocalLogStore, LogStore
from blixard.storage.sqlite import SqliteDatabase
from blixard.worker.gateway import WorkerGateway
from blixard.worker.home import WorkerHome
from blixard.worker.options import WorkerOptions
from blixard.worker.session import BackendTable
from blixard.worker.worker import MicroVmWorker, ProcessWorker, WasmWorker, Worker

if TYPE_CHECKING:
    from blixard.client.contract import AsyncClient
    from blixard.config.settings import Settings
    from blixard.services.vms import VmService
    from blixard.vm.manager import VmManager
    from blixard.vm.policy import VmManagerConfig

WORKER_TYPES = (WorkerType.PROCESS, WorkerType.WASM, WorkerType.MICROVM)
logger = logging.getLogger(__name__)


class InfrastructureFactory(Protocol):
    """Makes each outer part from the settings. Nothing is opened or started yet, and nothing else constructs these parts."""

    def create_clock(self) -> Clock: ...
    def create_database(self) -> Database: ...
    def create_blob_store(self) -> BlobStore: ...
    def create_log_store(self) -> LogStore: ...
    def create_control_plane(self) -> ControlPlane: ...

    def create_backends(self, worker_type: WorkerType, settings: BackendSettings) -> dict[Isolation, ExecutionBackend]:
        """Return what runs jobs of this worker type at each isolation that it can have."""

    def missing_for_vms(self) -> str:
        """Return why no virtual machine can run here and what to do about it; empty if one can. Boots nothing."""

    def create_vm_manager(self) -> VmManager:
        """Raises ``VmUnavailable`` where no virtual machine can run, or none is wanted."""

    def create_vm_service(self) -> VmService:
        """Return the service of a manager of its own, or one that is unavailable and says why."""

    def create_home(self, *, is_local: bool) -> WorkerHome:
        """Make the private directory and lock of a worker process. ``is_local``: its control plane is on this data directory."""

    def create_worker(
        self,
        gateway: WorkerGateway,
        home: WorkerHome,
        *,
        worker_types: Sequence[WorkerType] = (),
        submitter: str | None = None,
        vm_manager: VmManager | None = None,
    ) -> Worker:
        """Return a ``ProcessWorker``, a ``WasmWorker``, a ``MicroVmWorker``, or for several types one worker with all of them.

        ``vm_manager`` is one that the caller starts and stops; without it the worker has its own.
        Without ``worker_types`` those of the settings, or all that this host can run. Raises ``NotSupportedHere`` for a type
        that was asked for and that the host cannot run at any isolation.
        """

    def create_client(self) -> AsyncClient: ...


class ProductionInfrastructureFactory:
    """The real parts: SQLite, blobs and logs in the data directory, this host's backends."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def data_dir(self) -> Path:
        return self.settings.storage.data_dir

    def create_clock(self) -> Clock:
        return SystemClock()

    def create_database(self) -> Database:
        return SqliteDatabase(self.data_dir / "blixard.db")

    def create_blob_store(self) -> BlobStore:
        return open_blob_store(self.settings.storage.blob_url or self.data_dir / "blobs")

    def create_log_store(self) -> LogStore:
        return LocalLogStore(self.data_dir / "logs")

    def create_control_plane(self) -> ControlPlane:
        settings = self.settings
        config = ControlPlaneConfig(
            data_dir=self.data_dir,
            minimum_isolation=Isolation(settings.sandbox.minimum_isolation),
            lease_seconds=settings.leases.duration,
            maintenance=MaintenanceConfig(
                interval=settings.maintenance.interval, prune_interval=settings.maintenance.prune_interval
            ),
            promoter=PromoterConfig(step=settings.maintenance.batch),
            pruner=PrunerConfig(
                completed_retention=settings.storage.completed_retention,
                failed_retention=settings.storage.failed_retention,
                events_retention=settings.storage.events_retention,
                step=settings.maintenance.batch,
            ),
        )
        return build_control_plane(
            self.create_database(), self.create_blob_store(), self.create_log_store(), config, self.create_clock()
        )

    def create_backends(self, worker_type: WorkerType, settings: BackendSettings) -> dict[Isolation, ExecutionBackend]:
        # Imported when needed: a client that only submits never pays for a Wasm compiler.
        if worker_type is WorkerType.WASM:
            from blixard.backends.wasm.backend import WasmBackend

            wasm = WasmBackend(settings)
            return {Isolation.MINIMAL: wasm, Isolation.STANDARD: wasm}
        if worker_type is WorkerType.PROCESS:
            from blixard.backends.process import ProcessBackend
            from blixard.backends.sandbox.backend import SandboxBackend

            return {Isolation.MINIMAL: ProcessBackend(settings), Isolation.STANDARD: SandboxBackend(settings)}
        return self._vm_backends(settings, None)

    def missing_for_vms(self) -> str:
        return find_missing_for_vms(self.settings)

    def create_vm_manager(self, *, pool: int | None = None) -> VmManager:
        from blixard.backends.microvm.warmup import warm_up
        from blixard.vm.hypervisor.qemu import QemuHypervisor
        from blixard.vm.image.store import ImageStore
        from blixard.vm.image_source import GuestImages
        from blixard.vm.manager import VmManager

        config = vm_manager_config(self.settings)
        if pool is not None:
            config = msgspec.structs.replace(config, routing=msgspec.structs.replace(config.routing, pool=pool))
        if reason := self.missing_for_vms():
            raise VmUnavailable(hint=reason)
        hypervisor = QemuHypervisor(config.directory, share_memory=self.settings.vm.share_memory)
        images = GuestImages(ImageStore(config.directory / "images"))
        warming = self._vm_settings(BackendSettings(scratch=config.directory / "scratch"))
        return VmManager(config, hypervisor, images, self.create_clock(), warm_up=lambda lease: warm_up(lease, warming))

    def create_vm_service(self) -> VmService:
        from blixard.backends.microvm import MicroVmBackend
        from blixard.services.vms import VmService

        try:
            manager = self.create_vm_manager()
        except VmUnavailable as error:
            logger.warning("%s: %s", error.message, error.hint)
            return VmService.unavailable(error.hint or "")
        scratch = manager.config.directory / "scratch"
        return VmService(manager, lambda vms: MicroVmBackend(self._vm_settings(BackendSettings(scratch=scratch)), vms))

    def _vm_backends(
        self, settings: BackendSettings, vm_manager: VmManager | None, *, pool: int | None = None
    ) -> dict[Isolation, ExecutionBackend]:
        from blixard.backends.microvm import MicroVmBackend
        from blixard.worker.microvm import VM_ISOLATIONS, AbsentVmBackend, OwnedVmBackend

        settings = self._vm_settings(settings)
        backend: ExecutionBackend
        try:
            backend = (
                MicroVmBackend(settings, vm_manager)
                if vm_manager is not None
                else OwnedVmBackend(settings, self.create_vm_manager(pool=pool))
            )
        except VmUnavailable as error:
            logger.info("no jobs at isolation maximum here: %s", error.hint)
            backend = AbsentVmBackend(error.hint or error.message)
        return dict.fromkeys(VM_ISOLATIONS, backend)

    def _vm_settings(self, settings: BackendSettings) -> BackendSettings:
        """The default size is that of the machine: its job has what the guest itself leaves."""
        from blixard.backends.microvm.plan import GUEST_MEMORY_MB

        return msgspec.structs.replace(settings, memory_mb=self.settings.vm.default_memory // MIB - GUEST_MEMORY_MB)

    def create_home(self, *, is_local: bool) -> WorkerHome:
        return WorkerHome.create(self.data_dir / "scratch", self.data_dir / "sessions" if is_local else None)

    def create_worker(
        self,
        gateway: WorkerGateway,
        home: WorkerHome,
        *,
        worker_types: Sequence[WorkerType] = (),
        submitter: str | None = None,
        vm_manager: VmManager | None = None,
    ) -> Worker:
        asked = tuple(worker_types) or tuple(WorkerType(name) for name in self.settings.worker.types)
        settings = self._backend_settings(home)
        backends = {type_: self.create_backends(type_, settings) for type_ in asked or WORKER_TYPES}
        if WorkerType.MICROVM in backends and (vm_manager is not None or submitter is not None):
            # What one command has submitted is soon done: machines kept ready would cost it more than they give.
            backends[WorkerType.MICROVM] = self._vm_backends(settings, vm_manager, pool=0)
        for type_ in asked:
            _check_usable(type_, backends[type_])
        return assemble_worker(gateway, home, backends, self._options(submitter), self.create_clock())

    def create_client(self) -> AsyncClient:
        from blixard.client.opening import open_client

        return open_client(self.settings)

    def _backend_settings(self, home: WorkerHome) -> BackendSettings:
        sandbox = self.settings.sandbox
        return BackendSettings(
            scratch=home.directory,
            slots=self._slots(),
            shared_slots=Slots(self._slots()),
            lock_fd=home.lock.fd,
            grace_seconds=self.settings.worker.grace,
            memory_mb=sandbox.memory // MIB,
            processes=sandbox.processes,
            disk_mb=sandbox.disk // MIB,
            open_files=sandbox.open_files,
            wasm_fuel=self.settings.wasm.fuel or None,
            wasm_cache=self.data_dir / "wasm-cache",
            wasm_cache_bytes=self.settings.wasm.cache_size,
        )

    def _slots(self) -> int:
        return self.settings.worker.slots or os.cpu_count() or 1

    def _options(self, submitter: str | None) -> WorkerOptions:
        worker = self.settings.worker
        offer = WorkerOffer(
            capabilities={},
            queues=worker.queues,
            labels=worker.labels,
            cpus=worker.cpus or float(os.cpu_count() or 1),
            memory_mb=(worker.memory or _machine_memory()) // MIB,
            slots=self._slots(),
            submitter=submitter,
        )
        return WorkerOptions(
            name=worker.name or f"{socket.gethostname()}-{os.getpid()}",
            offer=offer,
            prefetch=worker.prefetch,
            grace_seconds=self.settings.server.shutdown_grace,
            interpreter=f"Python {platform.python_version()} in {sys.prefix}",
        )


def assemble_worker(
    gateway: WorkerGateway,
    home: WorkerHome,
    backends: dict[WorkerType, dict[Isolation, ExecutionBackend]],
    options: WorkerOptions,
    clock: Clock,
) -> Worker:
    """Return the worker of these backends: of its own class for one type, a plain one with all capabilities for several."""
    if set(backends) == {WorkerType.PROCESS}:
        by_isolation = backends[WorkerType.PROCESS]
        return ProcessWorker(
            gateway,
            minimal=by_isolation[Isolation.MINIMAL],
            standard=by_isolation[Isolation.STANDARD],
            options=options,
            clock=clock,
            home=home,
        )
    if set(backends) == {WorkerType.WASM}:
        wasm = backends[WorkerType.WASM][Isolation.MINIMAL]
        return WasmWorker(gateway, wasm=wasm, options=options, clock=clock, home=home)
    if set(backends) == {WorkerType.MICROVM}:
        vm = backends[WorkerType.MICROVM][Isolation.MAXIMUM]
        manager = getattr(vm, "manager", None)
        return MicroVmWorker(gateway, vm=vm, options=options, clock=clock, home=home, vm_manager=manager)
    table: BackendTable = {
        (type_, isolation): backend
        for type_, by_isolation in backends.items()
        for isolation, backend in by_isolation.items()
    }
    return Worker(gateway, table, options, clock, home)


def _check_usable(worker_type: WorkerType, backends: dict[Isolation, ExecutionBackend]) -> None:
    if any(isolation in backend.info().isolations for isolation, backend in backends.items()):
        return
    missing = sorted({text for b in backends.values() for text in b.info().missing.values()})
    raise NotSupportedHere(
        f"worker.types asks for {worker_type}, which this host cannot run: {'; '.join(missing) or 'no reason known'}",
        hint="`blixard doctor` says what is missing; leave the type out to run the others",
    )


def vm_manager_config(settings: Settings) -> VmManagerConfig:
    """Return what the settings say about virtual machines."""
    from blixard.vm.policy import HealthRules, MonitorRules, RoutingRules, VmManagerConfig

    vm = settings.vm
    return VmManagerConfig(
        directory=vm.directory or settings.storage.data_dir / "vm",
        routing=RoutingRules(
            max_vms=vm.max_vms,
            memory_mb=min(vm.memory, _machine_memory()) // MIB,
            pool=vm.pool,
            auto_create=vm.auto_create,
            prefer_service=vm.prefer_service,
            max_jobs_per_vm=vm.max_jobs_per_vm,
            max_uptime=vm.max_uptime,
            idle_shutdown=vm.idle_shutdown,
        ),
        health=HealthRules(
            interval=vm.health_interval,
            timeout=vm.health_timeout,
            failure_threshold=vm.failure_threshold,
            recovery_threshold=vm.recovery_threshold,
            breaker_threshold=vm.breaker_threshold,
            breaker_seconds=vm.breaker_time,
        ),
        monitor=MonitorRules(memory_share=vm.memory_share),
        image=vm.image,
        memory_mb=vm.default_memory // MIB,
        service_vms=vm.service_vms,
        start_timeout=vm.start_timeout,
        shutdown_timeout=vm.shutdown_timeout,
    )


def find_missing_for_vms(settings: Settings) -> str:
    """Return why no virtual machine can run here and what to do about it; empty if one can. Looks for files only, boots nothing."""
    from blixard.vm.image.store import ImageStore
    from blixard.vm.setup import describe_missing, list_missing

    config = vm_manager_config(settings)
    if settings.vm.skip:
        return "they are switched off: unset SKIP_VM_MANAGER, or vm.skip in the configuration"
    is_built = config.image in ImageStore(config.directory / "images").names()
    missing = [finding for finding in list_missing() if not (is_built and finding.builds)]
    if missing:
        names = ", ".join(finding.name for finding in missing)
        return f"this host lacks {names}; `blixard vm setup` installs what it can, or: {describe_missing(missing)}"
    there = next(place for place in (config.directory, *config.directory.parents) if place.exists())
    return "" if os.access(there, os.W_OK) else f"{there} cannot be written: set vm.directory to another place"


def _machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

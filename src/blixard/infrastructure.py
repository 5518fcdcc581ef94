"""The one place where the outer parts are made: production's here, the tests' in ``blixard.testing.infrastructure``."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from blixard.backends.contract import BackendSettings, ExecutionBackend
from blixard.backends.slots import Slots
from blixard.domain.limits import MIB
from blixard.domain.requirements import Isolation, WorkerType
from blixard.domain.worker import WorkerOffer
from blixard.errors import NotSupportedHere
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
from blixard.worker.worker import ProcessWorker, WasmWorker, Worker

if TYPE_CHECKING:
    from blixard.client.contract import AsyncClient
    from blixard.config.settings import Settings

WORKER_TYPES = (WorkerType.PROCESS, WorkerType.WASM)


class InfrastructureFactory(Protocol):
    """Makes each outer part from the settings. Nothing is opened or started yet, and nothing else constructs these parts."""

    def create_clock(self) -> Clock: ...
    def create_database(self) -> Database: ...
    def create_blob_store(self) -> BlobStore: ...
    def create_log_store(self) -> LogStore: ...
    def create_control_plane(self) -> ControlPlane: ...

    def create_backends(self, worker_type: WorkerType, settings: BackendSettings) -> dict[Isolation, ExecutionBackend]:
        """Return what runs jobs of this worker type at each isolation that it can have."""

    def create_home(self, *, is_local: bool) -> WorkerHome:
        """Make the private directory and lock of a worker process. ``is_local``: its control plane is on this data directory."""

    def create_worker(
        self,
        gateway: WorkerGateway,
        home: WorkerHome,
        *,
        worker_types: Sequence[WorkerType] = (),
        submitter: str | None = None,
    ) -> Worker:
        """Return a ``ProcessWorker``, a ``WasmWorker``, or for several types one worker with all of them.

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
        raise NotSupportedHere(
            f"this version has no {worker_type} workers", hint=f"types are {', '.join(WORKER_TYPES)}"
        )

    def create_home(self, *, is_local: bool) -> WorkerHome:
        return WorkerHome.create(self.data_dir / "scratch", self.data_dir / "sessions" if is_local else None)

    def create_worker(
        self,
        gateway: WorkerGateway,
        home: WorkerHome,
        *,
        worker_types: Sequence[WorkerType] = (),
        submitter: str | None = None,
    ) -> Worker:
        asked = tuple(worker_types) or tuple(WorkerType(name) for name in self.settings.worker.types)
        settings = self._backend_settings(home)
        backends = {type_: self.create_backends(type_, settings) for type_ in asked or WORKER_TYPES}
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


def _machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

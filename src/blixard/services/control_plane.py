"""All services on one store."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import msgspec

from blixard.domain.requirements import Isolation
from blixard.services.clock import Clock, SystemClock
from blixard.services.job_commands import JobCommandService
from blixard.services.job_logs import JobLogService
from blixard.services.job_queries import JobQueryService
from blixard.services.maintenance.adopter import Adopter
from blixard.services.maintenance.loop import Maintenance, MaintenanceConfig
from blixard.services.maintenance.promoter import Promoter, PromoterConfig
from blixard.services.maintenance.pruner import Pruner, PrunerConfig
from blixard.services.maintenance.rescuer import Rescuer, RescuerConfig
from blixard.services.placement import PlacementService
from blixard.services.signals import Signals
from blixard.services.tokens import TokenService
from blixard.services.why import WhyService
from blixard.services.workers import WorkerService
from blixard.storage.blobs import BlobStore
from blixard.storage.database import Database
from blixard.storage.logs import LogStore
from blixard.storage.repositories.batches import BatchRepository
from blixard.storage.repositories.jobs import JobRepository
from blixard.storage.repositories.leases import LeaseRepository
from blixard.storage.repositories.maintenance import MaintenanceRepository
from blixard.storage.repositories.placement import PlacementRepository
from blixard.storage.repositories.sessions import SessionRepository
from blixard.storage.repositories.tokens import TokenRepository
from blixard.storage.statements import load_statements


class ControlPlaneConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``data_dir`` None: nothing is shared with other processes, so no locks are looked at."""

    data_dir: Path | None = None
    lease_seconds: float = 10.0
    minimum_isolation: Isolation = Isolation.MINIMAL
    maintenance: MaintenanceConfig = MaintenanceConfig()
    promoter: PromoterConfig = PromoterConfig()
    pruner: PrunerConfig = PrunerConfig()


@dataclass(frozen=True)
class ControlPlane:
    """The services that share a store. ``open`` before use; ``close`` ends parked calls first."""

    database: Database
    blobs: BlobStore
    log_store: LogStore
    commands: JobCommandService
    queries: JobQueryService
    workers: WorkerService
    tokens: TokenService
    logs: JobLogService
    maintenance: Maintenance
    signals: Signals

    async def open(self) -> None:
        """Open the store and begin to watch it. Raises ``StoreUnavailable``."""
        await self.database.open()
        self.signals.start()

    async def close(self) -> None:
        """Answer what is parked, then close the store. Allowed before ``open`` and twice."""
        self.workers.poke_all()
        await self.signals.stop()
        await self.log_store.close()
        await self.database.close()


@dataclass(frozen=True)
class _Repositories:
    jobs: JobRepository
    batches: BatchRepository
    leases: LeaseRepository
    sessions: SessionRepository
    placement: PlacementRepository
    maintenance: MaintenanceRepository
    tokens: TokenRepository


def _repositories(database: Database) -> _Repositories:
    sql = load_statements(files("blixard.storage") / "sql")
    return _Repositories(
        jobs=JobRepository(database, sql),
        batches=BatchRepository(database, sql),
        leases=LeaseRepository(database, sql),
        sessions=SessionRepository(database, sql),
        placement=PlacementRepository(database, sql),
        maintenance=MaintenanceRepository(database, sql),
        tokens=TokenRepository(database, sql),
    )


def build_control_plane(
    database: Database,
    blobs: BlobStore,
    logs: LogStore,
    config: ControlPlaneConfig,
    clock: Clock | None = None,
) -> ControlPlane:
    """Wire the services; nothing is opened yet."""
    clock = clock or SystemClock()
    store = _repositories(database)
    signals = Signals(database)
    placement = PlacementService(store.placement, clock)
    why = WhyService(store.jobs, store.sessions, placement, clock)
    workers = _worker_service(store, placement, logs, signals, clock, config)
    queries = JobQueryService(store.jobs, store.batches, store.sessions, why, signals, clock)
    return ControlPlane(
        database=database,
        blobs=blobs,
        log_store=logs,
        commands=JobCommandService(
            store.jobs, store.batches, placement, blobs, clock, workers.expect, config.minimum_isolation
        ),
        queries=queries,
        workers=workers,
        tokens=TokenService(store.tokens, clock),
        logs=JobLogService(queries, logs, signals, clock),
        maintenance=_maintenance(store, blobs, logs, clock, config),
        signals=signals,
    )


def _worker_service(
    store: _Repositories,
    placement: PlacementService,
    logs: LogStore,
    signals: Signals,
    clock: Clock,
    config: ControlPlaneConfig,
) -> WorkerService:
    return WorkerService(
        store.sessions,
        store.leases,
        placement,
        logs,
        signals,
        clock,
        lease_seconds=config.lease_seconds,
        lock_directory=_below(config.data_dir, "sessions"),
    )


def _maintenance(
    store: _Repositories,
    blobs: BlobStore,
    logs: LogStore,
    clock: Clock,
    config: ControlPlaneConfig,
) -> Maintenance:
    rescuer = RescuerConfig(lease_seconds=config.lease_seconds, interval=config.maintenance.interval)
    return Maintenance(
        rescuer=Rescuer(store.sessions, store.leases, clock, rescuer, _below(config.data_dir, "sessions")),
        promoter=Promoter(store.maintenance, clock, config.promoter),
        pruner=Pruner(store.maintenance, blobs, logs, clock, config.pruner),
        adopter=Adopter(store.placement, _below(config.data_dir, "submitters")),
        clock=clock,
        config=config.maintenance,
        lock_path=_below(config.data_dir, "maintenance.lock"),
    )


def _below(data_dir: Path | None, name: str) -> Path | None:
    return None if data_dir is None else data_dir / name

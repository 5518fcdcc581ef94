"""The test twin of ``ProductionInfrastructureFactory``: SQLite and blobs in memory, a fake clock, a backend that runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blixard.backends.contract import BackendSettings, ExecutionBackend
from blixard.client.contract import AsyncClient
from blixard.client.plane_client import PlaneClient
from blixard.domain.ids import DEFAULT_NAMESPACE
from blixard.domain.requirements import Isolation, WorkerType
from blixard.domain.worker import WorkerOffer
from blixard.infrastructure import assemble_worker
from blixard.services.clock import Clock
from blixard.services.control_plane import ControlPlane, ControlPlaneConfig, build_control_plane
from blixard.storage.blobs import BlobStore
from blixard.storage.database import Database
from blixard.storage.logs import LocalLogStore, LogStore
from blixard.testing.clock import FakeClock
from blixard.testing.fake_backend import FakeBackend
from blixard.testing.storage import memory_blob_store, memory_database
from blixard.worker.gateway import WorkerGateway
from blixard.worker.home import WorkerHome
from blixard.worker.options import WorkerOptions
from blixard.worker.worker import Worker


class TestInfrastructureFactory:
    """Makes parts that need no machine. ``clock`` and ``backend`` are shared by all of them, so a test can steer them.

    ``directory`` holds job output and workers' scratch. ``create_control_plane`` returns the same one each time.
    """

    __test__ = False  # pytest collects classes named Test…

    def __init__(self, directory: Path, *, clock: Clock | None = None, backend: FakeBackend | None = None) -> None:
        self.clock = clock or FakeClock()
        self.backend = backend or FakeBackend()
        self._directory = directory
        self._plane: ControlPlane | None = None

    def create_clock(self) -> Clock:
        return self.clock

    def create_database(self) -> Database:
        return memory_database()

    def create_blob_store(self) -> BlobStore:
        return memory_blob_store()

    def create_log_store(self) -> LogStore:
        return LocalLogStore(self._directory / "logs")

    def create_control_plane(self) -> ControlPlane:
        if self._plane is None:
            self._plane = build_control_plane(
                self.create_database(),
                self.create_blob_store(),
                self.create_log_store(),
                ControlPlaneConfig(),
                self.clock,
            )
        return self._plane

    def create_backends(self, worker_type: WorkerType, settings: BackendSettings) -> dict[Isolation, ExecutionBackend]:
        del worker_type, settings
        return {Isolation.MINIMAL: self.backend, Isolation.STANDARD: self.backend}

    def create_home(self, *, is_local: bool) -> WorkerHome:
        del is_local
        return WorkerHome.create(self._directory / "scratch", None)

    def create_worker(
        self,
        gateway: WorkerGateway,
        home: WorkerHome,
        *,
        worker_types: Sequence[WorkerType] = (),
        submitter: str | None = None,
    ) -> Worker:
        settings = BackendSettings(scratch=home.directory)
        types = tuple(worker_types) or (WorkerType.PROCESS, WorkerType.WASM)
        offer = WorkerOffer(capabilities={}, slots=self.backend.slots, submitter=submitter)
        options = WorkerOptions(name="test", offer=offer)
        backends = {type_: self.create_backends(type_, settings) for type_ in types}
        return assemble_worker(gateway, home, backends, options, self.clock)

    def create_client(self) -> AsyncClient:
        """Return a client on the shared control plane, which the test opens and closes."""
        return PlaneClient(self.create_control_plane(), DEFAULT_NAMESPACE)

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
from blixard.services.vms import VmService
from blixard.storage.blobs import BlobStore
from blixard.storage.database import Database
from blixard.storage.logs import LocalLogStore, LogStore
from blixard.testing.clock import FakeClock
from blixard.testing.fake_backend import FakeBackend
from blixard.testing.fake_hypervisor import FakeHypervisor
from blixard.testing.storage import memory_blob_store, memory_database
from blixard.vm.image.guest_image import GuestImage
from blixard.vm.manager import VmManager
from blixard.vm.policy import RoutingRules, VmManagerConfig
from blixard.worker.gateway import WorkerGateway
from blixard.worker.home import WorkerHome
from blixard.worker.microvm import VM_ISOLATIONS
from blixard.worker.options import WorkerOptions
from blixard.worker.worker import Worker


class TestImages:
    """An image of any name, without files."""

    __test__ = False

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def open(self, name: str) -> GuestImage:
        return GuestImage(name=name, digest="0" * 64, directory=self._directory)


class TestInfrastructureFactory:
    """Makes parts that need no machine. ``clock`` and ``backend`` are shared by all of them, so a test can steer them.

    ``directory`` holds job output and workers' scratch. ``create_control_plane`` returns the same one each time.
    """

    __test__ = False  # pytest collects classes named Test…

    def __init__(self, directory: Path, *, clock: Clock | None = None, backend: FakeBackend | None = None) -> None:
        self.clock = clock or FakeClock()
        self.backend = backend or FakeBackend(isolations=frozenset(Isolation))
        self.hypervisor = FakeHypervisor()
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
        del settings
        levels = VM_ISOLATIONS if worker_type is WorkerType.MICROVM else (Isolation.MINIMAL, Isolation.STANDARD)
        return dict.fromkeys(levels, self.backend)

    def missing_for_vms(self) -> str:
        return ""

    def create_vm_manager(self) -> VmManager:
        """Return a manager on machines in memory: at most three of 256 MB, none kept ready."""
        config = VmManagerConfig(
            directory=self._directory / "vm", routing=RoutingRules(max_vms=3, pool=0), memory_mb=256
        )
        return VmManager(config, self.hypervisor, TestImages(self._directory), self.clock)

    def create_vm_service(self) -> VmService:
        return VmService(self.create_vm_manager(), lambda _: self.backend)

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
        vm_manager: VmManager | None = None,
    ) -> Worker:
        del vm_manager  # jobs run on the one backend, whatever they ask for
        settings = BackendSettings(scratch=home.directory)
        types = tuple(worker_types) or (WorkerType.PROCESS, WorkerType.WASM)
        offer = WorkerOffer(capabilities={}, slots=self.backend.slots, submitter=submitter)
        options = WorkerOptions(name="test", offer=offer)
        backends = {type_: self.create_backends(type_, settings) for type_ in types}
        return assemble_worker(gateway, home, backends, options, self.clock)

    def create_client(self) -> AsyncClient:
        """Return a client on the shared control plane, which the test opens and closes."""
        return PlaneClient(self.create_control_plane(), DEFAULT_NAMESPACE)

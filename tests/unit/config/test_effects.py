"""Every setting reaches the part that it steers: no key without an effect."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from blixard.backends.contract import BackendSettings, ExecutionBackend
from blixard.config.schema import all_keys
from blixard.config.settings import Settings
from blixard.domain.limits import MIB
from blixard.domain.requirements import Isolation, WorkerType
from blixard.infrastructure import ProductionInfrastructureFactory
from blixard.services.control_plane import ControlPlane, ControlPlaneConfig, build_control_plane
from blixard.telemetry import configure_logging
from blixard.testing.fake_backend import FakeBackend
from blixard.worker.local_gateway import LocalGateway
from blixard.worker.worker import WasmWorker, Worker

TESTED_ELSEWHERE = {
    "server.host": "tests/integration/test_serve.py::test_an_address_that_others_reach_needs_a_token_first",
    "server.port": "tests/integration/test_serve.py::test_a_port_in_use_is_named_with_what_to_do",
    "server.tls_certificate": "tests/integration/test_serve.py::test_it_speaks_https_with_the_files_given",
    "server.tls_key": "tests/integration/test_serve.py::test_it_speaks_https_with_the_files_given",
    "server.url": "tests/integration/test_cli_serve.py::",
    "server.token": "tests/integration/test_cli_serve.py::",
    "sandbox.minimum_isolation": "tests/unit/vm/test_vm_service.py::test_a_submitter_cannot_go_below_the_isolation_that_the_server_demands",
    "vm.skip": "tests/unit/vm/test_vm_service.py::test_without_virtual_machines_the_worker_starts_and_says_why",
    "server.request_limit": "tests/integration/test_serve.py::test_a_body_over_the_limit_of_the_settings_is_refused",
}
REACHED = {
    "server.shutdown_grace": 60.0,
    "storage.data_dir": "data",
    "storage.blob_url": "file:///",
    "storage.completed_retention": 3600.0,
    "storage.failed_retention": 7200.0,
    "storage.events_retention": 10800.0,
    "worker.slots": 3,
    "worker.types": ["wasm"],
    "worker.queues": ["a", "b"],
    "worker.labels": {"zone": "a"},
    "worker.name": "w1",
    "worker.cpus": 1.5,
    "worker.memory": 64 * MIB,
    "worker.prefetch": 7,
    "worker.grace": 0.5,
    "leases.duration": 3.0,
    "maintenance.interval": 0.1,
    "maintenance.prune_interval": 600.0,
    "maintenance.batch": 50,
    "sandbox.memory": 32 * MIB,
    "sandbox.processes": 2,
    "sandbox.disk": 2 * MIB,
    "sandbox.open_files": 64,
    "wasm.fuel": 1_000_000,
    "wasm.cache_size": 10 * MIB,
    "vm.directory": "vm",
    "vm.max_vms": 4,
    "vm.memory": 512 * MIB,
    "vm.default_memory": 256 * MIB,
    "vm.image": "data-science",
    "vm.pool": 3,
    "vm.service_vms": 2,
    "vm.auto_create": False,
    "vm.prefer_service": False,
    "vm.max_jobs_per_vm": 7,
    "vm.max_uptime": 600.0,
    "vm.memory_share": 0.5,
    "vm.idle_shutdown": 60.0,
    "vm.share_memory": False,
    "vm.health_interval": 2.0,
    "vm.health_timeout": 3.0,
    "vm.failure_threshold": 5,
    "vm.recovery_threshold": 4,
    "vm.breaker_threshold": 6,
    "vm.breaker_time": 120.0,
    "vm.start_timeout": 30.0,
    "vm.shutdown_timeout": 5.0,
    "log.level": "warning",
    "log.format": "json",
}


class Recording(ProductionInfrastructureFactory):
    """Keeps what the backends are told."""

    def create_backends(self, worker_type: WorkerType, settings: BackendSettings) -> dict[Isolation, ExecutionBackend]:
        del worker_type
        self.told = settings
        return {Isolation.MINIMAL: FakeBackend(), Isolation.STANDARD: FakeBackend()}


@pytest.fixture
def factory(tmp_path: Path) -> Recording:
    sections: dict[str, dict[str, object]] = {}
    for key, value in REACHED.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    sections["vm"] |= {"directory": str(tmp_path / "vm")}
    sections["storage"] |= {"data_dir": str(tmp_path / "data"), "blob_url": f"file://{tmp_path}/objects"}
    (tmp_path / "objects").mkdir()
    return Recording(Settings.model_validate(sections))


@pytest.fixture
def config(factory: Recording, monkeypatch: pytest.MonkeyPatch) -> ControlPlaneConfig:
    """What the services are told."""
    told: list[ControlPlaneConfig] = []

    def keep(*parts: object) -> ControlPlane:
        told.extend(part for part in parts if isinstance(part, ControlPlaneConfig))
        return build_control_plane(*parts)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr("blixard.infrastructure.build_control_plane", keep)
    factory.create_control_plane()
    return told[0]


def make_worker(factory: Recording) -> Worker:
    home = factory.create_home(is_local=False)
    try:
        return factory.create_worker(LocalGateway(factory.create_control_plane(), "default"), home)
    finally:
        home.remove()


def test_no_key_is_without_a_test_of_its_effect() -> None:
    assert {*REACHED, *TESTED_ELSEWHERE} == set(all_keys())
    for place in TESTED_ELSEWHERE.values():
        path, _, name = place.partition("::")
        assert f"def {name}" in (Path(__file__).parents[3] / path).read_text()


def test_the_services_are_told_leases_maintenance_and_retention(config: ControlPlaneConfig, tmp_path: Path) -> None:
    assert config.data_dir == tmp_path / "data"
    assert config.lease_seconds == REACHED["leases.duration"]
    assert config.maintenance.interval == REACHED["maintenance.interval"]
    assert config.maintenance.prune_interval == REACHED["maintenance.prune_interval"]
    assert config.pruner.step == config.promoter.step == REACHED["maintenance.batch"]
    assert config.pruner.completed_retention == REACHED["storage.completed_retention"]
    assert config.pruner.failed_retention == REACHED["storage.failed_retention"]
    assert config.pruner.events_retention == REACHED["storage.events_retention"]


def test_the_backends_are_told_slots_and_limits(factory: Recording, tmp_path: Path) -> None:
    make_worker(factory)
    told = factory.told
    assert told.slots == REACHED["worker.slots"]
    assert told.shared_slots is not None
    assert told.shared_slots.total == REACHED["worker.slots"]
    assert told.grace_seconds == REACHED["worker.grace"]
    assert (told.memory_mb, told.disk_mb) == (32, 2)
    assert told.processes == REACHED["sandbox.processes"]
    assert told.open_files == REACHED["sandbox.open_files"]
    assert told.wasm_fuel == REACHED["wasm.fuel"]
    assert told.wasm_cache_bytes == REACHED["wasm.cache_size"]
    assert told.wasm_cache == tmp_path / "data" / "wasm-cache"


def test_the_worker_offers_what_its_settings_say(factory: Recording) -> None:
    worker = make_worker(factory)
    offer = worker.options.offer
    assert type(worker) is WasmWorker
    assert worker.options.name == REACHED["worker.name"]
    assert worker.options.prefetch == REACHED["worker.prefetch"]
    assert worker.options.grace_seconds == REACHED["server.shutdown_grace"]
    assert (offer.queues, offer.labels) == (("a", "b"), {"zone": "a"})
    assert (offer.cpus, offer.memory_mb, offer.slots) == (1.5, 64, 3)


async def test_blobs_go_to_the_object_store_of_the_settings(factory: Recording, tmp_path: Path) -> None:
    digest = await factory.create_blob_store().put(b"content")
    assert [path.name for path in (tmp_path / "objects").rglob(digest)] == [digest]


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    structlog.reset_defaults()
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.mark.usefixtures("logging_as_before")
def test_messages_have_the_level_and_format_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    configure_logging("warning", "json")
    for logger in (structlog.get_logger("ours"), logging.getLogger("theirs")):
        logger.info("not told")
        logger.warning("told")
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [("told", "warning")] * 2
    configure_logging("info", "text")
    logging.getLogger("theirs").info("plain")
    assert "plain" in said.getvalue().splitlines()[-1]
    with pytest.raises(json.JSONDecodeError):
        json.loads(said.getvalue().splitlines()[-1])


def test_the_vm_manager_is_told_everything(factory: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "missing_for_vms", lambda: "")
    told: list[dict[str, object]] = []
    monkeypatch.setattr(
        "blixard.vm.hypervisor.qemu.QemuHypervisor.__init__", lambda _, *__, **given: told.append(given)
    )
    config = factory.create_vm_manager().config
    assert told == [{"share_memory": REACHED["vm.share_memory"]}]
    assert config.directory == tmp_path / "vm"
    assert (config.image, config.memory_mb, config.service_vms) == ("data-science", 256, 2)
    assert (config.start_timeout, config.shutdown_timeout) == (30.0, 5.0)
    routing, health = config.routing, config.health
    assert (routing.max_vms, routing.memory_mb, routing.pool) == (4, 512, 3)
    assert (routing.auto_create, routing.prefer_service) == (False, False)
    assert (routing.max_jobs_per_vm, routing.max_uptime, routing.idle_shutdown) == (7, 600.0, 60.0)
    assert (health.interval, health.timeout, health.failure_threshold) == (2.0, 3.0, 5)
    assert (health.recovery_threshold, health.breaker_threshold, health.breaker_seconds) == (4, 6, 120.0)
    assert config.monitor.memory_share == REACHED["vm.memory_share"]

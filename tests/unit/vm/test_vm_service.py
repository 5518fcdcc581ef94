"""``VmService``: what each call does without a manager, and with one; workers with and without virtual machines."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import Any  # arguments that are never looked at

import msgspec
import pytest

from blixard.backends.contract import BackendSettings, Execution, ExecutionObserver, Stream
from blixard.config.settings import Settings
from blixard.domain.job import NewJob
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import OutcomeKind
from blixard.domain.requirements import Isolation, JobRequirements, WorkerType
from blixard.domain.state_machine import JobState
from blixard.domain.vm import VmState
from blixard.errors import InvalidRequest, NotSupportedHere, VmNotFound, VmUnavailable
from blixard.infrastructure import ProductionInfrastructureFactory
from blixard.protocol.jobs import SubmitRequest
from blixard.services.control_plane import ControlPlaneConfig, build_control_plane
from blixard.services.vms import VmService
from blixard.storage.logs import LocalLogStore
from blixard.testing.clock import FakeClock
from blixard.testing.fake_backend import FakeBackend
from blixard.testing.infrastructure import TestInfrastructureFactory
from blixard.testing.storage import memory_blob_store, memory_database
from blixard.worker.local_gateway import LocalGateway
from blixard.worker.microvm import OwnedVmBackend
from blixard.worker.options import WorkerOptions
from blixard.worker.worker import MicroVmWorker, MicroVmWorkerConfig
from tests.unit.vm.rig import DEADLINE, make_config, need, running, service
from tests.unit.worker.fakes import command_spec

UNAVAILABLE = "VM manager is not available (SKIP_VM_MANAGER may be set)"
NONE: list[tuple[str, object]] = [
    ("get_available_service_vm", None),
    ("find_idle_vm", None),
    ("registry", None),
    ("count_all", 0),
    ("count_by_state", 0),
    ("is_available", False),
]
RAISING = (
    "vm_manager",
    "create_and_start_vm",
    "start_vm",
    "stop_vm",
    "destroy_vm",
    "get_vm",
    "list_all_vms",
    "list_vms_by_state",
    "list_running_vms",
    "get_stats",
    "is_vm_healthy",
    "get_vm_state",
    "execute_job",
    "execute_job_on_vm",
    "submit_job",
    "start",
    "shutdown",
    "recover_vms",
    "log_vm_event",
    "update_vm_state",
)


async def call(target: VmService, name: str) -> Any:
    """Call a method with something for each argument that it needs."""
    method = getattr(target, name)
    wanted = [p for p in inspect.signature(method).parameters.values() if p.default is inspect.Parameter.empty]
    result = method(*(VmState.READY if p.name == "state" else "x" for p in wanted))
    return await result if inspect.isawaitable(result) else result


@pytest.mark.parametrize("name", RAISING)
async def test_without_a_manager_it_says_so(name: str) -> None:
    with pytest.raises(VmUnavailable) as caught:
        await call(VmService.unavailable("no QEMU"), name)
    assert caught.value.message == UNAVAILABLE
    assert caught.value.hint == "no QEMU"


@pytest.mark.parametrize(("name", "answer"), NONE)
async def test_what_has_an_answer_without_a_manager(name: str, answer: object) -> None:
    assert await call(VmService.unavailable(), name) is answer or answer == 0


def test_no_method_is_forgotten_here() -> None:
    public = {name for name, _ in inspect.getmembers(VmService) if not name.startswith("_")}
    assert public == {*RAISING, *(name for name, _ in NONE), "unavailable"}


async def test_with_a_manager_it_tells_and_does(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        vms = VmService(rig.manager)
        assert vms.is_available()
        await vms.start()  # twice is harmless
        view = await vms.create_and_start_vm(service())
        assert vms.get_vm(view.id) == view == vms.get_available_service_vm("red") == vms.find_idle_vm(256)
        assert vms.get_available_service_vm("blue") is None
        assert vms.find_idle_vm(100_000) is None
        assert vms.list_all_vms() == vms.list_running_vms() == vms.list_vms_by_state(VmState.READY) == [view]
        assert vms.registry() == {view.id: view}
        assert (vms.count_all(), vms.count_by_state(VmState.BUSY)) == (1, 0)
        assert vms.get_stats().by_state == {VmState.READY: 1}
        assert await vms.is_vm_healthy(view.id)
        assert vms.get_vm_state(view.id) is VmState.READY
        await vms.update_vm_state(view.id, VmState.PAUSED)
        assert vms.get_vm_state(view.id) is VmState.PAUSED
        await vms.update_vm_state(view.id, VmState.READY)
        with pytest.raises(ValueError, match="starting"):
            await vms.update_vm_state(view.id, VmState.STARTING)
        vms.log_vm_event(view.id, "noted", {"why": "a test"})
        assert rig.manager.events()[-1].details == {"vm_id": view.id, "why": "a test"}
        await vms.destroy_vm(view.id)
        assert vms.get_vm(view.id) is None
        with pytest.raises(VmNotFound):
            await vms.stop_vm(view.id)
        assert await vms.recover_vms() == 0


class Deaf(ExecutionObserver):
    def started(self, at: int) -> None: ...
    def output(self, at: int, stream: Stream, data: bytes) -> None: ...


async def test_an_outcome_is_that_of_a_job_that_has_ended(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        backend = FakeBackend(isolations=frozenset(Isolation))
        vms = VmService(rig.manager, lambda _: backend)
        execution = Execution(ref=AttemptRef("red", "job_1", 1), spec=command_spec())
        for outcome in (
            await vms.execute_job(execution, Deaf()),
            await vms.submit_job(execution, Deaf()),
            await vms.execute_job_on_vm("vm_1", execution, Deaf()),
        ):
            assert outcome.kind is OutcomeKind.COMPLETED
        assert len(backend.executed) == 3


async def test_a_submitter_cannot_go_below_the_isolation_that_the_server_demands(tmp_path: Path) -> None:
    settings = Settings.model_validate({"sandbox": {"minimum_isolation": "standard"}})
    config = ControlPlaneConfig(minimum_isolation=Isolation(settings.sandbox.minimum_isolation))
    logs = LocalLogStore(tmp_path / "logs")
    plane = build_control_plane(memory_database(), memory_blob_store(), logs, config, FakeClock())
    await plane.open()
    try:
        for isolation in (Isolation.STANDARD, Isolation.MAXIMUM):
            spec = msgspec.structs.replace(command_spec(), requirements=JobRequirements(isolation=isolation))
            await plane.commands.submit("default", SubmitRequest(spec=spec, jobs=[NewJob()]))
        weak = msgspec.structs.replace(command_spec(), requirements=JobRequirements(isolation=Isolation.MINIMAL))
        for _ in range(2):  # a spec that is known is looked at, too
            with pytest.raises(InvalidRequest, match="none below standard") as caught:
                await plane.commands.submit("default", SubmitRequest(spec=weak, jobs=[NewJob()]))
            assert caught.value.field == "requirements.isolation"
    finally:
        await plane.close()


# Workers


async def test_a_worker_on_a_manager_of_somebody_else(tmp_path: Path) -> None:
    factory = TestInfrastructureFactory(tmp_path)
    plane = factory.create_control_plane()
    async with running(tmp_path) as rig:
        config = MicroVmWorkerConfig(
            gateway=LocalGateway(plane, "default"),
            home=factory.create_home(is_local=False),
            options=worker_options(),
            clock=factory.create_clock(),
            settings=BackendSettings(scratch=tmp_path / "scratch"),
            make_vm_manager=lambda: pytest.fail("a manager was given"),
        )
        worker = MicroVmWorker.with_vm_manager(config, rig.manager)
        assert worker.options.offer.capabilities == {WorkerType.MICROVM: (Isolation.STANDARD, Isolation.MAXIMUM)}
        assert await worker.start_service_vms() == []  # the settings ask for none
        lease = await rig.acquire(need())
        await rig.manager.release(lease, broken=False)


async def test_a_worker_alone_starts_its_manager_and_its_service_machines(tmp_path: Path) -> None:
    factory = TestInfrastructureFactory(tmp_path)
    plane = factory.create_control_plane()
    await plane.open()
    manager = factory.create_vm_manager()
    config = MicroVmWorkerConfig(
        gateway=LocalGateway(plane, "default"),
        home=factory.create_home(is_local=False),
        options=worker_options(),
        clock=factory.create_clock(),
        settings=BackendSettings(scratch=tmp_path / "scratch"),
        make_vm_manager=lambda: manager,
    )
    worker = MicroVmWorker.standalone(config)
    run = asyncio.create_task(worker.run())
    try:
        async with asyncio.timeout(DEADLINE):
            await worker.ready.wait()
        assert manager.directory.is_dir()
        assert worker.vm_manager is manager
    finally:
        worker.kill()
        await run
        await plane.close()
    assert list(manager.config.directory.glob("run/*")) == []


def worker_options() -> WorkerOptions:
    from blixard.domain.worker import WorkerOffer

    return WorkerOptions(name="vms", offer=WorkerOffer(capabilities={}))


async def test_both_factories_make_microvm_workers(tmp_path: Path) -> None:
    factory = TestInfrastructureFactory(tmp_path)
    plane = factory.create_control_plane()
    await plane.open()
    worker = factory.create_worker(
        LocalGateway(plane, "default"), factory.create_home(is_local=False), worker_types=[WorkerType.MICROVM]
    )
    assert type(worker) is MicroVmWorker
    run = asyncio.create_task(worker.run())
    try:
        async with asyncio.timeout(DEADLINE):
            await worker.ready.wait()
            spec = msgspec.structs.replace(command_spec(), requirements=JobRequirements(isolation=Isolation.MAXIMUM))
            client = factory.create_client()
            result = await client.result(await client.submit(spec, NewJob()))
        assert result.state is JobState.COMPLETED
    finally:
        worker.kill()
        await run
        await plane.close()
    assert factory.create_vm_service().is_available()


def test_without_virtual_machines_the_worker_starts_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings.model_validate({"vm": {"skip": True}, "storage": {"data_dir": str(tmp_path)}})
    factory = ProductionInfrastructureFactory(settings)
    assert "SKIP_VM_MANAGER" in factory.missing_for_vms()
    vms = factory.create_vm_service()
    assert not vms.is_available()
    assert "SKIP_VM_MANAGER" in vms.reason
    assert UNAVAILABLE in caplog.text
    with pytest.raises(VmUnavailable):
        factory.create_vm_manager()
    plane = factory.create_control_plane()
    home = factory.create_home(is_local=False)
    try:
        worker = factory.create_worker(LocalGateway(plane, "default"), home)
        assert WorkerType.MICROVM not in worker.options.offer.capabilities
        with pytest.raises(NotSupportedHere, match=r"microvm.*SKIP_VM_MANAGER"):
            factory.create_worker(LocalGateway(plane, "default"), home, worker_types=[WorkerType.MICROVM])
    finally:
        home.remove()


async def test_a_backend_that_owns_its_manager_ends_it(tmp_path: Path) -> None:
    from tests.unit.vm.rig import Rig

    config = msgspec.structs.replace(make_config(tmp_path), service_vms=2)
    rig = Rig(tmp_path, config)
    backend = OwnedVmBackend(BackendSettings(scratch=tmp_path / "scratch"), rig.manager)
    await backend.start()
    await rig.until(lambda: len(rig.manager.list_vms(VmState.READY)) == 2)
    await backend.stop()
    await backend.stop()
    rig.assert_nothing_left()

"""Both factories make the same kinds of parts, and the tests' one makes a whole that works."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from blixard.domain.job import NewJob
from blixard.domain.requirements import WorkerType
from blixard.domain.state_machine import JobState
from blixard.infrastructure import InfrastructureFactory
from blixard.testing.infrastructure import TestInfrastructureFactory
from blixard.worker.local_gateway import LocalGateway
from blixard.worker.worker import ProcessWorker, WasmWorker, Worker
from tests.unit.worker.fakes import DEADLINE, command_spec


@pytest.mark.parametrize(
    ("types", "expected"),
    [((WorkerType.PROCESS,), ProcessWorker), ((WorkerType.WASM,), WasmWorker), ((), Worker)],
)
async def test_a_job_runs_on_parts_that_need_no_machine(
    tmp_path: Path, types: tuple[WorkerType, ...], expected: type[Worker]
) -> None:
    factory: InfrastructureFactory = TestInfrastructureFactory(tmp_path)
    plane = factory.create_control_plane()
    await plane.open()
    worker = factory.create_worker(
        LocalGateway(plane, "default"), factory.create_home(is_local=False), worker_types=types
    )
    assert type(worker) is expected
    assert set(worker.options.offer.capabilities) == set(types or (WorkerType.PROCESS, WorkerType.WASM))
    run = asyncio.create_task(worker.run())
    try:
        async with asyncio.timeout(DEADLINE):
            await worker.ready.wait()
            if WorkerType.PROCESS in worker.options.offer.capabilities:
                client = factory.create_client()
                job = await client.submit(command_spec(), NewJob(arguments=msgspec.Raw(b'["x"]')))
                result = await client.result(job)
                assert (result.state, result.result) == (JobState.COMPLETED, msgspec.Raw(b'["x"]'))
    finally:
        worker.kill()
        await asyncio.gather(run)
        await plane.close()

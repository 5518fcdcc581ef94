"""What a worker bounds: jobs held ahead, output buffered, files kept."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blixard.backends.contract import Stream
from blixard.domain.lease import AttemptRef
from blixard.domain.payload import CommandPayload
from blixard.services.clock import SystemClock
from blixard.testing.fake_backend import FakeBackend
from blixard.worker.appetite import SILENCE_SECONDS, Appetite
from blixard.worker.local_files import LocalFiles
from blixard.worker.log_shipper import LogShipper
from tests.unit.worker.fakes import DEADLINE, FakeGateway, command_spec, running


def test_a_worker_holds_much_of_short_work_and_little_of_long_work() -> None:
    appetite = Appetite(slots=2, prefetch=200)
    assert appetite.target(0.0, 0) == 2, "nothing is known yet"
    for n in range(50):
        appetite.heard(0.0001, float(n))
    assert appetite.target(49.0, 2) == 202
    assert appetite.target(49.0 + SILENCE_SECONDS - 0.01, 2) == 202, "a busy machine"
    assert appetite.target(49.0 + SILENCE_SECONDS + 0.01, 2) < 12, "a long job"
    assert appetite.target(60.0, 2) == 2, "eleven silent seconds with running jobs"
    for n in range(50):
        appetite.heard(0.1, 60.0 + n)
    assert appetite.target(109.0, 2) in {10, 11}, "half a second of two slots"
    appetite.heard(30.0, 110.0)
    assert appetite.target(110.0, 0) == 2


async def test_output_beyond_the_buffer_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blixard.worker.log_shipper.MAX_BUFFERED_BYTES", 1000)
    gateway = FakeGateway()
    gateway.session = "s"
    shipper = LogShipper(gateway, "s", SystemClock(), None)  # type: ignore[arg-type]  # nothing expires here
    ref = AttemptRef("default", "a", 1)
    for _ in range(20):
        shipper.write(ref, 1, Stream.STDOUT, b"x" * 100)
    run = asyncio.create_task(shipper.run())
    async with asyncio.timeout(DEADLINE):
        await shipper.finish(ref)
    run.cancel()
    stored = sum(len(record.data) for batch in gateway.logs[ref] for record in batch.records)
    assert stored == 900
    assert gateway.logs[ref][-1].dropped == 2000 - stored


async def test_files_that_no_job_uses_make_room_for_new_ones(tmp_path: Path) -> None:
    gateway = FakeGateway()
    digests = [gateway.add_blob(bytes([n]) * 100) for n in range(3)]
    files = LocalFiles(gateway, tmp_path, limit=150)
    used = await files.pin(digests[:1], None)
    await files.pin(digests[1:2], None)
    files.unpin(digests[1:2])
    assert files.pin_ready(digests[1:2]) is None, "removed"
    assert files.pin_ready(digests[:1]) == used, "in use"
    await files.close()


async def test_equal_specs_are_one_object_to_backends_and_only_so_many_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blixard.worker.session.MAX_KINDS", 3)
    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend()) as rig:
        for round_ in range(2):
            for name in "abc":
                gateway.submit(f"{name}{round_}", spec=command_spec(CommandPayload(argv=(name,))))
                await gateway.until_ended(f"{name}{round_}")
        specs = [execution.spec for execution in rig.backend.executed]
        assert all(specs[n] is specs[n + 3] for n in range(3))
        gateway.submit("d", spec=command_spec(CommandPayload(argv=("d",))))
        gateway.submit("a2", spec=command_spec(CommandPayload(argv=("a",))))
        await gateway.until_ended("d", "a2")
        again = next(e.spec for e in rig.backend.executed if e.ref.job_id == "a2")
        assert again == specs[0]
        assert again is not specs[0]

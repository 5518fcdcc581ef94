"""One control plane per test, on every implementation of the store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blixard.services.control_plane import ControlPlane, ControlPlaneConfig, build_control_plane
from blixard.storage.blobs import LocalBlobStore
from blixard.storage.database import Database
from blixard.storage.hiqlite.database import HiqliteDatabase
from blixard.storage.logs import LocalLogStore
from blixard.storage.sqlite import SqliteDatabase
from blixard.testing.clock import FakeClock
from tests.cluster.addresses import make_single
from tests.conformance.services.worker import ScriptedWorker

STORES = ("sqlite-file", "sqlite-memory", "cluster")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def make_store(kind: str, directory: Path) -> Database:
    if kind == "cluster":
        return HiqliteDatabase(make_single(directory / "node"))
    return SqliteDatabase(directory / "blixard.db" if kind == "sqlite-file" else ":memory:")


@pytest.fixture(params=STORES)
async def plane(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> AsyncIterator[ControlPlane]:
    plane = build_control_plane(
        make_store(request.param, tmp_path),
        LocalBlobStore(tmp_path / "blobs"),
        LocalLogStore(tmp_path / "logs"),
        ControlPlaneConfig(data_dir=tmp_path),
        clock,
    )
    await plane.open()
    yield plane
    await plane.close()


@pytest.fixture
async def worker(plane: ControlPlane) -> ScriptedWorker:
    worker = ScriptedWorker(plane)
    await worker.register()
    return worker

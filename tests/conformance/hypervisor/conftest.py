from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conformance.hypervisor.rig import FakeRig, Machines, QemuRig, Rig


@pytest.fixture(scope="session", params=["qemu", "fake"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    directory = tmp_path_factory.mktemp("hypervisor")
    return QemuRig(directory) if request.param == "qemu" else FakeRig(directory)


@pytest.fixture
async def machines(rig: Rig, tmp_path: Path) -> AsyncIterator[Machines]:
    made = Machines(rig.hypervisor(tmp_path), rig, tmp_path)
    yield made
    await made.end()

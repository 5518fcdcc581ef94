from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from blixard.backends.contract import BackendSettings

from .harness import BackendHarness, Capability, Rig, load_harnesses

HARNESSES = load_harnesses()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires(*capabilities): runs on the harnesses that have all of these")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test runs on every harness that has what it requires; which ones lack it stands in ``BackendHarness.lacks``."""
    if "harness" not in metafunc.fixturenames:
        return
    wanted: set[Capability] = set()
    for mark in metafunc.definition.iter_markers("requires"):
        wanted.update(mark.args)
    fitting = [harness for harness in HARNESSES if wanted <= harness.capabilities]
    metafunc.parametrize("harness", fitting, ids=lambda harness: harness.name)


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory that a job which is not root inside its sandbox can reach, unlike pytest's own (mode 0700)."""
    with tempfile.TemporaryDirectory(prefix="backend-suite-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def settings(harness: BackendHarness, root: Path) -> BackendSettings:
    scratch = root / "scratch"
    scratch.mkdir(mode=0o700)
    return BackendSettings(scratch=scratch, slots=2, grace_seconds=3.0, **harness.settings)


@pytest.fixture
async def rig(harness: BackendHarness, settings: BackendSettings, root: Path) -> AsyncIterator[Rig]:
    os.environ["BLIXARD_TEST_SECRET"] = "must not be inherited"
    backend = harness.create(settings)
    await backend.start()
    try:
        yield Rig(harness, backend, root, settings)
    finally:
        await backend.stop()
        del os.environ["BLIXARD_TEST_SECRET"]

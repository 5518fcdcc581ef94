"""A store in an empty directory, and builds that need nothing of the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from blixard.vm.image.store import ImageStore
from tests.unit.vm.image.builds import Builds


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds().put_in_place(monkeypatch)

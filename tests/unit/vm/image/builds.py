"""Builds of images without Debian: the real builder and store around parts that take no time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blixard.vm.image import parts, recipe
from blixard.vm.image.builder import BuildStep
from blixard.vm.image.cpio import Entry
from blixard.vm.image.debian import BootFiles
from blixard.vm.image.spec import ImageSpec
from blixard.vm.image.tools import Tools


class Builds:
    """Stands in for what fetches and installs; ``during`` is called in the middle of the root file system."""

    def __init__(self) -> None:
        self.boots = 0
        self.roots = 0
        self.bytes = 100_000
        self.during: Callable[[Tools], None] = lambda tools: None
        self.during_boot: Callable[[Tools], None] = lambda tools: None
        self.steps: list[BuildStep] = []
        self._lock = threading.Lock()

    def fetch_boot_files(self, spec: ImageSpec, work: Path, tools: Tools) -> BootFiles:
        self.boots += 1
        self.during_boot(tools)
        modules = (Entry("modules/overlay.ko", b"module"), Entry("modules/order", b"overlay.ko\n"))
        return BootFiles(kernel=b"kernel" * 100, modules=modules, busybox=b"busybox", packages=("linux 6.1",))

    def build_root(
        self, spec: ImageSpec, work: Path, target: Path, tools: Tools, step: Callable[[str], None]
    ) -> dict[str, tuple[str, ...]]:
        self.roots += 1
        step("half")
        target.write_bytes(b"half a root")
        self.during(tools)
        target.write_bytes(spec.inputs() + b"\0" * self.bytes)
        return {"debian": ("python3 3.11",), "python": ()}

    def progress(self, step: BuildStep) -> None:
        with self._lock:
            self.steps.append(step)

    def put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> Builds:
        # Finding our own code takes a good part of a second: test_guest_code.py looks at it.
        monkeypatch.setattr(recipe, "find_guest_code", lambda: (Entry("guest/lib/start_agent.py", b"code"),))
        monkeypatch.setattr(parts, "fetch_boot_files", self.fetch_boot_files)
        monkeypatch.setattr(parts, "build_root", self.build_root)
        return self


def everything_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))

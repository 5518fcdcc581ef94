"""A command line at a fake client, in an empty directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from blixard.cli.main import run_command_line
from tests.unit.cli.fake_client import FakeClient, FakeStore, Runner


class Said(msgspec.Struct, frozen=True):
    code: int
    out: str
    err: str


class Shell:
    """Runs command lines in this process; every one gets a client of its own on the same store."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self.store = FakeStore()
        self.runner: Runner | None = None
        self.most: int | None = None
        self.clients: list[FakeClient] = []
        self.on_connect: Callable[[FakeClient], None] = lambda client: None

    @property
    def client(self) -> FakeClient:
        return self.clients[-1]

    def run(self, *arguments: str) -> Said:
        self._capture.readouterr()
        code = run_command_line(arguments, connect=lambda config: self._connect())
        out, err = self._capture.readouterr()
        return Said(code, out, err)

    def _connect(self) -> FakeClient:
        self.clients.append(FakeClient(self.store, self.runner, most=self.most))
        self.on_connect(self.client)
        return self.client


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("BLIXARD_", "CONFIG_FILE"))]:
        monkeypatch.delenv(name)
    (tmp_path / "hello.py").write_text("print('hello')\n")
    (tmp_path / "facts.py").write_text("def measure(path, *more):\n    return len(path)\n")
    (tmp_path / "tool.wasm").write_bytes(b"\0asm\x01\0\0\0rest")
    return tmp_path.resolve()


@pytest.fixture
def shell(here: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)

"""The command that starts a worker child, which both `blixard serve` and embedded clients use."""

from __future__ import annotations

import inspect
import subprocess
from pathlib import Path

from blixard.api.local_worker import LocalWorker
from blixard.worker.child import COMMAND


def test_a_package_of_our_name_in_the_current_directory_is_not_taken_for_ours(tmp_path: Path) -> None:
    assert inspect.signature(LocalWorker).parameters["command"].default == COMMAND
    shadow = tmp_path / "blixard"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("raise SystemExit('the package of the current directory')")
    ended = subprocess.run(COMMAND, input="{}\n", cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "missing required field `settings`" in ended.stderr
    assert "current directory" not in ended.stderr

"""Places that do not fit, really made so in a mount namespace: one clear error each. Needs root, or user namespaces."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.faults.plant import PATIENCE, PROGRAM

NAMESPACE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-m", "-U", "-r"]


@pytest.mark.parametrize(
    "command", ["run code1.py:f 1", "submit code1.py:f 1", "map code1.py:f list", "serve --port 0"]
)
def test_a_data_directory_that_cannot_be_written_is_one_clear_error(tmp_path: Path, command: str) -> None:
    (tmp_path / "code1.py").write_text("def f(x):\n    return x\n")
    (tmp_path / "list").write_text("1\n")
    place = tmp_path / "data"
    place.mkdir()
    script = f'mount -t tmpfs -o ro none "$1" && exec "$2" --data-dir "$1" {command}'
    words = [*NAMESPACE, "sh", "-c", script, "sh", str(place), PROGRAM]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (125, ""), done.stderr
    assert done.stderr.count("error: ") == 1
    assert f"{place} cannot be written" in done.stderr
    assert "BLIXARD_STORAGE__DATA_DIR" in done.stderr
    assert "Traceback" not in done.stderr

"""Places that do not fit, really made so in a mount namespace: one clear error each. Needs root, or user namespaces."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.faults.plant import PATIENCE, PROGRAM

NAMESPACE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-m", "-U", "-r"]


@pytest.mark.parametrize(
    "command", ["run code1.py:f 1", "submit code1.py:f 1", "map code1.py:f list", "serve --port 0", "worker"]
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


FULL = """
mount -t tmpfs -o size=3m none "$1" && "$2" --data-dir "$1" submit code1.py:f 1 >"$3" || exit 97
dd if=/dev/zero of="$1/filling" bs=1k 2>/dev/null
"$2" --data-dir "$1" submit code1.py:f 2; code=$?
rm "$1/filling"
"$2" --data-dir "$1" jobs --json >"$4" || exit 98
exit $code
"""


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "code1.py").write_text("def f(x):\n    return x\n")
    place, submitted, listed = tmp_path / "data", tmp_path / "id", tmp_path / "jobs"
    place.mkdir()
    words = [*NAMESPACE, "sh", "-c", FULL, "sh", str(place), PROGRAM, str(submitted), str(listed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=tmp_path)
    assert done.returncode == 125, done.stderr
    assert done.stderr.count("error: the disk is full") == 1
    assert "Traceback" not in done.stderr
    jobs = json.loads(listed.read_text())
    assert [job["id"] for job in jobs] == [submitted.read_text().strip()]

"""The same walls for the jobs of a worker that is not root: user namespaces alone, no cgroups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.integration.ordinary_user import CHECKOUT
from tests.integration.sandbox_attacks import ATTACKS
from tests.integration.test_sandbox_escape import facts, root

__all__ = ["facts", "root"]
UID = 12345


def run_as_user(root: Path, facts: dict[str, object]) -> dict[str, object]:
    """Run the program as an ordinary user: as ourselves if we are one, else as one that does not exist."""
    program = ["-m", "tests.integration.unprivileged_program", str(root), json.dumps(facts)]
    words = [sys.executable, *program]
    if os.geteuid() == 0:
        for path in (root, *root.rglob("*")):
            os.chown(path, UID, UID)
        words = [sys.executable, "-m", "tests.integration.ordinary_user", str(UID), *program]
    done = subprocess.run(words, capture_output=True, cwd=CHECKOUT, timeout=110, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    said: dict[str, object] = json.loads(done.stdout)
    return said


def test_a_worker_that_is_not_root_holds_its_jobs_as_well(root: Path, facts: dict[str, object]) -> None:
    said = run_as_user(root, facts)
    assert said["uid"] != 0
    for form in ("script", "command"):
        for name in ATTACKS:
            assert said[f"{form}: {name}"] == "held", (form, name)
        assert said[f"{form}: who"] == ["1000 1000", "completed"]
        assert said[f"{form}: grant"] == ["made", "completed"]
    assert said["script: memory"] == ["", "MemoryLimit"]
    assert said["command: memory"] == ["", "ExitCode"], "a command's MemoryError is its own affair"
    assert said["left"] == []
    if os.geteuid() == 0:
        assert any("memory cgroup" in str(note) for note in json.loads(json.dumps(said["notes"]))), said["notes"]

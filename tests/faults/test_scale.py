"""Long lists through `blixard map` with its progress bar: every process of ours stays small.

``BLIXARD_TEST_SCALE=full`` maps 100,000 lines at isolation minimal and 2,000 in the standard sandbox.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benches" / "scale.py"
LIMIT_MB = 300
IS_FULL = os.environ.get("BLIXARD_TEST_SCALE") == "full"
MINIMAL, STANDARD, SERVED = (100_000, 2_000, 100_000) if IS_FULL else (20_000, 200, 10_000)


@pytest.mark.timeout(1800 if IS_FULL else 300)
@pytest.mark.parametrize(
    ("option", "count", "kinds"),
    [
        ("--minimal", MINIMAL, {"command", "worker", "zygote", "executor"}),
        ("--standard", STANDARD, {"command", "worker", "zygote", "executor"}),
        ("--served", SERVED, {"command", "server", "worker", "zygote", "executor"}),
    ],
)
def test_a_long_map_stays_small(option: str, count: int, kinds: set[str]) -> None:
    given = {"--minimal": 0, "--standard": 0, "--served": 0, option: count}
    words = [str(word) for pair in given.items() for word in pair]
    ended = subprocess.run([sys.executable, str(PROGRAM), *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    found = json.loads(ended.stdout)
    print(found)
    assert found["jobs"] == count
    assert found["samples"] >= 10
    assert found["bar_updates"] >= 3, "there was no progress bar to see"
    assert set(found["rss_mb"]) >= kinds
    # A process that was measured has at least the interpreter's size.
    assert all(5 < size < LIMIT_MB for size in found["rss_mb"].values()), found

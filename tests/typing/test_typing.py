"""Both type checkers see through ``@app.job``: what is right passes, what is wrong is refused on its line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USAGE = Path(__file__).with_name("sdk_usage.py")
DEADLINE = 110.0
Found = dict[int, str]
"""Messages of errors by line."""


def expected() -> set[int]:
    lines = USAGE.read_text().splitlines()
    return {number for number, line in enumerate(lines, 1) if line.endswith("  # error")}


def run_mypy(cache: Path) -> Found:
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--show-absolute-path", "--cache-dir", str(cache)]
    done = subprocess.run(
        [*command, str(USAGE)], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.stderr == ""
    found: Found = {}
    for match in re.finditer(rf"^{re.escape(str(USAGE))}:(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        found[int(match[1])] = found.get(int(match[1]), "") + match[2]
    elsewhere = [line for line in done.stdout.splitlines() if ": error: " in line and str(USAGE) not in line]
    assert elsewhere == []
    return found


def run_pyright(directory: Path) -> Found:
    settings = {
        "include": [USAGE.name],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
        "extraPaths": [str(ROOT / "src")],
    }
    (directory / USAGE.name).write_text(USAGE.read_text())
    config = directory / "pyrightconfig.json"
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--project", str(config)]
    done = subprocess.run(
        [*command, "--pythonpath", sys.executable], capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1, done.stderr
    found: Found = {}
    for item in report["generalDiagnostics"]:
        line = item["range"]["start"]["line"] + 1
        found[line] = found.get(line, "") + item["message"]
    return found


@pytest.mark.parametrize("checker", [run_mypy, run_pyright], ids=["mypy", "pyright"])
def test_a_checker_refuses_exactly_what_is_wrong(checker: object, tmp_path: Path) -> None:
    assert callable(checker)
    found = checker(tmp_path)
    assert len(expected()) >= 10
    assert {number: found[number] for number in set(found) - expected()} == {}, "refused, but right"
    assert expected() - set(found) == set(), "passed, but wrong"

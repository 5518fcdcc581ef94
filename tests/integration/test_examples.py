"""Every program in examples/ prints what its first lines say it does, twice: the second time on what the first has left."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
DEADLINE = 100.0


def promised(example: Path) -> str:
    text = ast.get_docstring(ast.parse(example.read_text()))
    assert text is not None
    _, found, output = text.partition("Prints:\n")
    assert found, f"{example.name} does not say what it prints"
    return f"{output}\n"


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_prints_what_it_says(example: Path, tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "BLIXARD_STORAGE__DATA_DIR": str(tmp_path / "data"),
    }
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(example)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, promised(example), "")

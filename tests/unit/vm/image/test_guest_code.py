"""What of our own code goes into the guest: enough to run there, and nothing of the server."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from blixard.errors import InternalError
from blixard.vm.image.cpio import Entry
from blixard.vm.image.guest_code import LIBRARY, _imports, find_guest_code, init_script

PROGRAM = """
import sys
sys.path[:] = [path for path in sys.path if "site-packages" not in path and not path.endswith("/src")]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
before = set(sys.modules)
sys.path[:0] = [sys.argv[1]]
import blixard
sys.path += sys.argv[2:]
import blixard.vm.guest.agent
import blixard.vm.guest.runner
from blixard import *
assert blixard.__file__.startswith(sys.argv[1])
names = {name.split(".")[0] for name in set(sys.modules) - before}
print(" ".join(sorted(names - set(sys.stdlib_module_names))))
"""


@pytest.fixture(scope="module")
def code() -> tuple[Entry, ...]:
    return find_guest_code()


def test_it_is_complete(code: tuple[Entry, ...], tmp_path: Path) -> None:
    """The agent starts, and a job's module can import all of Blixard's names, with two packages and the standard library."""
    for entry in code:
        path = tmp_path / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.data or b"")
    packages = [path for path in sys.path if "site-packages" in path]
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / LIBRARY), *packages]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"blixard", "msgspec", "wasmtime", "typing_extensions"}


def test_nothing_of_the_server_is_in_it(code: tuple[Entry, ...]) -> None:
    parts = {entry.path.removeprefix(f"{LIBRARY}/blixard/").split("/")[0] for entry in code}
    assert parts.isdisjoint({"api", "cli", "config", "services", "storage", "worker"})
    assert "vm/image" not in " ".join(entry.path for entry in code)
    assert sum(len(entry.data or b"") for entry in code) < 1_000_000


def test_it_is_in_order_and_the_same_each_time(code: tuple[Entry, ...]) -> None:
    assert list(code) == sorted(code, key=lambda entry: entry.path)
    assert find_guest_code() == code
    assert f"{LIBRARY}/start_agent.py" in [entry.path for entry in code]


def test_what_only_type_checkers_read_is_left_out(tmp_path: Path) -> None:
    source = (
        "from typing import TYPE_CHECKING\nimport blixard.errors\nif TYPE_CHECKING:\n    import blixard.api\n"
        "else:\n    import blixard.domain\ndef f():\n    from blixard import sdk\n"
    )
    path = tmp_path / "module.py"
    path.write_text(source)
    ast.parse(source)
    assert _imports(path, inside_functions=True) == ["blixard.errors", "blixard.domain", "blixard", "blixard.sdk"]
    assert _imports(path, inside_functions=False) == ["blixard.errors", "blixard.domain"]


def test_relative_imports_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("from . import x\n")
    with pytest.raises(InternalError):
        _imports(path, inside_functions=True)


def test_the_init_script_is_a_script() -> None:
    assert init_script().startswith(b"#!/bin/busybox sh\n")
    subprocess.run(["sh", "-n"], input=init_script(), check=True)

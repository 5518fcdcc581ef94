"""Runs a Python program as an ordinary user, though the interpreter may lie in a directory that is closed to everybody but root.

``python -m tests.integration.ordinary_user UID PROGRAM ...``, as root. In a mount namespace of its own, the closed directories are
covered by open ones that show the interpreter, our package and the tests, and nothing else.
"""

# ruff: noqa: PTH103, PTH116 -- the calls that the kernel's rules are written in

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from blixard.backends.sandbox import kernel, layout

CHECKOUT = str(Path(__file__).resolve().parents[2])


def expose(paths: Iterable[str]) -> None:
    """Make these directories reachable for everybody, in this process and its children."""
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    trees = {path: kernel.clone_mount(os.open(path, os.O_PATH)) for path in paths}
    closed = {parent for path in trees for parent in map(str, Path(path).parents) if not os.stat(parent).st_mode & 1}
    for directory in layout.outermost(closed):
        kernel.mount("tmpfs", directory, "tmpfs", 0, "mode=755,size=1m")
    for path, tree in trees.items():
        os.makedirs(path, exist_ok=True)
        kernel.attach_mount(tree, os.open(path, os.O_PATH))


def main(uid: int, words: list[str]) -> None:
    expose(layout.outermost({*layout.interpreter_directories(), layout.package_directory(), CHECKOUT}))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.chdir(CHECKOUT)
    variables = {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/nowhere", "BLIXARD_TEST_SECRET": "secret"}
    os.execve(sys.executable, [sys.executable, *words], variables)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

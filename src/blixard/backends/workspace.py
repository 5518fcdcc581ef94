"""A job's private directories: made, filled with its inputs, emptied and removed. Runs in supervisors and executors."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from blixard.backends.zygote.messages import InputPlace

READ_ONLY = 0o444


def make_directory(path: str, names: Iterable[str]) -> None:
    """Make the directory, nobody else's, with these directories in it."""
    os.mkdir(path, 0o700)
    for name in names:
        os.mkdir(os.path.join(path, name), 0o700)


def place_inputs(directory: str, inputs: Iterable[InputPlace]) -> None:
    """Copy input files to their places below ``directory``, read-only. Copies, so that a job cannot change a blob.

    Raises ``ValueError`` for an absolute path: only a sandbox has a root of its own to put it in.
    """
    for place in inputs:
        if os.path.isabs(place.path):
            raise ValueError(
                f"the input {place.path!r} is at an absolute path, which only isolation standard can give; "
                "use a path inside the working directory"
            )
        target = os.path.join(directory, place.path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(place.source, target)
        os.chmod(target, READ_ONLY)


def empty_directory(path: str) -> None:
    """Remove all that is in the directory, following no link, whatever modes its owner gave to directories."""
    with os.scandir(path) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.path)
            else:
                os.unlink(entry.path)


def remove_tree(path: str) -> None:
    """Remove the directory and all in it. A missing one is fine."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError:
        _open_up(path)
        shutil.rmtree(path)


def _open_up(path: str) -> None:
    """Give the owner access to every directory: a job may have taken it away (``chmod 0``)."""
    os.chmod(path, stat.S_IRWXU)
    for parent, directories, _ in os.walk(path):
        for name in directories:
            child = Path(parent, name)
            if not child.is_symlink():
                child.chmod(stat.S_IRWXU)

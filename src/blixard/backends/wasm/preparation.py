"""Lays out what a guest may see: its working directory with the inputs in place, and the granted paths.

A preopen of WASI is a directory. A granted *file* therefore appears in a directory of our own that stands for its parent and holds
nothing else.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import shutil
from pathlib import Path

from blixard.backends.contract import BackendSettings, Execution
from blixard.backends.sandbox.plan import WORK, Bind, SandboxPlan
from blixard.backends.wasm.confinement import owner_of, plan_sandbox
from blixard.backends.wasm.signature import refuse
from blixard.backends.wasm.wire import Preopen
from blixard.domain.grants import Grants

SHOWN = "/shown"
"""Where a sandbox holds what the guest knows under other names; nothing of it collides with the sandbox's own places."""
STDIN = f"{SHOWN}/stdin"
MAX_PREOPENS = 256


def environment_of(execution: Execution) -> tuple[tuple[str, str], ...]:
    """Return what the spec names, and which attempt this is: nothing of ours is inherited."""
    ref = execution.ref
    own = {"BLIXARD_JOB_ID": ref.job_id, "BLIXARD_ATTEMPT": str(ref.attempt), "BLIXARD_NAMESPACE": ref.namespace}
    return tuple({**execution.spec.environment, **own}.items())


def is_plain(execution: Execution) -> bool:
    """Tell whether an empty working directory is all the job needs."""
    return not (execution.inputs or execution.spec.grants.read or execution.spec.grants.write)


def lay_out_shared(execution: Execution, private: Path) -> tuple[Preopen, ...]:
    """Fill ``private`` for a job in a shared executor. Blocks on the disk. Raises ``JobRefused``."""
    work = private / "work"
    work.mkdir(parents=True)
    shadows = _Shadows(private)
    for path, source in _inputs(execution):
        if path.startswith("/"):
            shadows.copy(path, source)
        else:
            _copy(source, work / path)
    directories = _grant_directories(execution.spec.grants, shadows)
    preopens = (*work_preopens(work), *directories, *shadows.preopens())
    _check_preopens(preopens)
    return preopens


def work_preopens(work: Path) -> tuple[Preopen, Preopen]:
    return Preopen(str(work), WORK, True), Preopen(str(work), ".", True)


def lay_out_sandbox(execution: Execution, settings: BackendSettings) -> tuple[SandboxPlan, tuple[Preopen, ...]]:
    """Plan the sandbox of a job at standard isolation. Raises ``JobRefused``."""
    binds: list[Bind] = []
    preopens = [*work_preopens(Path(WORK))]
    single: dict[str, list[tuple[str, bool]]] = {}
    for path, source in _inputs(execution):
        if path.startswith("/"):
            single.setdefault(posixpath.dirname(path), []).append((str(source), False))
            binds.append(_bind(source, _shadow_target(list(single), path), False))
        else:
            binds.append(_bind(source, posixpath.join(WORK, path), False))
    for path, writable in _granted(execution.spec.grants):
        if Path(path).is_dir():
            target = f"{SHOWN}/{len(preopens)}"
            binds.append(_bind(Path(path), target, writable))
            preopens.append(Preopen(target, path, writable))
        else:
            single.setdefault(posixpath.dirname(path), []).append((path, writable))
            binds.append(_bind(Path(path), _shadow_target(list(single), path), writable))
    for number, (parent, files) in enumerate(single.items()):
        preopens.append(Preopen(f"{SHOWN}/files{number}", parent, any(writable for _, writable in files)))
    if execution.stdin is not None:
        binds.append(_bind(execution.stdin, STDIN, False))
    _check_preopens(tuple(preopens))
    return plan_sandbox(settings, tuple(binds)), tuple(preopens)


def _shadow_target(parents: list[str], path: str) -> str:
    return f"{SHOWN}/files{parents.index(posixpath.dirname(path))}/{posixpath.basename(path)}"


def _bind(source: Path, target: str, writable: bool) -> Bind:
    real = os.path.realpath(source)
    return Bind(real, target, writable, owner_of(real))


def clear(private: Path) -> None:
    """Remove a job's directory, however deep the job has nested it. Blocks on the disk."""
    if not private.exists():
        return
    numbers = itertools.count()
    while found := list(private.iterdir()):
        for entry in found:
            if not _is_directory(entry):
                entry.unlink()
                continue
            # Each level moves up to the top: no path gets long, nothing recurses.
            for child in list(entry.iterdir()):
                if _is_directory(child):
                    child.rename(private / f".{next(numbers)}")
                else:
                    child.unlink()
            entry.rmdir()
    private.rmdir()


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _inputs(execution: Execution) -> list[tuple[str, Path]]:
    found = []
    for file in execution.inputs:
        if (source := execution.blobs.get(file.digest)) is None:
            raise refuse("InputMissing", f"the input {file.path!r} (blob {file.digest}) is not on this worker")
        found.append((file.path, source))
    return found


def _granted(grants: Grants) -> list[tuple[str, bool]]:
    """Return every granted path with whether it may be written; the wider grant wins. Raises ``JobRefused``."""
    wanted = dict.fromkeys(grants.read, False) | dict.fromkeys(grants.write, True)
    for path in wanted:
        if not Path(path).exists():
            raise refuse(
                "GrantMissing",
                f"the granted path {path} does not exist on the machine that ran the job",
                "grant a path that exists there, or send the file with --input",
            )
    return [item for item in wanted.items() if not _is_covered(*item, wanted)]


def _is_covered(path: str, writable: bool, wanted: dict[str, bool]) -> bool:
    """Tell whether a granted file lies in a granted directory anyway. Raises ``JobRefused`` if that one gives less."""
    if Path(path).is_dir():
        return False
    above = [str(parent) for parent in Path(path).parents if str(parent) in wanted]
    if writable and above and not any(wanted[parent] for parent in above):
        raise refuse(
            "GrantNotPossible",
            f"{path} is granted for writing but lies in {above[0]}, which is granted for reading only",
            "grant the directory for writing, or put the file elsewhere",
        )
    return bool(above)


def _grant_directories(grants: Grants, shadows: _Shadows) -> list[Preopen]:
    directories = []
    for path, writable in _granted(grants):
        if Path(path).is_dir():
            directories.append(Preopen(path, path, writable))
        else:
            shadows.link(path, writable)
    return directories


def _check_preopens(preopens: tuple[Preopen, ...]) -> None:
    if len(preopens) > MAX_PREOPENS:
        raise refuse(
            "TooManyGrants",
            f"the job is granted files in {len(preopens)} directories; a Wasm job can have {MAX_PREOPENS}",
            "grant a directory above them",
        )
    seen: set[str] = set()
    for preopen in preopens:
        if preopen.guest in seen:
            raise refuse(
                "GrantNotPossible",
                f"two directories would appear to the job as {preopen.guest}",
                "grant the whole directory, and give inputs a place outside of what is granted and of /work",
            )
        seen.add(preopen.guest)


class _Shadows:
    """Directories that stand for the parents of single granted files."""

    def __init__(self, private: Path) -> None:
        self._private = private
        self._places: dict[str, tuple[Path, bool]] = {}

    def copy(self, path: str, source: Path) -> None:
        """Show a copy of ``source`` at ``path``."""
        _copy(source, self._place(path, False) / posixpath.basename(path))

    def link(self, path: str, writable: bool) -> None:
        """Show the file itself where it can be written, a copy where it is only to be read."""
        target = self._place(path, writable) / posixpath.basename(path)
        if not writable:
            _copy(Path(path), target)
            return
        try:
            os.link(path, target)
        except OSError as error:
            raise refuse(
                "GrantNotPossible",
                f"the single file {path} cannot be granted for writing here: {error.strerror}",
                "grant its directory, or use isolation standard",
            ) from error

    def preopens(self) -> list[Preopen]:
        return [Preopen(str(place), path, writable) for path, (place, writable) in self._places.items()]

    def _place(self, path: str, writable: bool) -> Path:
        parent = posixpath.dirname(path)
        place, before = self._places.get(parent, (self._private / f"shadow{len(self._places)}", False))
        place.mkdir(exist_ok=True)
        self._places[parent] = (place, before or writable)
        return place


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o444)

"""The sandbox of one Wasm process: an empty root, no network, few system calls; and whether this host can make one."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from blixard.backends.contract import BackendInfo, BackendSettings
from blixard.backends.sandbox import kernel, seccomp
from blixard.backends.sandbox.namespaces import SandboxFailed, enter
from blixard.backends.sandbox.plan import UNPRIVILEGED_ID, Bind, Limits, SandboxPlan
from blixard.domain.limits import MIB
from blixard.domain.payload import Runtime
from blixard.domain.requirements import Isolation

MAX_ARTEFACT_BYTES = 1024 * MIB
"""Bounds the file that the compiler writes, through the limit on any file in its sandbox."""
COMPILER_PROCESSES = 512
"""Threads count too: the compiler starts one per core."""
PROBE_SECONDS = 30.0


@functools.cache
def _filter() -> bytes:
    return seccomp.compile_filter(seccomp.this_machine())


def plan_sandbox(settings: BackendSettings, binds: tuple[Bind, ...]) -> SandboxPlan:
    """Return the sandbox of one job with ``binds`` in it and nothing else of the host."""
    return _plan(binds, disk=settings.disk_mb * MIB, processes=settings.processes, open_files=settings.open_files)


def plan_compiler() -> SandboxPlan:
    """Return a sandbox with nothing in it; the compiler has its two files open already."""
    return _plan((), disk=MAX_ARTEFACT_BYTES, processes=COMPILER_PROCESSES, open_files=256)


def owner_of(path: str) -> tuple[int, int] | None:
    """Return whose file it is, if the sandbox must be told: only a root worker runs jobs as somebody else."""
    if not _is_privileged():
        return None
    found = Path(path).stat()
    return found.st_uid, found.st_gid


def probe() -> BackendInfo:
    """Find out, by making a sandbox once, what this host allows. Takes a fraction of a second."""
    fault = _try_sandbox()
    isolations = {Isolation.MINIMAL} if fault else {Isolation.MINIMAL, Isolation.STANDARD}
    missing = {} if fault is None else {Isolation.STANDARD: f"this host lets no sandbox be made: {fault}"}
    notes = (
        "Wasm at minimal isolation: disk_mb bounds each file, not all files of a job together",
        "Wasm: the memory limit bounds the module's own memory; the runtime's (tables, buffers) comes on top",
    )
    return BackendInfo(
        name="wasm", runtimes=frozenset({Runtime.WASM}), isolations=frozenset(isolations), missing=missing, notes=notes
    )


def _plan(binds: tuple[Bind, ...], *, disk: int, processes: int, open_files: int) -> SandboxPlan:
    uid, gid = (UNPRIVILEGED_ID, UNPRIVILEGED_ID) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    return SandboxPlan(
        binds=binds,
        limits=Limits(disk=disk, processes=processes, open_files=open_files),
        host_uid=uid,
        host_gid=gid,
        seccomp=_filter(),
    )


@functools.cache
def _is_privileged() -> bool:
    return kernel.has_capability(kernel.CAP_SYS_ADMIN)


def _try_sandbox() -> str | None:
    """Make a sandbox in a process of its own; return what went wrong."""
    command = [sys.executable, "-P", "-m", "blixard.backends.wasm.confinement"]
    try:
        tried = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if tried.returncode == 0:
        return None
    return tried.stderr.decode(errors="replace").strip() or f"the attempt ended with {tried.returncode}"


def main() -> int:
    """Enter an empty sandbox and end."""
    try:
        enter(plan_compiler(), keep=(), hold=())
    except SandboxFailed as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main())

"""What `blixard doctor` looks at. Each check answers; none may fail."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from blixard.cli.invocation import Invocation
from blixard.domain.requirements import Isolation, WorkerType
from blixard.errors import BlixardError, NotSupportedHere

if TYPE_CHECKING:
    from blixard.backends.contract import BackendInfo, ExecutionBackend

MIN_FREE_BYTES = 1 << 30
SERVER_SECONDS = 5.0


class Status(enum.StrEnum):
    OK = "ok"
    LIMITED = "limited"
    """Works, but not everything of it."""
    MISSING = "missing"


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``fix`` says how to get what is missing. Without what is ``essential`` nothing works."""

    check: str
    status: Status
    found: str
    fix: str = ""
    essential: bool = False


def examine(invocation: Invocation) -> list[Finding]:
    """Run every check. Raises ``ConfigError`` only: with wrong settings there is nothing to look at."""
    settings = invocation.config.settings
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _check_python),
        ("sqlite", _check_sqlite),
        ("data directory", lambda: _check_data_dir(settings.storage.data_dir)),
        ("user namespaces", _check_namespaces),
        ("bubblewrap", _check_bubblewrap),
        ("cgroups", _check_cgroups),
        ("backends", lambda: _check_backends(invocation)),
        ("virtual machines", lambda: _check_machines(invocation)),
        ("server", lambda: _check_server(invocation)),
        ("clock", _check_clock),
    ]
    return [finding for name, check in checks for finding in _guarded(name, check)]


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # the edge of one check: what it met is its answer
        return [Finding(check=name, status=Status.MISSING, found=f"{type(error).__name__}: {error}")]


def _check_python() -> Iterator[Finding]:
    yield Finding(
        check="python",
        status=Status.OK,
        found=f"{platform.python_implementation()} {platform.python_version()} in {sys.prefix}",
        essential=True,
    )


def _check_sqlite() -> Iterator[Finding]:
    import apsw

    yield Finding(check="sqlite", status=Status.OK, found=f"{apsw.sqlite_lib_version()} (of apsw)", essential=True)


def _check_data_dir(path: Path) -> Iterator[Finding]:
    from blixard.storage.filesystem import check_local

    there = next(place for place in (path, *path.parents) if place.exists())
    name = "data directory"
    if not there.is_dir() or not os.access(there, os.W_OK):
        fix = "choose another: --data-dir DIR or BLIXARD_STORAGE__DATA_DIR"
        yield Finding(
            check=name,
            status=Status.MISSING,
            found=f"{path}: {there} is no directory that may be written",
            fix=fix,
            essential=True,
        )
        return
    try:
        check_local(there)
    except BlixardError as error:
        yield Finding(check=name, status=Status.MISSING, found=error.message, fix=error.hint or "", essential=True)
        return
    free = shutil.disk_usage(there).free
    yield Finding(
        check=name,
        status=Status.OK if free >= MIN_FREE_BYTES else Status.LIMITED,
        found=f"{path}{'' if path.exists() else ' (not made yet)'}, {free / 2**30:.1f} GiB free",
        fix="" if free >= MIN_FREE_BYTES else "free some space: a full disk refuses new jobs",
        essential=True,
    )


def _check_namespaces() -> Iterator[Finding]:
    most = _read("/proc/sys/user/max_user_namespaces")
    allowed = _read("/proc/sys/kernel/unprivileged_userns_clone")
    confined = _read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    if most == "0" or allowed == "0" or confined == "1":
        yield Finding(
            check="user namespaces",
            status=Status.MISSING if most == "0" or allowed == "0" else Status.LIMITED,
            found=f"max_user_namespaces={most}, unprivileged_userns_clone={allowed}, apparmor_restrict={confined}",
            fix="allow them as root: sysctl user.max_user_namespaces=10000 kernel.unprivileged_userns_clone=1 "
            "kernel.apparmor_restrict_unprivileged_userns=0",
        )
        return
    yield Finding(check="user namespaces", status=Status.OK, found=f"allowed, up to {most or 'an unknown number'}")


def _check_bubblewrap() -> Iterator[Finding]:
    from blixard.backends.sandbox.bubblewrap import find_bubblewrap

    try:
        path, version = find_bubblewrap()
    except NotSupportedHere as error:
        yield Finding(check="bubblewrap", status=Status.MISSING, found=error.message, fix=error.hint or "")
    else:
        yield Finding(check="bubblewrap", status=Status.OK, found=f"{path}, version {version[0]}.{version[1]}")


def _check_cgroups() -> Iterator[Finding]:
    unified = Path("/sys/fs/cgroup/cgroup.controllers")
    if not unified.exists():
        fix = "boot with systemd.unified_cgroup_hierarchy=1; until then limits of a job hold for each of its processes"
        yield Finding(check="cgroups", status=Status.LIMITED, found="no cgroup v2 on this machine", fix=fix)
        return
    own = next((line[3:] for line in _read("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    writable = os.access(Path("/sys/fs/cgroup") / own.lstrip("/"), os.W_OK)
    yield Finding(
        check="cgroups",
        status=Status.OK if writable else Status.LIMITED,
        found=f"v2 with {unified.read_text().strip()}{'' if writable else ', not writable'}",
        fix="" if writable else "run the worker in a delegated unit: systemd-run --user -p Delegate=yes blixard worker",
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _check_backends(invocation: Invocation) -> Iterator[Finding]:
    from blixard.backends.contract import BackendSettings
    from blixard.infrastructure import WORKER_TYPES, ProductionInfrastructureFactory

    factory = ProductionInfrastructureFactory(invocation.config.settings)
    with tempfile.TemporaryDirectory(prefix="blixard-doctor-") as scratch:
        for worker_type in WORKER_TYPES:
            try:
                backends = factory.create_backends(worker_type, BackendSettings(scratch=Path(scratch)))
            except Exception as error:  # the edge of one check: what it met is its answer
                yield Finding(
                    check=f"{worker_type} jobs", status=Status.MISSING, found=f"{type(error).__name__}: {error}"
                )
                continue
            for isolation, backend in backends.items():
                yield _judge(worker_type, isolation, backend)


def _check_machines(invocation: Invocation) -> Iterator[Finding]:
    """Virtual machines: what they need, how they run here and why so, which image is there."""
    from blixard.cli.machines import vm_directory
    from blixard.vm.image.store import ImageStore
    from blixard.vm.setup import check_host

    settings, name = invocation.config.settings, "virtual machines"
    if settings.vm.skip:
        fix = "unset SKIP_VM_MANAGER, or vm.skip in the configuration"
        yield Finding(check=name, status=Status.MISSING, found="switched off", fix=fix)
        return
    image = ImageStore(vm_directory(invocation) / "images").names().get(settings.vm.image, "")
    missing = [finding for finding in check_host() if finding.is_missing]
    for finding in missing:
        status = Status.LIMITED if finding.builds and image else Status.MISSING
        yield Finding(check=name, status=status, found=f"no {finding.name}, which {finding.purpose}", fix=finding.fix)
    if all(finding.builds for finding in missing):
        yield _judge_hypervisor(vm_directory(invocation))
    yield Finding(
        check="guest image",
        status=Status.OK if image else Status.LIMITED,
        found=f"{settings.vm.image}: {image[:12]}" if image else f"{settings.vm.image} is not built yet",
        fix="" if image else "`blixard vm setup` builds it; else the first job does, which takes a minute",
    )


def _judge_hypervisor(directory: Path) -> Finding:
    from blixard.vm.hypervisor.qemu import QemuHypervisor

    with tempfile.TemporaryDirectory(prefix="blixard-doctor-") as scratch:
        info = QemuHypervisor(directory if directory.is_dir() else Path(scratch)).info()
    if info.accelerator is None:
        return Finding(
            check="hypervisor", status=Status.MISSING, found=f"{info.name} cannot run here", fix=info.missing
        )
    slow = info.accelerator != "kvm"
    return Finding(
        check="hypervisor",
        status=Status.LIMITED if slow else Status.OK,
        found=f"{info.name} {info.version} with {info.accelerator}{', which is slower than KVM' if slow else ''}",
        fix="; ".join(info.notes),
    )


def _judge(worker_type: WorkerType, isolation: Isolation, backend: ExecutionBackend) -> Finding:
    try:
        info = backend.info()
    except Exception as error:  # the edge of one check: what it met is its answer
        return Finding(
            check=f"{worker_type} jobs, {isolation}", status=Status.MISSING, found=f"{type(error).__name__}: {error}"
        )
    return _finding_of(worker_type, isolation, info)


def _finding_of(worker_type: WorkerType, isolation: Isolation, info: BackendInfo) -> Finding:
    name = f"{worker_type} jobs, {isolation}"
    if isolation not in info.isolations:
        fix = info.missing.get(isolation, "no reason known")
        return Finding(check=name, status=Status.MISSING, found=f"{info.name} cannot give it here", fix=fix)
    runs = ", ".join(sorted(info.runtimes))
    return Finding(
        check=name,
        status=Status.LIMITED if info.notes else Status.OK,
        found=f"{info.name} runs {runs}",
        fix="; ".join(info.notes),
    )


def _check_server(invocation: Invocation) -> Iterator[Finding]:
    from blixard.client.embedded import is_served

    settings = invocation.config.settings
    if not settings.server.url and not is_served(settings.storage.data_dir):
        yield Finding(
            check="server", status=Status.OK, found="none is configured: jobs run in the local data directory"
        )
        return
    where = settings.server.url or f"the server of {settings.storage.data_dir}"

    async def ask() -> str:
        async with asyncio.timeout(SERVER_SECONDS), invocation.connect() as client:
            health = await client.health()
        return f"{where}: {health.status}, version {health.version}"

    try:
        yield Finding(check="server", status=Status.OK, found=invocation.run(ask()))
    except (BlixardError, TimeoutError) as error:
        fix = (error.hint if isinstance(error, BlixardError) else None) or "is it running? `blixard serve` starts one"
        yield Finding(
            check="server", status=Status.MISSING, found=f"{where}: {error or 'no answer'}", fix=fix, essential=True
        )


def _check_clock() -> Iterator[Finding]:
    now = dt.datetime.now(dt.UTC)
    wrong = now.year < 2026
    yield Finding(
        check="clock",
        status=Status.LIMITED if wrong else Status.OK,
        found=now.strftime("%Y-%m-%d %H:%M:%S UTC"),
        fix="it is behind: set it, or ages and expiry times will be wrong; leases do not depend on it" if wrong else "",
    )

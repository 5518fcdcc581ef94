"""What this host needs for virtual machines: what is there, what lacks, and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from blixard.errors import NotSupportedHere, Unavailable
from blixard.vm.image.debian import KEYRING
from blixard.vm.image.tools import ToolFailed, Tools, find_program

MACHINE = "x86_64"
INSTALL_SECONDS = 900.0
_APT, _DNF, _PACMAN = "apt-get", "dnf", "pacman"
_COMMANDS = {
    _APT: "apt-get install -y --no-install-recommends",
    _DNF: "dnf install -y",
    _PACMAN: "pacman -S --needed",
}
_FAMILIES = {"debian": _APT, "ubuntu": _APT, "fedora": _DNF, "rhel": _DNF, "centos": _DNF, "arch": _PACMAN}


class HostFinding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that virtual machines need. ``found`` is empty when it lacks; then ``fix`` says how to get it here."""

    name: str
    purpose: str
    found: str = ""
    fix: str = ""
    package: str = ""
    """What to install with this host's package manager; "" when it knows none."""
    builds: bool = True
    """Needed only to build images; with an image that is there, jobs run without it."""

    @property
    def is_missing(self) -> bool:
        return not self.found


class _Need(msgspec.Struct, frozen=True):
    """``find`` returns where it is, or "". ``packages``: its package by package manager."""

    name: str
    purpose: str
    find: Callable[[], str]
    packages: Mapping[str, str]
    builds: bool = True


def check_host() -> tuple[HostFinding, ...]:
    """Look for everything that running and building needs. Changes nothing, takes milliseconds, raises nothing.

    Whether KVM works is not looked at: only a boot tells, see ``Hypervisor.info``.
    """
    manager = find_manager()
    return (_check_machine(), *(_examine(need, manager) for need in _list_needs()))


def list_missing() -> tuple[HostFinding, ...]:
    return tuple(finding for finding in check_host() if finding.is_missing)


def describe_missing(missing: Sequence[HostFinding]) -> str:
    """Return one line that gets all of it, for a hint; as many as there are ways when no package manager has everything."""
    manager = find_manager()
    packages = sorted({finding.package for finding in missing if finding.package})
    command = [f"{_privilege()}{_COMMANDS[manager]} {shlex.join(packages)}"] if packages and manager else []
    return "; ".join([*command, *(finding.fix for finding in missing if not finding.package)])


def can_install() -> bool:
    """Return whether ``install_missing`` may try: root, with apt."""
    return os.geteuid() == 0 and find_manager() == _APT


def install_missing(progress: Callable[[str], None], stop: threading.Event | None = None) -> tuple[str, ...]:
    """Install what lacks with apt and return the names of the packages; none when nothing lacks.

    Raises ``NotSupportedHere`` when this process may not install, or something lacks that no package brings, with what to do by hand;
    ``Unavailable`` when apt fails.
    """
    missing = list_missing()
    if not missing:
        return ()
    if not can_install() or not all(finding.package for finding in missing):
        names = ", ".join(finding.name for finding in missing)
        raise NotSupportedHere(f"virtual machines need what this host lacks: {names}", hint=describe_missing(missing))
    packages = tuple(sorted({finding.package for finding in missing}))
    _install(packages, Tools(stop or threading.Event()), progress)
    if still := list_missing():
        names = ", ".join(finding.name for finding in still)
        raise Unavailable(f"apt installed {', '.join(packages)}, and still there is no {names}")
    return packages


def _install(packages: Sequence[str], tools: Tools, progress: Callable[[str], None]) -> None:
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        progress("reading the list of Debian packages")
        tools.run([_APT, "update", "-q"], env=env, seconds=INSTALL_SECONDS)
        progress(f"installing {', '.join(packages)}")
        words = shlex.split(_COMMANDS[_APT])
        tools.run([*words, "-q", *packages], env=env, seconds=INSTALL_SECONDS)
    except ToolFailed as failed:
        last = failed.output.strip().splitlines()[-1:] or [str(failed)]
        raise Unavailable(
            f"apt could not install {', '.join(packages)}: {last[0]}",
            hint=f"try it by hand: {_COMMANDS[_APT]} {shlex.join(packages)}",
        ) from failed


def find_manager(release: Path = Path("/etc/os-release")) -> str:
    """Return the package manager of this distribution or of one it descends from; "" if it is none that we know."""
    try:
        lines = release.read_text().splitlines()
    except OSError:
        return ""
    fields = dict(line.partition("=")[::2] for line in lines if "=" in line)
    words = " ".join(fields.get(name, "").strip("\"'") for name in ("ID", "ID_LIKE")).split()
    return next((_FAMILIES[word] for word in words if word in _FAMILIES), "")


def _check_machine() -> HostFinding:
    here = platform.machine()
    return HostFinding(
        name="processor",
        purpose="guests are Linux on x86-64",
        found=here if here == MACHINE else "",
        fix="" if here == MACHINE else f"images for {here} are not made; run the worker on an x86-64 machine",
        builds=False,
    )


def _examine(need: _Need, manager: str) -> HostFinding:
    package = need.packages.get(manager, "")
    names = ", ".join(f"{name.partition('-')[0]}: {value}" for name, value in need.packages.items())
    fix = f"{_privilege()}{_COMMANDS[manager]} {package}" if package else f"install {need.name} ({names})"
    found = need.find()
    return HostFinding(
        name=need.name,
        purpose=need.purpose,
        found=found,
        fix="" if found else fix,
        package=package,
        builds=need.builds,
    )


def _list_needs() -> Sequence[_Need]:
    def program(name: str) -> Callable[[], str]:
        return lambda: path if (path := find_program(name)).startswith("/") else ""

    needs = [
        _Need(
            "qemu-system-x86_64",
            "runs guests",
            program("qemu-system-x86_64"),
            {_APT: "qemu-system-x86", _DNF: "qemu-system-x86-core", _PACMAN: "qemu-system-x86"},
            builds=False,
        ),
        _Need("mmdebstrap", "builds images", program("mmdebstrap"), {_APT: "mmdebstrap", _DNF: "mmdebstrap"}),
        _Need("apt-get", "fetches Debian packages", program("apt-get"), {_APT: "apt", _DNF: "apt"}),
        _Need("dpkg-deb", "unpacks Debian packages", program("dpkg-deb"), dict.fromkeys(_COMMANDS, "dpkg")),
        _Need("mke2fs", "makes file systems", program("mke2fs"), dict.fromkeys(_COMMANDS, "e2fsprogs")),
        _Need(
            "Debian's keys",
            "prove that packages are Debian's",
            lambda: str(KEYRING) if KEYRING.exists() else "",
            {_APT: "debian-archive-keyring", _DNF: "debian-keyring", _PACMAN: "debian-archive-keyring"},
        ),
        _Need(
            "pip",
            "fetches Python packages",
            _find_pip,
            {_APT: "python3-pip", _DNF: "python3-pip", _PACMAN: "python-pip"},
        ),
    ]
    return needs if os.geteuid() == 0 else [*needs, *_list_needs_of_users(program)]


def _list_needs_of_users(program: Callable[[str], Callable[[], str]]) -> Sequence[_Need]:
    """Return what lets an ordinary user build a root directory."""
    ids = {_APT: "uidmap", _DNF: "shadow-utils-subid", _PACMAN: "shadow"}
    return [
        _Need(
            "fakeroot",
            "lets a user own what belongs to root",
            program("fakeroot"),
            dict.fromkeys(_COMMANDS, "fakeroot"),
        ),
        _Need("newuidmap", "lets a user have a root directory", program("newuidmap"), ids),
    ]


def _find_pip() -> str:
    if spec := importlib.util.find_spec("pip"):
        return str(spec.origin)
    return shutil.which("pip3") or shutil.which("pip") or ""


def _privilege() -> str:
    return "" if os.geteuid() == 0 else "sudo "

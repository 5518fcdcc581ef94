"""QEMU's own sandbox: what it can reach if a guest breaks out into it.

Nothing but its program, libraries and firmware, read-only; no network (unless the guest was granted one), no other process in sight, no
capability, an ordinary user even under a root worker. Everything else it gets as open descriptors.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec

from blixard.backends.sandbox.bubblewrap import find_bubblewrap
from blixard.errors import NotSupportedHere

NOBODY = 65534
KVM_DEVICE = "/dev/kvm"
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/local/lib", "/lib", "/lib64", "/lib32")
_DATA = ("/usr/share/qemu", "/usr/share/qemu-kvm", "/usr/share/seabios", "/usr/local/share/qemu", "/etc/ld.so.cache")
QEMU_HINT = "install it (Debian, Ubuntu: apt install qemu-system-x86; Fedora: dnf install qemu-system-x86-core)"
OLDEST = (7, 2)
"""The oldest QEMU that our tests ran with."""
TRIAL_SECONDS = 30.0

MAX_OPEN_FILES = 256
MAX_FILE_BYTES = 0
"""QEMU writes no files: memory is mapped, saved states go through pipes."""
OVERHEAD_BYTES = 4 << 30
"""Address space beside the guest's memory. Most of it is reserved, never touched: stacks, translated code, arenas."""
OOM_SCORE = 500
"""The kernel kills a machine before it kills the worker."""


class Confinement(msgspec.Struct, frozen=True, kw_only=True):
    """How to start one host's QEMU confined. Made by ``find``."""

    qemu: str
    bubblewrap: str

    @classmethod
    def find(cls, qemu: str = "qemu-system-x86_64") -> Confinement:
        """Raises ``NotSupportedHere`` that says what to install."""
        program = shutil.which(qemu)
        if program is None:
            raise NotSupportedHere(f"there is no {qemu} on this host", hint=QEMU_HINT)
        try:
            bubblewrap, _ = find_bubblewrap()
        except NotSupportedHere as error:
            raise NotSupportedHere(f"QEMU cannot be confined: {error.message}", hint=error.hint) from error
        return cls(qemu=os.path.realpath(program), bubblewrap=bubblewrap)

    def command(self, arguments: Sequence[str], *, network: bool, kvm: bool) -> list[str]:
        words = [self.bubblewrap, "--unshare-all", "--die-with-parent", "--as-pid-1"]
        words += ["--cap-drop", "ALL", "--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "qemu", "--clearenv"]
        words += _places(self.qemu)
        words += ["--proc", "/proc"]
        if network:
            words += ["--share-net", "--ro-bind-try", os.path.realpath("/etc/resolv.conf"), "/etc/resolv.conf"]
        if kvm:
            words += ["--dev-bind", KVM_DEVICE, KVM_DEVICE]
        return [*words, "--remount-ro", "/", "--chdir", "/", "--", self.qemu, *arguments]

    def start(
        self,
        arguments: Sequence[str],
        *,
        keep: Sequence[int],
        space_mb: int = 0,
        network: bool = False,
        kvm: bool = False,
        stdout: int | IO[bytes] = subprocess.PIPE,
        stderr: int | IO[bytes] = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        """Start QEMU with the descriptors ``keep``; it dies with the calling thread. ``space_mb``: address space, without its own needs.

        The process is bubblewrap; QEMU is its only child, and ends with it. Both are a process group of their own: see ``kill_group``.
        Raises ``OSError``.
        """
        user = NOBODY if os.geteuid() == 0 else None
        groups = _groups_for_kvm(kvm) if user is not None else None
        return subprocess.Popen(
            [*_limited(space_mb), *self.command(arguments, network=network, kvm=kvm)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=keep,
            user=user,
            group=user,
            extra_groups=groups,
            start_new_session=True,
            cwd="/",
            env={},
        )

    def version(self) -> str:
        """Return QEMU's version, as it says itself within its confinement.

        Raises ``NotSupportedHere`` if it cannot be run so, or is older than what we were tried with.
        """
        try:
            process = self.start(["--version"], keep=())
            said, complaint = communicate(process, TRIAL_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotSupportedHere(f"{self.qemu} cannot be run confined: {error}") from error
        if process.returncode != 0:
            reason = complaint.decode(errors="replace").strip()[:500]
            raise NotSupportedHere(
                f"{self.qemu} cannot be run confined: {reason}",
                hint="allow unprivileged user namespaces, and see that bubblewrap is installed for all users",
            )
        return read_version(said.decode(errors="replace"), self.qemu)


def read_version(said: str, program: str) -> str:
    """Return the version in what ``--version`` prints. Raises ``NotSupportedHere`` if it is too old, or none."""
    found = re.search(r"version (\d+)\.(\d+)[.\d]*", said)
    if found is None:
        raise NotSupportedHere(f"{program} does not tell its version: {said[:100]!r}", hint=QEMU_HINT)
    if (int(found[1]), int(found[2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise NotSupportedHere(f"{program} is version {found[1]}.{found[2]}, {wanted} is needed", hint=QEMU_HINT)
    return found[0].removeprefix("version ")


def communicate(process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, bytes]:
    """Return what it printed when it has ended. Raises ``subprocess.TimeoutExpired``, with the process killed."""
    try:
        return process.communicate(timeout=seconds)
    except BaseException:
        kill_group(process)
        process.communicate()
        raise


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill bubblewrap and QEMU at once, also while one is just starting the other: bubblewrap alone might leave an orphan then.

    Only while one of the two is known to be there: the group's number is theirs for that long.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _places(qemu: str) -> list[str]:
    words = []
    for name in _LIBRARIES:
        if os.path.islink(name):
            words += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            words += ["--ro-bind", name, name]
    for name in (*_DATA, qemu):
        if os.path.exists(name):
            words += ["--ro-bind", name, name]
    return words


def _limited(space_mb: int) -> list[str]:
    """Return how to start a program with limits. By a shell: after the change of user we may not set another process's limits, and code
    of ours must not run between fork and exec in a process with threads.
    """
    space = (space_mb << 10) + (OVERHEAD_BYTES >> 10)
    limits = f"ulimit -c 0; ulimit -n {MAX_OPEN_FILES}; ulimit -f {MAX_FILE_BYTES}; ulimit -v {space}"
    return ["/bin/sh", "-c", f'{limits}; echo {OOM_SCORE} >/proc/self/oom_score_adj; exec "$0" "$@"']


def _groups_for_kvm(kvm: bool) -> list[int]:
    return [os.stat(KVM_DEVICE).st_gid] if kvm else []


def child_of(pid: int) -> int | None:
    """Return the only child of bubblewrap, which is QEMU; None when it is gone."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None

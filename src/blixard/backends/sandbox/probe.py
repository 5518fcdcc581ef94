"""What this host allows, found by making one sandbox of each kind and looking at how that goes.

``python -P -m blixard.backends.sandbox.probe`` does it in a process of its own, since a sandbox is entered by a fork of a
single-threaded process, and prints what went wrong as JSON.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from blixard.backends.sandbox import bubblewrap, layout, seccomp
from blixard.backends.sandbox.namespaces import SandboxFailed, enter, explain
from blixard.backends.sandbox.plan import UNPRIVILEGED_ID, BubblewrapCommand, Limits, SandboxPlan
from blixard.domain.limits import MIB
from blixard.errors import NotSupportedHere

PROBE_SECONDS = 60.0
_UNPRIVILEGED = Path("/proc/sys/kernel/unprivileged_userns_clone")
_APPARMOR = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
_COUNT = Path("/proc/sys/user/max_user_namespaces")


class Findings(msgspec.Struct, frozen=True):
    """What is in the way of Python jobs and of commands, with the fix, in words; None: nothing."""

    python: str | None = None
    command: str | None = None


@functools.cache
def probe() -> Findings:
    """Try it, once per process. Takes a fraction of a second; blocks."""
    if sys.platform != "linux":
        reason = "sandboxes need the namespaces of Linux"
        return Findings(reason, reason)
    words = [sys.executable, "-P", "-m", "blixard.backends.sandbox.probe"]
    try:
        done = subprocess.run(words, capture_output=True, timeout=PROBE_SECONDS, check=False)
        return msgspec.json.decode(done.stdout, type=Findings)
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError) as error:
        reason = f"trying a sandbox failed: {error}"
        return Findings(reason, reason)


def try_here() -> Findings:
    """Make the sandboxes as forks of this process, which must have no other thread."""
    python = _try_python()
    return Findings(python, python if python is not None else _try_command())


def _plan(command: BubblewrapCommand | None) -> SandboxPlan:
    is_root = os.geteuid() == 0
    return SandboxPlan(
        binds=(*layout.system_binds(), *layout.interpreter_binds()),
        limits=Limits(disk=MIB, processes=16, open_files=64),
        host_uid=UNPRIVILEGED_ID if is_root else os.geteuid(),
        host_gid=UNPRIVILEGED_ID if is_root else os.getegid(),
        links=layout.system_links(),
        files=layout.generated_files(network=False),
        seccomp=seccomp.compile_filter(seccomp.this_machine()),
        command=command,
    )


def _try_python() -> str | None:
    try:
        plan = _plan(None)
    except NotSupportedHere as error:
        return f"{error}; {error.hint}"
    reason = _try(plan)
    return None if reason is None else f"{reason}; {remedy(reason)}"


def _try_command() -> str | None:
    try:
        program, version = bubblewrap.find_bubblewrap()
    except NotSupportedHere as error:
        return f"{error}; {error.hint}"
    words = BubblewrapCommand(program=program, version=version, argv=("true",), environment={"PATH": "/usr/bin:/bin"})
    reason = _try(_plan(words))
    return None if reason is None else f"{program} does not work here: {reason}; {remedy(reason)}"


def _try(plan: SandboxPlan) -> str | None:
    """Run a job that does nothing; return what went wrong."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2)
        _enter_and_end(plan, writing)
    os.close(writing)
    with open(reading, encoding="utf-8", errors="replace") as said:
        reason = said.read().strip()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == 0 else reason or f"a job that does nothing ended with {code}"


def _enter_and_end(plan: SandboxPlan, writing: int) -> None:
    code = 1
    try:
        enter(plan, hold={writing})
        code = 0
    except (SandboxFailed, OSError) as error:
        os.write(writing, (explain(error) if isinstance(error, OSError) else str(error)).encode())
    finally:
        os._exit(code)


def remedy(reason: str) -> str:
    """Say what to do about it, from what the kernel's own settings tell."""
    if _is_set(_UNPRIVILEGED, "0"):
        return "allow user namespaces: sysctl -w kernel.unprivileged_userns_clone=1"
    if _is_set(_COUNT, "0"):
        return "allow user namespaces: sysctl -w user.max_user_namespaces=15000"
    if _is_set(_APPARMOR, "1") and os.geteuid() != 0:
        return (
            "AppArmor keeps user namespaces from programs without a profile: "
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or give the interpreter a profile with 'userns,'"
        )
    if reason.startswith("mount") and "/proc" in reason:
        return "the container that this runs in hides parts of /proc: docker run --security-opt systempaths=unconfined"
    if "Function not implemented" in reason:
        return f"Linux 5.12 or later is needed, this is {os.uname().release}"
    if reason.startswith("unshare") or "Operation not permitted" in reason:
        return (
            "the kernel allows no namespaces here; in a container, start it with --security-opt seccomp=unconfined "
            "--security-opt apparmor=unconfined --security-opt systempaths=unconfined, or run the worker outside of it"
        )
    return "run `blixard doctor` on another machine to compare, or use isolation minimal for code that you trust"


def _is_set(setting: Path, value: str) -> bool:
    try:
        return setting.read_text(encoding="ascii").strip() == value
    except OSError:
        return False


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(try_here()))

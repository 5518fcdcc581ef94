"""Turns a process freshly forked from the zygote into a sandboxed job. See DESIGN.md for the order of the steps and why.

zygote ── supervisor (host's namespaces, holds the session's lock)
            └── init (pid 1: builds the root, reaps)
                  └── job (pid 2: the runner, or a command)
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterable
from types import FrameType
from typing import NoReturn

from blixard.backends.sandbox import kernel, seccomp
from blixard.backends.sandbox.identity import OwnerMaps, become, enter_user_namespace, write_file
from blixard.backends.sandbox.plan import HOST_NAME, Limits, SandboxPlan
from blixard.backends.sandbox.root import RootBuilder

KILL_NOW = signal.SIGQUIT
"""To the supervisor: kill everything in the sandbox, wait until it is gone, then end. It gets it too when its parent dies."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""To the supervisor: pass it on to the job's process group."""
FIRST_KILLED = "500"
"""oom_score_adj of a job: when the host runs short of memory, jobs end before workers."""
_OWN_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP
_GO_ON, _ENDED, _FAILED = b"+", b"=", b"!"
_MAX_REPORT = 4096
HIGHEST_DESCRIPTOR = 2**31 - 1
_PYTHON_IGNORES = (signal.SIGPIPE, signal.SIGXFSZ)


class SandboxFailed(Exception):
    """The sandbox could not be built; nothing of the job has run."""


def enter(
    plan: SandboxPlan, *, keep: Iterable[int] = (), hold: Iterable[int] = (), maps: OwnerMaps | None = None
) -> None:
    """Go on in the sandbox; call it in a process freshly forked from a single-threaded one.

    Returns in a new process, the job: pid 2 of its own namespaces, in ``/work``, with no capability, filtered system calls
    and no descriptor but 0 to 2 and ``keep``. The calling process stays outside as its supervisor with ``hold`` open; it
    never returns but ends as the job ends (same exit code, same signal) once every process of the sandbox is gone.
    Raises ``SandboxFailed`` in the calling process if the sandbox cannot be built. ``maps`` is for root only.
    """
    if maps is None and _needs_maps(plan):
        maps = OwnerMaps(plan.host_uid, plan.host_gid)
    if plan.command is not None:
        from blixard.backends.sandbox import bubblewrap  # it builds on this module

        bubblewrap.enter(plan, hold=hold, maps=maps)
    reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        stand_apart()
        if not kernel.has_capability(kernel.CAP_SYS_ADMIN):
            enter_user_namespace(os.geteuid(), os.getegid())
        kernel.unshare(kernel.CLONE_NEWPID)
        init = os.fork()
    except OSError as error:
        raise SandboxFailed(explain(error)) from error
    if init:
        writing.close()
        _let_in(init, reading, plan.limits)
        supervise(init, reading, {reading.fileno(), *hold})
    reading.close()
    _run_init(plan, writing, {0, 1, 2, *keep}, maps)


def _let_in(init: int, reports: socket.socket, limits: Limits) -> None:
    """Put init into its cgroups while it builds the root (the kernel takes milliseconds for it), then let it go on."""
    try:
        join_cgroups(limits, init)
    except OSError as error:
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)
        raise SandboxFailed(explain(error)) from error
    with contextlib.suppress(BrokenPipeError):  # it has failed already, and reported why
        reports.send(_GO_ON)


def _needs_maps(plan: SandboxPlan) -> bool:
    return any(bind.owner is not None for bind in plan.binds) and kernel.has_capability(kernel.CAP_SYS_ADMIN)


def explain(error: Exception) -> str:
    """Say in words what went wrong while a sandbox was built."""
    if isinstance(error, OSError):
        place = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{place}"
    return f"{type(error).__name__}: {error}"


def stand_apart() -> None:
    """Signals to the zygote's group are not for us, and ours not for it; die (properly) with the zygote."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {KILL_NOW, *FORWARDED})
    if os.getsid(0) != os.getpid():
        os.setsid()
    signal.set_wakeup_fd(-1)
    kernel.die_with_parent(KILL_NOW)
    if os.getppid() != parent:
        os._exit(1)


def supervise(init: int, reports: socket.socket, keep: set[int]) -> NoReturn:
    """Wait for the end of the sandbox and end alike. Raises ``SandboxFailed`` if it never began."""

    def forward(number: int, _frame: FrameType | None) -> None:
        # The process is ours and not reaped yet, so its number cannot be another's.
        os.kill(init, signal.SIGKILL if number == KILL_NOW else number)

    for number in (KILL_NOW, *FORWARDED):
        signal.signal(number, forward)
    close_all_but({0, 1, 2, *keep})
    let_go_of_standard_streams()
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    report = reports.recv(_MAX_REPORT)
    for number in (KILL_NOW, *FORWARDED):
        signal.signal(number, signal.SIG_IGN)
    os.waitpid(init, 0)
    if report.startswith(_FAILED):
        raise SandboxFailed(report[1:].decode(errors="replace"))
    end_like(int(report[1:]) if report else signal.SIGKILL)


def let_go_of_standard_streams() -> None:
    """Whoever reads the job's output must see its end when the job ends, not when we do."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)


def end_like(status: int) -> NoReturn:
    """End this process with the same exit code, or by the same signal, as a wait status tells."""
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def _run_init(plan: SandboxPlan, reports: socket.socket, keep: set[int], maps: OwnerMaps | None) -> None:
    """Build the sandbox as its pid 1 and fork the job, in which alone this returns."""
    try:
        os.setsid()  # what is sent to the supervisor's group is passed on by it, once
        write_file("/proc/self/oom_score_adj", FIRST_KILLED)
        _build(plan, maps)
        close_all_but({reports.fileno(), *keep})
        _become_powerless(plan, reports)
        job = os.fork()
        if job == 0:
            _become_job(plan)
            reports.close()
            return
    except Exception as error:  # the edge of a job: whatever went wrong is reported to the supervisor
        reports.send(_FAILED + explain(error).encode()[: _MAX_REPORT - 1])
        os._exit(1)
    _reap(job, reports, plan.seccomp)


def join_cgroups(limits: Limits, pid: int = 0) -> None:
    """Put a process (0: this one) where the limits of the sandbox hold. Raises ``OSError``."""
    for directory in limits.cgroups:
        write_file(f"{directory}/cgroup.procs", str(pid))


def _build(plan: SandboxPlan, maps: OwnerMaps | None) -> None:
    kernel.unshare(_OWN_NAMESPACES | (0 if plan.network else kernel.CLONE_NEWNET))
    builder = RootBuilder(maps)
    builder.open(plan.limits.disk)
    builder.add_system(plan.host_uid, plan.host_gid)
    builder.add(plan)
    builder.close()
    socket.sethostname(HOST_NAME)
    if not plan.network:
        kernel.raise_loopback()
    kernel.join_new_keyring()


def _become_powerless(plan: SandboxPlan, reports: socket.socket) -> None:
    become(plan.host_uid, plan.host_gid)
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    # Changing the user forgot the wish to die with the supervisor; if it has died meanwhile, its end of the socket is closed.
    kernel.die_with_parent(signal.SIGKILL)
    if reports.recv(1) != _GO_ON:
        os._exit(1)


def _become_job(plan: SandboxPlan) -> None:
    os.setsid()
    reset_signals(is_program=False)
    set_limits(plan.limits, own_processes=1)
    if plan.moved_library is not None:
        move_library(*plan.moved_library)
    seccomp.install(plan.seccomp)


def reset_signals(*, is_program: bool) -> None:
    """Handle and block signals as a fresh interpreter does, or (``is_program``) as any other program expects to."""
    for number in (KILL_NOW, *FORWARDED, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    for number in _PYTHON_IGNORES:
        signal.signal(number, signal.SIG_DFL if is_program else signal.SIG_IGN)
    if not is_program:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())


def move_library(old: str, new: str) -> None:
    """Let ``import`` find under ``new`` what this process has found under ``old`` so far."""
    sys.path[:] = [new if path == old else path for path in sys.path]
    for module in list(sys.modules.values()):
        places = getattr(module, "__path__", None)
        if isinstance(places, list):
            places[:] = [new + place[len(old) :] if place.startswith(f"{old}/") else place for place in places]
    importlib.invalidate_caches()


def set_limits(limits: Limits, *, own_processes: int, is_program: bool = False) -> None:
    """Bound this process and its children. ``own_processes`` of ours count with the job's; a program's memory starts afresh."""
    bounds = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, limits.disk),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_NPROC, limits.processes + own_processes),
    ]
    if limits.address_space is not None:
        bounds.append((resource.RLIMIT_AS, limits.address_space + (0 if is_program else _mapped_bytes())))
    for number, bound in bounds:
        hard = resource.getrlimit(number)[1]
        most = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(number, (most, most))

    if limits.processors is not None:
        _bind_to_processors(math.ceil(limits.processors))


def _bind_to_processors(count: int) -> None:
    usable = sorted(os.sched_getaffinity(0))
    first = int.from_bytes(os.urandom(2)) % len(usable)  # spread jobs over the processors
    os.sched_setaffinity(0, {usable[(first + i) % len(usable)] for i in range(min(count, len(usable)))})


def _mapped_bytes() -> int:
    """What the zygote has mapped already: the limit is for what the job adds."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _reap(job: int, reports: socket.socket, program: bytes) -> None:
    """Be init: pass signals on to the job's group, collect orphans, report how the job ended; then the kernel ends the rest."""

    def forward(number: int, _frame: FrameType | None) -> None:
        try:
            os.killpg(job, number)
        except ProcessLookupError:
            os.kill(job, number)  # it has no group of its own yet

    for number in FORWARDED:
        signal.signal(number, forward)
    let_go_of_standard_streams()
    close_all_but({0, 1, 2, reports.fileno()})
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    seccomp.install(program)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    while True:
        pid, status = os.wait()
        if pid == job:
            reports.send(_ENDED + str(status).encode())
            os._exit(0)


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor of this process but these."""
    start = 0
    for descriptor in sorted(set(keep)):
        if start < descriptor:
            os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, HIGHEST_DESCRIPTOR)

"""The supervisor of one runner: starts its process, ends the whole tree on request, and tells when nothing of it is left.

It is forked from the zygote and runs no code of the job. It adopts every process that the job orphans.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import resource
import select
import signal
import socket
import sys
from typing import NoReturn

import msgspec

from blixard.backends.sandbox.identity import OwnerMaps
from blixard.backends.sandbox.namespaces import close_all_but, enter
from blixard.backends.sandbox.plan import SandboxPlan
from blixard.backends.workspace import make_directory, place_inputs, remove_tree
from blixard.backends.zygote.kernel import adopt_orphans, die_with_parent, kill_descendants
from blixard.backends.zygote.messages import (
    KILL,
    TERMINATE,
    ControlMessage,
    Exited,
    Launch,
    Role,
    SpawnFailed,
    Starting,
    decode_failure,
    encode,
)

CHANNEL_DESCRIPTOR = 3
FAILURE_DESCRIPTOR = 4
NOT_EXECUTABLE_EXIT_CODE = 126
NOT_FOUND_EXIT_CODE = 127
BROKEN_EXIT_CODE = 70
_ABOVE_ALL_GIVEN = 64


class Supervisor:
    def __init__(self, launch: Launch, descriptors: dict[Role, int], maps: OwnerMaps | None) -> None:
        self._launch = launch
        self._maps = maps
        self._descriptors = descriptors
        self._control = socket.socket(fileno=descriptors[Role.CONTROL])
        self._child = 0
        self._code: int | None = None
        self._is_abandoned = False
        """Ended from outside: to tell an exit code would blame the job."""

    def run(self, zygote: int) -> NoReturn:
        """Run the job to its end. Returns never: the process ends."""
        self._wake = self._catch_signals()
        die_with_parent(zygote, signal.SIGTERM)
        adopt_orphans()
        ending: ControlMessage
        try:
            self._start()
            ending = Exited(self._watch())
            self._check_started()
        except _NotStartedError as error:
            ending = error.message
        kill_descendants()
        self._clean_up()
        if not self._is_abandoned:
            self._tell(ending)
        os._exit(0)

    def _catch_signals(self) -> int:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        return reading

    def _start(self) -> None:
        launch = self._launch
        try:
            if launch.directory is not None:
                make_directory(launch.directory, launch.private)
                place_inputs(launch.working_directory, launch.inputs)
        except ValueError as error:
            raise _NotStartedError(SpawnFailed("InvalidRequest", str(error), is_fault_of_job=True)) from error
        except OSError as error:
            raise _NotStartedError(SpawnFailed("WorkspaceFailed", str(error))) from error
        self._fork()

    def _fork(self) -> None:
        self._failure, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        supervisor = os.getpid()
        self._tell(Starting())
        try:
            self._child = os.fork()
        except OSError as error:
            raise _NotStartedError(SpawnFailed("ForkFailed", f"fork: {error.strerror}")) from error
        if self._child == 0:
            _become_runner(self._launch, self._descriptors, supervisor, writing, self._maps)
        os.close(writing)
        for role, descriptor in self._descriptors.items():
            if role is not Role.CONTROL:
                os.close(descriptor)

    def _check_started(self) -> None:
        """Raise what the ended process said about why the job's own code never ran."""
        with contextlib.suppress(BlockingIOError):
            if reason := os.read(self._failure, select.PIPE_BUF):
                raise _NotStartedError(decode_failure(reason))

    def _watch(self) -> int:
        """Serve the backend until the job's process has ended; return its exit code, minus n after signal n."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while not self._reap():
            for descriptor, _ in poller.poll():
                if descriptor == self._wake:
                    self._take_signals()
                else:
                    self._take_order()
        assert self._code is not None
        return self._code

    def _reap(self) -> bool:
        """Collect what has ended, adopted processes too; say whether the job's own process has."""
        with contextlib.suppress(ChildProcessError):
            while self._code is None:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return False
                if pid == self._child:
                    self._code = os.waitstatus_to_exitcode(status)
        return True

    def _take_signals(self) -> None:
        if signal.SIGTERM in os.read(self._wake, 512):  # the zygote has died, or somebody wants us to end
            self._is_abandoned = True
            self._kill()

    def _take_order(self) -> None:
        order = self._control.recv(16)
        if order == TERMINATE:
            try:
                os.killpg(self._child, signal.SIGTERM)
            except ProcessLookupError:  # it has no group of its own yet, so nothing of the job has run
                os.kill(self._child, signal.SIGKILL)
        elif order in (KILL, b""):  # nothing: the backend is gone
            self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGKILL)
        pid, status = os.waitpid(self._child, 0)
        self._code = os.waitstatus_to_exitcode(status)
        assert pid == self._child

    def _clean_up(self) -> None:
        if self._launch.directory is not None:
            with contextlib.suppress(OSError):  # the backend removes what is left, with its scratch directory
                remove_tree(self._launch.directory)

    def _tell(self, message: ControlMessage) -> None:
        with contextlib.suppress(OSError):  # the backend is gone: nobody wants to know
            self._control.send(encode(message))


class _NotStartedError(Exception):
    def __init__(self, message: SpawnFailed) -> None:
        super().__init__(message.message)
        self.message = message


def _become_runner(
    launch: Launch, descriptors: dict[Role, int], supervisor: int, failure: int, maps: OwnerMaps | None
) -> NoReturn:
    """Turn the fresh fork into the job's process. Never returns to the supervisor's code."""
    try:
        _reset_signals(launch)
        os.setsid()
        die_with_parent(supervisor, signal.SIGKILL)
        _arrange_descriptors(descriptors, failure, set() if maps is None else maps.descriptors)
        if launch.plan is not None:
            _enter_sandbox(launch.plan, maps, has_channel=Role.CHANNEL in descriptors)
        _apply_limits(launch)
        os.umask(0o022)
        os.chdir(launch.working_directory)
        os.environ.clear()
        os.environ.update(launch.environment)
    except Exception as error:
        code = getattr(error, "exit_code", None)  # a sandbox tells by it that the job's program is at fault
        _give_up(SpawnFailed(type(error).__name__, str(error), is_fault_of_job=code is not None, exit_code=code))
    if launch.argv:
        _execute(launch)
    os.close(FAILURE_DESCRIPTOR)
    _call_entry(launch)


def _give_up(reason: SpawnFailed) -> NoReturn:
    message = msgspec.structs.replace(reason, message=reason.message[:1000])
    os.write(FAILURE_DESCRIPTOR, encode(message))
    os._exit(BROKEN_EXIT_CODE)


def _reset_signals(launch: Launch) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL if launch.argv else signal.default_int_handler)
    if launch.argv:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and a program would inherit that
            signal.signal(number, signal.SIG_DFL)


def _enter_sandbox(plan: bytes, maps: OwnerMaps | None, *, has_channel: bool) -> None:
    """Go on as the job inside. The process that stays outside keeps the way to tell that the sandbox failed."""
    keep = {FAILURE_DESCRIPTOR} | ({CHANNEL_DESCRIPTOR} if has_channel else set())
    enter(msgspec.msgpack.decode(plan, type=SandboxPlan), keep=keep, hold={FAILURE_DESCRIPTOR}, maps=maps)


def _arrange_descriptors(descriptors: dict[Role, int], failure: int, keep: set[int]) -> None:
    """Leave the job with 0, 1, 2, its channel as 3, and 4 to tell why it could not start; ``keep`` is needed until then."""
    wanted = {0: Role.STDIN, 1: Role.STDOUT, 2: Role.STDERR, CHANNEL_DESCRIPTOR: Role.CHANNEL}
    high = {number: _move_up(descriptors[role]) for number, role in wanted.items() if role in descriptors}
    high[FAILURE_DESCRIPTOR] = _move_up(failure)
    os.closerange(CHANNEL_DESCRIPTOR, FAILURE_DESCRIPTOR + 1)
    for number, source in high.items():
        os.dup2(source, number, inheritable=number <= 2)
    close_all_but({*range(FAILURE_DESCRIPTOR + 1), *keep})


def _move_up(descriptor: int) -> int:
    """Return a copy above the numbers that are about to be given away."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _ABOVE_ALL_GIVEN)


def _apply_limits(launch: Launch) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if launch.memory_mb is not None:
        # What a fork of the zygote has mapped already is not the job's; a program replaces it.
        size = launch.memory_mb * 1024 * 1024 + (0 if launch.argv else _mapped_bytes())
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    if launch.cpus is not None:
        usable = sorted(os.sched_getaffinity(0))
        wanted = min(len(usable), max(1, -int(-launch.cpus // 1)))
        first = os.getpid() % len(usable)  # spread jobs over the processors
        os.sched_setaffinity(0, {usable[(first + i) % len(usable)] for i in range(wanted)})


def _mapped_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _execute(launch: Launch) -> NoReturn:
    try:
        os.execvpe(launch.argv[0], list(launch.argv), launch.environment)  # noqa: S606 -- the point: no shell
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        code = NOT_FOUND_EXIT_CODE if missing else NOT_EXECUTABLE_EXIT_CODE
        why = "there is no such program on the job's PATH" if missing else str(error.strerror)
        reason = f"cannot run {launch.argv[0][:500]!r}: {why}"
        _give_up(SpawnFailed("CommandNotRunnable", reason, is_fault_of_job=True, exit_code=code))


def _call_entry(launch: Launch) -> NoReturn:
    code = BROKEN_EXIT_CODE
    try:
        module, _, name = launch.entry.partition(":")
        code = getattr(importlib.import_module(module), name)(socket.socket(fileno=CHANNEL_DESCRIPTOR), launch)
    except BaseException:  # the edge of a job: its stderr shows what is wrong with ours, and the exit code tells
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)

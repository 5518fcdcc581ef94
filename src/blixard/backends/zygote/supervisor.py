"""The supervisor of one runner: starts its process, ends the whole tree on request, and tells when nothing of it is left.

It is forked from the zygote and runs no code of the job. It adopts every process that the job orphans.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import select
import signal
import socket
import sys
from typing import NoReturn

from blixard.backends.workspace import make_directory, place_inputs, remove_tree
from blixard.backends.zygote.kernel import adopt_orphans, die_with_parent, kill_descendants
from blixard.backends.zygote.messages import (
    KILL,
    TERMINATE,
    ControlMessage,
    Exited,
    Launch,
    Role,
    Spawned,
    SpawnFailed,
    encode,
)

CHANNEL_DESCRIPTOR = 3
NOT_EXECUTABLE_EXIT_CODE = 126
NOT_FOUND_EXIT_CODE = 127
BROKEN_EXIT_CODE = 70
_MAX_DESCRIPTOR = 1 << 20


class Supervisor:
    def __init__(self, launch: Launch, descriptors: dict[Role, int]) -> None:
        self._launch = launch
        self._descriptors = descriptors
        self._control = socket.socket(fileno=descriptors[Role.CONTROL])
        self._child = 0
        self._code: int | None = None

    def run(self, zygote: int) -> NoReturn:
        """Run the job to its end. Returns never: the process ends."""
        self._wake = self._catch_signals()
        die_with_parent(zygote, signal.SIGTERM)
        adopt_orphans()
        ending: ControlMessage
        try:
            self._start()
            ending = Exited(self._watch())
        except _NotStartedError as error:
            ending = error.message
        kill_descendants()
        self._clean_up()
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
        reading, writing = os.pipe2(os.O_CLOEXEC)
        supervisor = os.getpid()
        try:
            self._child = os.fork()
        except OSError as error:
            raise _NotStartedError(SpawnFailed("ForkFailed", f"fork: {error.strerror}")) from error
        if self._child == 0:
            _become_runner(self._launch, self._descriptors, supervisor, writing)
        os.close(writing)
        for role, descriptor in self._descriptors.items():
            if role is not Role.CONTROL:
                os.close(descriptor)
        if self._launch.argv:
            self._check_executed(reading)
        os.close(reading)
        self._tell(Spawned(self._child))

    def _check_executed(self, reading: int) -> None:
        """Wait for the program to be executed (the pipe closes by itself) or for the reason why not."""
        reason = b""
        while part := os.read(reading, 4096):
            reason += part
        if reason:
            code, _, text = reason.decode().partition(" ")
            raise _NotStartedError(SpawnFailed("CommandNotRunnable", text, is_fault_of_job=True, exit_code=int(code)))

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
            self._kill()

    def _take_order(self) -> None:
        order = self._control.recv(16)
        if order == TERMINATE:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child, signal.SIGTERM)
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


def _become_runner(launch: Launch, descriptors: dict[Role, int], supervisor: int, failure: int) -> NoReturn:
    """Turn the fresh fork into the job's process. Never returns to the supervisor's code."""
    code = BROKEN_EXIT_CODE
    try:
        _reset_signals(launch)
        os.setsid()
        die_with_parent(supervisor, signal.SIGKILL)
        if launch.plan is not None:
            _enter_sandbox(launch.plan)
        _arrange_descriptors(descriptors, failure if launch.argv else None)
        _apply_limits(launch)
        os.umask(0o022)
        os.chdir(launch.working_directory)
        if launch.argv:
            _execute(launch, CHANNEL_DESCRIPTOR + 1)
        code = _call_entry(launch)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # noqa: BLE001 -- to the job's stderr: the edge of a job
    finally:
        os._exit(code)


def _reset_signals(launch: Launch) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # In a sandbox the process that waits outside must outlive a polite end; the inner one sets its own handling.
    signal.signal(signal.SIGTERM, signal.SIG_IGN if launch.plan is not None else signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL if launch.argv else signal.default_int_handler)
    if launch.argv:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and a program would inherit that
            signal.signal(number, signal.SIG_DFL)


def _enter_sandbox(plan: bytes) -> None:
    module = importlib.import_module("blixard.backends.sandbox.namespaces")
    module.enter(module.decode_plan(plan))
    signal.signal(signal.SIGTERM, _end_politely if os.getpid() == 1 else signal.SIG_DFL)


def _end_politely(number: int, _frame: object) -> None:
    """As pid 1: the kernel drops signals that pid 1 does not handle, so their default must be spelled out."""
    os._exit(128 + number)


def _arrange_descriptors(descriptors: dict[Role, int], failure: int | None) -> None:
    """Leave the job with 0, 1, 2, its channel as 3, and (until it is executed) the failure pipe as 4."""
    high = {role: _move_up(number) for role, number in descriptors.items() if role is not Role.CONTROL}
    reason = None if failure is None else _move_up(failure)
    for role, number in ((Role.STDIN, 0), (Role.STDOUT, 1), (Role.STDERR, 2)):
        os.dup2(high[role], number)
    first_closed = CHANNEL_DESCRIPTOR
    if Role.CHANNEL in high:
        os.dup2(high[Role.CHANNEL], CHANNEL_DESCRIPTOR, inheritable=False)
        first_closed += 1
    if reason is not None:
        os.dup2(reason, CHANNEL_DESCRIPTOR + 1, inheritable=False)
        os.closerange(first_closed, CHANNEL_DESCRIPTOR + 1)
        first_closed = CHANNEL_DESCRIPTOR + 2
    os.closerange(first_closed, _MAX_DESCRIPTOR)


def _move_up(descriptor: int) -> int:
    """Return a copy above the numbers that are about to be given away."""
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64)


def _apply_limits(launch: Launch) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if launch.memory_mb is not None:
        size = launch.memory_mb * 1024 * 1024
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    if launch.cpus is not None:
        usable = sorted(os.sched_getaffinity(0))
        wanted = min(len(usable), max(1, -int(-launch.cpus // 1)))
        first = os.getpid() % len(usable)  # spread jobs over the processors
        os.sched_setaffinity(0, {usable[(first + i) % len(usable)] for i in range(wanted)})


def _execute(launch: Launch, failure: int) -> NoReturn:
    os.environ.clear()
    os.environ.update(launch.environment)
    try:
        os.execvpe(launch.argv[0], list(launch.argv), launch.environment)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        code = NOT_FOUND_EXIT_CODE if missing else NOT_EXECUTABLE_EXIT_CODE
        reason = "there is no such program on the job's PATH" if missing else error.strerror
        os.write(failure, f"{code} cannot run {launch.argv[0]!r}: {reason}".encode())
        os._exit(code)


def _call_entry(launch: Launch) -> int:
    os.environ.clear()
    os.environ.update(launch.environment)
    module, _, name = launch.entry.partition(":")
    entry = getattr(importlib.import_module(module), name)
    code = entry(socket.socket(fileno=CHANNEL_DESCRIPTOR), launch)
    assert isinstance(code, int)
    return code

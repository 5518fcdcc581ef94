"""What a job can leave behind in a process that goes on, and how it is put back: the environment, signals, limits and more."""

from __future__ import annotations

import _locale
import _signal  # type: ignore[import-not-found]  # typeshed has no stub of it
import _thread
import contextlib
import gc
import os
import resource
import signal
import sys
import time

from blixard.backends.workspace import empty_directory
from blixard.backends.zygote.kernel import Watch, count_unread, kill_descendants

MAX_GROWTH_KB = 256 * 1024
"""An executor whose peak memory has grown by more since its start is replaced."""
MAX_NEW_DESCRIPTORS = 64
"""An executor with more new open files than that is replaced: somebody does not close them."""
UMASK = 0o022
_LOOK_SECONDS = 0.0002
_SIGNALS = tuple(sorted(int(number) for number in signal.valid_signals()))
_get_signal = _signal.getsignal  # signal.getsignal makes an enum of every answer: twenty times slower

_LIMITS_MODULE = resource.__name__
_LIMITS = tuple(sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")}))


class Environment:
    """The variables of the process: what every job sees, and what the present one sees besides."""

    def __init__(self) -> None:
        self._base = dict(os.environ)
        self._expected = dict(_variables())
        self._task: dict[str, str] | None = None
        self._told: dict[str, str] = {}

    def set_up(self, task: dict[str, str], job: dict[str, str]) -> None:
        """Make the environment of the next job: the base, then what its spec names, then what tells the job."""
        if task is not self._task:
            os.environ.clear()
            os.environ.update(self._base)
            os.environ.update(task)
            self._task = task
            self._expected = dict(_variables())
            self._told = {}
        for name, value in job.items():
            if self._told.get(name) != value:
                self._tell(name, value)

    def _tell(self, name: str, value: str) -> None:
        """Set a variable in the process and in all that is known of it: a third of the time that os.environ takes."""
        key, encoded = name.encode(), os.fsencode(value)
        os.putenv(key, encoded)
        _variables()[key] = self._expected[key] = encoded
        self._told[name] = value

    def restore(self) -> None:
        """Undo what the job changed."""
        if _variables() != self._expected:
            self._task = None

    def keep_changes(self) -> None:
        """What an import has changed stays: the module will not be executed again."""
        before = self._expected
        for name in {*before, *_variables()}:
            if before.get(name) != _variables().get(name):
                text = os.fsdecode(name)
                self._base.pop(text, None)
                if name in _variables():
                    self._base[text] = os.environ[text]
        self._expected = dict(_variables())


def _variables() -> dict[bytes, bytes]:
    # The encoded copy that os.environ keeps: comparing it costs a tenth of reading every variable.
    return os.environ._data  # type: ignore[attr-defined,no-any-return]  # noqa: SLF001


class Directories:
    """The private directories, which every job is to find empty; the first is the working directory.

    Listing them would cost more than a short call. The kernel tells whether anything has been put into them.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        self._paths = paths
        self._is_known_to_be_empty = False
        self._descriptor = -1
        self._watch: Watch | None = None
        with contextlib.suppress(OSError):  # a user may have used up what he may have of these: then we list them
            self._watch = Watch(paths)

    def restore(self) -> None:
        """Empty them and go back to the first."""
        if not self._is_known_to_be_empty or self._watch is None or self._watch.has_seen_something():
            self._empty()
        os.fchdir(self._descriptor)

    def _empty(self) -> None:
        for path in self._paths:
            if os.listdir(path):
                empty_directory(path)
        self._close_descriptor()
        self._descriptor = os.open(self._paths[0], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._watch is not None:
            self._watch.begin_again()
            self._is_known_to_be_empty = True

    def close(self) -> None:
        self._close_descriptor()
        if self._watch is not None:
            self._watch.close()

    def _close_descriptor(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Surroundings:
    """The state of the process as jobs are to find it, taken at this moment."""

    def __init__(self, directories: tuple[str, ...]) -> None:
        self._directories = Directories(directories)
        self._argv = list(sys.argv)
        self._path = list(sys.path)
        self._handlers = [_get_signal(number) for number in _SIGNALS]
        self._mask = _signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._limits = [resource.getrlimit(number) for number in _LIMITS]
        sys.modules.pop(
            _LIMITS_MODULE, None
        )  # so that we see whether a job's code imports it: sixteen calls less for most
        self._locale = _locale.setlocale(_locale.LC_ALL)
        self._memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._threads = _thread._count()  # noqa: SLF001 -- counts threads that were started below ``threading`` too
        self._first_free = _first_free_descriptor()

    def close(self) -> None:
        """Give up: another one takes its place."""
        self._directories.close()

    def restore(self, *, is_thorough: bool) -> str | None:
        """Put everything back as it was. Return why this process must not run another job, None if it may.

        ``is_thorough``: look also for what no other job can notice and only adds up: memory and open files.
        """
        self._restore_signals()
        os.umask(UMASK)
        if sys.argv != self._argv:
            sys.argv = list(self._argv)
        if sys.path != self._path:
            sys.path[:] = self._path
        if _locale.setlocale(_locale.LC_ALL) != self._locale:
            _locale.setlocale(_locale.LC_ALL, self._locale)
        return self._check_leftovers() or (self._check_growth() if is_thorough else None) or self._restore_directories()

    def _restore_signals(self) -> None:
        _signal.alarm(0)  # the same timer as ITIMER_REAL, in less time
        if list(map(_get_signal, _SIGNALS)) != self._handlers:
            for number, handler in zip(_SIGNALS, self._handlers, strict=True):
                if _get_signal(number) != handler:
                    signal.signal(number, handler)
        if _signal.pthread_sigmask(signal.SIG_BLOCK, ()) != self._mask:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _check_leftovers(self) -> str | None:
        if _thread._count() > self._threads:  # noqa: SLF001 -- the threading module does not know of native ones
            return "the job left a thread running"
        if _has_children():
            kill_descendants()
            return "the job left a process running"
        if _LIMITS_MODULE in sys.modules and [resource.getrlimit(number) for number in _LIMITS] != self._limits:
            return "the job changed a resource limit"
        return None

    def _check_growth(self) -> str | None:
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > self._memory + MAX_GROWTH_KB:
            return "the process grew"
        if _first_free_descriptor() > self._first_free + MAX_NEW_DESCRIPTORS:
            return "jobs left many files open"
        return None

    def _restore_directories(self) -> str | None:
        try:
            self._directories.restore()
        except OSError as error:
            return f"the job's directories cannot be put back: {error}"
        return None


def unread_bytes(descriptor: int) -> int:
    """Return how many bytes lie in the pipe behind this descriptor."""
    try:
        return count_unread(descriptor)
    except OSError:
        return 0  # the job closed or replaced it


def wait_until_read(descriptors: tuple[int, ...]) -> None:
    """Return when the backend has emptied these pipes. It does so when it hears the answer; nothing announces it here."""
    while any(map(unread_bytes, descriptors)):
        time.sleep(_LOOK_SECONDS)


def _has_children() -> bool:
    """Say whether a live process descends from this one, which adopts orphans. Collects the ended ones."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    gc.collect()  # a Popen object may wait for its process in its finaliser
    return True


def _first_free_descriptor() -> int:
    number = os.dup(2)
    os.close(number)
    return number

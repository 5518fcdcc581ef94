"""Runs a function or a script of a job and turns whatever happens into an ``Ending``."""

from __future__ import annotations

import asyncio
import atexit
import base64
import builtins
import importlib
import inspect
import linecache
import os
import pickle
import sys
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any  # a job's own values

import msgspec

from blixard.backends.executor.messages import Task
from blixard.domain.json_text import encode_json
from blixard.domain.limits import MAX_ERROR_BYTES, MAX_RESULT_BYTES
from blixard.domain.outcome import AttemptError

_OURS = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    os.path.dirname(os.path.abspath(asyncio.__file__)) + os.sep,
    os.path.abspath(importlib.__file__),
    "<frozen importlib",
)
"""Frames of these stand between us and the job's code; they are left out of its traceback."""
_CUT = "\n  ... the middle is left out ...\n"


class Ending(msgspec.Struct, frozen=True):
    exit_code: int
    result: bytes | None = None
    error: AttemptError | None = None


class _NotCallableError(Exception):
    """The job cannot even be called; trying again would not help."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.error = AttemptError(type=kind, message=message, retryable=False)


class _ResultError(_NotCallableError):
    pass


class FunctionCaller:
    """Calls one function again and again; it is found once."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._function: Callable[..., Any] | None = None

    @property
    def is_loaded(self) -> bool:
        return self._function is not None

    def load(self) -> Ending | None:
        """Import the function. Return how the call ended if that failed."""
        if self._function is not None:
            return None
        try:
            self._function = find_function(str(self._task.function))
        except BaseException as error:  # the edge of a job: whatever its module raises is its failure
            return describe(error, self._task.memory_mb)
        return None

    def call(self, arguments: bytes) -> Ending:
        assert self._function is not None
        try:
            args, kwargs = _decode_arguments(arguments, self._task.encoding)
            value = self._function(*args, **kwargs)
            if inspect.iscoroutine(value):
                value = asyncio.run(value)
            return Ending(0, _encode_result(value, self._task.encoding))
        except BaseException as error:  # the edge of a job
            return describe(error, self._task.memory_mb)


def find_function(name: str) -> Callable[..., Any]:
    """Import ``module:qualname`` and return what to call."""
    module_name, _, path = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            message = f"there is no module {module_name!r} in the job's code nor in the worker's interpreter"
            raise _NotCallableError("FunctionNotFound", message) from error
        raise
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise _NotCallableError("FunctionNotFound", f"module {module_name!r} has no function {path!r}")
    found = getattr(found, "__blixard_function__", found)
    if not callable(found):
        raise _NotCallableError("FunctionNotFound", f"{path!r} of module {module_name!r} is not a function")
    return found  # type: ignore[no-any-return]  # callable(), as far as can be known


_decode_json = msgspec.json.Decoder().decode


def _decode_arguments(arguments: bytes, encoding: str) -> tuple[Sequence[Any], dict[str, Any]]:
    try:
        decoded = _decode_json(arguments)
        if encoding == "msgpack":
            decoded = msgspec.msgpack.decode(base64.b64decode(decoded, validate=True))
        elif encoding == "pickle":
            decoded = pickle.loads(base64.b64decode(decoded, validate=True))  # noqa: S301 -- the job asked for it by name
        args, kwargs = decoded
    except (ValueError, TypeError, msgspec.DecodeError) as error:
        message = f"the arguments are not [args, kwargs] in {encoding}: {error}"
        raise _NotCallableError("InvalidArguments", message) from error
    return args, kwargs


def _encode_result(value: object, encoding: str) -> bytes:
    try:
        if encoding == "json":
            result = encode_json(value)
        else:
            packed = msgspec.msgpack.encode(value) if encoding == "msgpack" else pickle.dumps(value)
            result = b'"' + base64.b64encode(packed) + b'"'
    except MemoryError:
        raise
    except Exception as error:  # the edge of a job: any class of the job's may refuse in its own way
        kind = "JSON" if encoding == "json" else encoding
        message = f"the result of type {type(value).__qualname__} cannot be written as {kind}: {error}"
        raise _ResultError("ResultNotSerializable", message) from error
    if len(result) > MAX_RESULT_BYTES:
        message = (
            f"the result is {len(result)} bytes; MAX_RESULT_BYTES allows {MAX_RESULT_BYTES}: write it to a file instead"
        )
        raise _ResultError("ResultTooLarge", message)
    return result


def run_script(task: Task, arguments: bytes) -> Ending:
    """Run the script as ``__main__`` to its end, with all that Python does at an interpreter's end."""
    try:
        path = os.path.join(str(task.root), str(task.path))
        words = msgspec.json.decode(arguments, type=list[str])
        ending = _run_main(path, words)
    except BaseException as error:  # the edge of a job
        ending = describe(error, task.memory_mb)
        if ending.error is not None and ending.error.traceback is not None:
            print(ending.error.traceback, file=sys.stderr, end="")
    return _shut_down(ending)


def _run_main(path: str, words: list[str]) -> Ending:
    sys.argv = [path, *words]
    sys.path.insert(0, os.path.dirname(path))
    module = types.ModuleType("__main__")
    module.__file__ = path
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, module.__dict__)  # noqa: S102 -- this is the job
    return Ending(0)


def _shut_down(ending: Ending) -> Ending:
    """Wait for the script's threads and run its exit handlers, as the interpreter would."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 -- no public way waits for non-daemon threads
        atexit._run_exitfuncs()  # noqa: SLF001 -- nor runs the handlers
    except BaseException as error:  # the edge of a job
        return describe(error, None)
    return ending


def describe(error: BaseException, memory_mb: int | None) -> Ending:
    """Say how an exception ends a job."""
    try:
        return _describe(error, memory_mb)
    except MemoryError:
        return Ending(1, error=AttemptError(type="MemoryLimit", message="there was not even memory to tell the error"))


def _describe(error: BaseException, memory_mb: int | None) -> Ending:
    if isinstance(error, _NotCallableError):
        return Ending(1, error=error.error)
    if isinstance(error, SystemExit):
        return _describe_exit(error)
    kind, message = type(error).__qualname__, _text_of(error)
    retryable = getattr(type(error), "__blixard_retryable__", True) is not False
    hint = None
    if isinstance(error, MemoryError) and memory_mb is not None:
        kind, message = "MemoryLimit", f"the job needs more than its memory limit of {memory_mb} MB"
        hint = "ask for more with memory_mb"
    trace = format_traceback(error)
    return Ending(1, error=AttemptError(type=kind, message=message, traceback=trace, retryable=retryable, hint=hint))


def _describe_exit(error: SystemExit) -> Ending:
    code = error.code
    if code is None or code == 0:
        return Ending(0, b"null")
    if isinstance(code, int):
        return Ending(
            code & 0xFF, error=AttemptError(type="SystemExit", message=f"the job ended with exit code {code & 0xFF}")
        )
    print(code, file=sys.stderr)
    return Ending(1, error=AttemptError(type="SystemExit", message=_shorten(str(code))))


def _text_of(error: BaseException) -> str:
    try:
        return _shorten(str(error))
    except Exception as worse:  # the edge of a job: its __str__ is its own code
        return f"(its text cannot be told: {type(worse).__qualname__})"


def format_traceback(error: BaseException) -> str:
    """Return the traceback as Python prints it, without the frames that lead from us to the job's code."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_OURS):
        frames = frames.tb_next
    linecache.checkcache()
    try:
        return _shorten("".join(traceback.format_exception(type(error), error, frames)))
    except MemoryError:
        raise
    except Exception as worse:  # the edge of a job: formatting calls its __str__ and __repr__
        return f"(the traceback cannot be told: {type(worse).__qualname__})"


def _shorten(text: str) -> str:
    data = text.encode(errors="backslashreplace")
    if len(data) <= MAX_ERROR_BYTES // 2:
        return data.decode()
    half = MAX_ERROR_BYTES // 4 - len(_CUT)
    return data[:half].decode(errors="ignore") + _CUT + data[-half:].decode(errors="ignore")

"""From an error to what its reader sees and the exit code: the only place where this is decided."""

from __future__ import annotations

import os
import sys
import traceback

from blixard.cli.invocation import Invocation
from blixard.cli.output import ReaderGone
from blixard.errors import (
    BlixardError,
    CallerError,
    JobCancelled,
    JobError,
    JobTimedOut,
    WaitTimedOut,
)

USAGE = 2
TIMED_OUT = 124
OURS = 125
INTERRUPTED = 130
BROKEN_PIPE = 141
_RED, _DIM, _PLAIN = "\033[31m", "\033[2m", "\033[0m"


def report(error: BaseException, invocation: Invocation) -> int:
    """Write what happened and what to do about it to standard error and return the exit code."""
    error = first_of(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError | ReaderGone):
        return BROKEN_PIPE
    if isinstance(error, BlixardError):
        show_error(str(error), error.hint)
        if invocation.verbose:
            traceback.print_exception(error, file=sys.stderr)
        return exit_code_of(error)
    if (usage := _usage_text(error)) is not None:
        return usage
    return _report_bug(error, invocation)


def first_of(error: BaseException) -> BaseException:
    """Return the first error of a group of them: tasks that run together fail together, for the same reason."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def exit_code_of(error: BlixardError) -> int:
    match error:
        case CallerError():
            return USAGE
        case JobTimedOut() | WaitTimedOut():
            return TIMED_OUT
        case JobCancelled():
            return INTERRUPTED
        case JobError(exit_code=code):
            return code or 1
        case _:
            return OURS


def show_error(message: str, hint: str | None = None) -> None:
    red, dim, plain = (_RED, _DIM, _PLAIN) if use_colour() else ("", "", "")
    print(f"{red}error:{plain} {message}", file=sys.stderr)
    if hint:
        print(f"{dim}hint:{plain} {hint}", file=sys.stderr)


def use_colour() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _usage_text(error: BaseException) -> int | None:
    """Tell a mistake that Typer found in the arguments; None if it is none."""
    from typer import Abort, TyperException

    if isinstance(error, Abort):
        return INTERRUPTED
    if not isinstance(error, TyperException):
        return None
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
        return USAGE
    path = context.command_path if context is not None else "blixard"
    # Typer passes on what its validation library says, prefix included, and lists choices over several lines.
    message = " ".join(error.format_message().replace("Value error, ", "").split())
    show_error(_lower_first(message), _usage_hint(error, path))
    return error.exit_code


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _usage_hint(error: BaseException, path: str) -> str:
    option = getattr(error, "option_name", None)
    if option in {"--server", "--data-dir", "--config", "--verbose", "--quiet", "-v", "-q"}:
        return f"it stands before the command: blixard {option} … {path.removeprefix('blixard ')}"
    if option and path.rpartition(" ")[2] in {"run", "submit"}:
        return f"arguments for the program go behind `--`: {path} hello.py -- {option}; `{path} --help` lists ours"
    return f"`{path} --help` shows how it is used"


def _report_bug(error: BaseException, invocation: Invocation) -> int:
    if invocation.verbose:
        traceback.print_exception(error, file=sys.stderr)
        return OURS
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        show_error(f"{where}{error.strerror}", "with --verbose it shows where this happened")
        return OURS
    show_error(
        f"unexpected {type(error).__name__}: {error}",
        "this is a bug in Blixard; BLIXARD_DEBUG=1 shows where it happened",
    )
    return OURS

"""The program ``blixard``: one place where arguments come in and an exit code goes out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from blixard.cli.invocation import Connect, Invocation


def main() -> NoReturn:
    """Run the command line of this process and leave with its exit code."""
    code = run_command_line(sys.argv[1:])
    sys.exit(_flush(code))


def run_command_line(arguments: Sequence[str], *, connect: Connect | None = None) -> int:
    """Run one command and return its exit code; every error has been written to standard error by then.

    ``connect`` replaces the client that the settings would choose.
    """
    _open_missing_streams()
    invocation = Invocation(connect)
    try:
        from blixard.cli.root import build_root

        # Not standalone: Typer would print its errors in its own way and choose its own exit codes.
        code = build_root().main(args=list(arguments), prog_name="blixard", standalone_mode=False, obj=invocation)
    except (Exception, KeyboardInterrupt) as error:  # the edge of the program: everything is told to its user
        return _report(error, invocation)
    return code if isinstance(code, int) else 0


def _report(error: BaseException, invocation: Invocation) -> int:
    from blixard.cli.failures import BROKEN_PIPE, report

    try:
        return report(error, invocation)
    except OSError:  # standard error is gone as well: nobody is left to be told
        return BROKEN_PIPE


def _open_missing_streams() -> None:
    """Give a process that was started with a closed stream (`>&-`) somewhere to write to."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  lives as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  lives as long as the process


def _flush(code: int) -> int:
    """Write out what is buffered; if nobody reads it any more, keep the interpreter from complaining at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 141
    return code

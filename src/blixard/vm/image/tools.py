"""Programs of the host that build an image: run with a deadline, their last words kept for the error."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from blixard.errors import NotSupportedHere, Unavailable

TOOL_SECONDS = 900.0
"""Longer than any build on a slow machine; a program that hangs for ever does not hang us."""
MAX_TAIL_BYTES = 64 * 1024


class ToolFailed(Exception):
    """A program ended with an error; ``output`` is the end of what it wrote."""

    def __init__(self, program: str, code: int, output: str) -> None:
        super().__init__(f"{program} ended with exit code {code}")
        self.program, self.code, self.output = program, code, output


def run_tool(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, directory: Path | None = None, seconds: float = TOOL_SECONDS
) -> str:
    """Run a program to its end and return the end of what it wrote.

    It and its children are killed when it takes longer than ``seconds`` or this call is interrupted.
    Raises ``ToolFailed``, ``NotSupportedHere`` (there is no such program), ``Unavailable`` (it took too long).
    """
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(env), cwd=directory, process_group=0
            )
        except FileNotFoundError as error:
            raise NotSupportedHere(
                f"{argv[0]} is not installed", hint="`blixard doctor` says how to get it"
            ) from error
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{argv[0]} did not end within {seconds:.0f} s") from error
        finally:
            _end_group(process)
        output = _tail(log.fileno())
    if code != 0:
        raise ToolFailed(Path(argv[0]).name, code, output)
    return output


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    # What programs say is read by us, so it has to be in English; sbin has mke2fs and is not in everybody's PATH.
    path = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
    return {**os.environ, "PATH": path, "LC_ALL": "C.UTF-8", **(env or {})}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _tail(file: int) -> str:
    size = os.fstat(file).st_size
    return os.pread(file, MAX_TAIL_BYTES, max(0, size - MAX_TAIL_BYTES)).decode("utf-8", "replace")

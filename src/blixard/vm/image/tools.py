"""Programs of the host that build an image: run with a deadline, their last words kept for the error."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from blixard.errors import NotSupportedHere, Unavailable

TOOL_SECONDS = 900.0
"""Longer than any build on a slow machine; a program that hangs for ever does not hang us."""
MAX_TAIL_BYTES = 64 * 1024
_TURN_SECONDS = 0.1
_PATIENCE_SECONDS = 10.0
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
"""Has mke2fs and is not in everybody's PATH."""


class ToolFailed(Exception):
    """A program ended with an error; ``output`` is the end of what it wrote."""

    def __init__(self, program: str, code: int, output: str) -> None:
        super().__init__(f"{program} ended with exit code {code}")
        self.program, self.code, self.output = program, code, output


class BuildStopped(Unavailable):
    """Somebody stopped the build; nothing of it is left."""


class Tools:
    """Starts programs of one build; any of the events ends them all, and every later one at once."""

    def __init__(self, *stops: threading.Event) -> None:
        self._stops = stops

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        directory: Path | None = None,
        watch: Callable[[str], None] = lambda _: None,
        seconds: float = TOOL_SECONDS,
    ) -> str:
        """Run a program to its end and return the end of what it wrote; ``watch`` is given its lines as they come.

        It is killed with its children when it takes longer than ``seconds``, when the build is stopped, or when this call is interrupted.
        Raises ``ToolFailed``, ``NotSupportedHere`` (there is no such program), ``Unavailable`` (too long), ``BuildStopped``.
        """
        with tempfile.TemporaryFile() as log:
            process = self._start(argv, log, env, directory)
            try:
                self._wait(process, _Lines(log, watch), seconds)
            finally:
                _end_group(process)
            output = _tail(log)
        if process.returncode != 0:
            raise ToolFailed(Path(argv[0]).name, process.returncode, output)
        return output

    def _start(
        self, argv: Sequence[str], log: IO[bytes], env: Mapping[str, str] | None, directory: Path | None
    ) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [find_program(argv[0]), *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(env),
                cwd=directory,
                process_group=0,
            )
        except FileNotFoundError as error:
            raise NotSupportedHere(f"{argv[0]} is not installed", hint="`blixard doctor` says how to get it") from error

    def _wait(self, process: subprocess.Popen[bytes], lines: _Lines, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                process.wait(_TURN_SECONDS)
            except subprocess.TimeoutExpired:
                lines.look()
            else:
                return lines.look()
            if any(stop.is_set() for stop in self._stops):
                raise BuildStopped("the build was stopped")
            if time.monotonic() > deadline:
                raise Unavailable(f"{process.args[0]!r} did not end within {seconds:.0f} s")  # type: ignore[index]  # a list, we made it


class _Lines:
    """Hands on the whole lines that have come since the last look."""

    def __init__(self, log: IO[bytes], watch: Callable[[str], None]) -> None:
        self._log, self._watch, self._at = log.fileno(), watch, 0

    def look(self) -> None:
        data = os.pread(self._log, MAX_TAIL_BYTES, self._at)
        whole = data[: data.rfind(b"\n") + 1] if len(data) < MAX_TAIL_BYTES else data
        self._at += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            self._watch(line)


def find_program(name: str) -> str:
    """Return the path of a program, also of one for root; the name itself if there is none."""
    return shutil.which(name, path=_path()) or name


def _path() -> str:
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:{_SBIN}"


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    # What they say is read by us, so it has to be in English.
    return {**os.environ, "PATH": _path(), "LC_ALL": "C.UTF-8", "LANGUAGE": "C", **(env or {})}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what still runs of a program and its children: asked first, because mmdebstrap tidies up."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(log: IO[bytes]) -> str:
    size = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), MAX_TAIL_BYTES, max(0, size - MAX_TAIL_BYTES)).decode("utf-8", "replace")

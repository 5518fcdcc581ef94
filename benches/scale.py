"""Memory and speed of ``blixard map`` on long lists, as a person runs it: with a progress bar on a terminal.

``python benches/scale.py [--minimal N] [--standard N] [--served N]`` maps N lines at isolation minimal (default 100,000), in the
standard sandbox (2,000), and at minimal through a server (100,000); 0 leaves one out. Prints a line of JSON for each: seconds,
jobs per second, and for each kind of process of ours the highest resident memory of any one of them in MB (``rss`` as the kernel
recorded it, shared pages counted in each; ``pss``: shared pages divided, as sampled). Exit code 1 if one reached 300 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil

PROGRAM = str(Path(sys.executable).parent / "blixard")
LIMIT_MB = 300.0
SAMPLE_SECONDS = 0.1
PSS_EVERY = 10
"""Samples; adding up the shared pages of a process is slow."""
ROWS, COLUMNS = 40, 120
FUNCTION = "def measure(line):\n    return len(line)\n"


class Terminal:
    """A pseudo terminal whose other side is read all the time; keeps how much came and the last of it."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.bytes = 0
        self.tail = b""
        self.updates = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the last process that held the terminal is gone
            while piece := os.read(self._master, 65536):
                self.bytes += len(piece)
                self.updates += piece.count(b"running")
                self.tail = (self.tail + piece)[-4096:]

    def close(self) -> None:
        os.close(self.slave)
        self._reader.join(10.0)
        os.close(self._master)


class Meter:
    """Samples the memory of processes and of all below them until it is stopped."""

    def __init__(self, *roots: int) -> None:
        self.rss: dict[str, float] = defaultdict(float)
        self.pss: dict[str, float] = defaultdict(float)
        self.samples = 0
        self._roots = [psutil.Process(root) for root in roots]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            with_pss = self.samples % PSS_EVERY == 0
            for process in self._processes():
                with contextlib.suppress(OSError, psutil.Error):  # it has ended meanwhile
                    self._sample(process, with_pss=with_pss)
            self.samples += 1

    def _processes(self) -> Iterator[psutil.Process]:
        for root in self._roots:
            with contextlib.suppress(psutil.Error):
                yield root
                yield from root.children(recursive=True)

    def _sample(self, process: psutil.Process, *, with_pss: bool) -> None:
        kind = kind_of(process)
        self.rss[kind] = max(self.rss[kind], read_kib(f"/proc/{process.pid}/status", "VmHWM") / 1024)
        if with_pss:
            self.pss[kind] = max(self.pss[kind], read_kib(f"/proc/{process.pid}/smaps_rollup", "Pss") / 1024)


def kind_of(process: psutil.Process) -> str:
    words = process.cmdline()
    if "serve" in words:
        return "server"
    if "map" in words:
        return "command"
    if "blixard.worker.program" in words:
        return "worker"
    parent = process.parent()
    if parent is not None and "blixard.worker.program" in parent.cmdline():
        return "zygote"
    return "executor"


def read_kib(path: str, name: str) -> int:
    """Return a field of a file of the kernel; 0 for a process that has just ended."""
    for line in Path(path).read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0


def measure(isolation: str, count: int, *, served: bool) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="blixard-scale-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        environment = dict(os.environ, BLIXARD_STORAGE__DATA_DIR=str(directory / "data"), TERM="xterm-256color")
        (directory / "lengths.py").write_text(FUNCTION)
        (directory / "list").write_text("".join(f"line {number}\n" for number in range(count)))
        server = stack.enter_context(serving(environment)) if served else None
        began = time.monotonic()
        terminal, meter = run_map(directory, environment, isolation, server)
        seconds = time.monotonic() - began
        check_output(directory / "out", count)
        return {
            "isolation": isolation,
            "served": served,
            "jobs": count,
            "seconds": round(seconds, 1),
            "jobs_per_second": round(count / seconds),
            "rss_mb": {kind: round(size, 1) for kind, size in sorted(meter.rss.items())},
            "pss_mb": {kind: round(size, 1) for kind, size in sorted(meter.pss.items())},
            "samples": meter.samples,
            "bar_updates": terminal.updates,
        }


def run_map(directory: Path, environment: dict[str, str], isolation: str, server: int | None) -> tuple[Terminal, Meter]:
    terminal = Terminal()
    with (directory / "out").open("wb") as out:
        process = subprocess.Popen(
            [PROGRAM, "map", "--isolation", isolation, "lengths.py:measure", "list"],
            cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=terminal.slave,
        )  # fmt: skip
    with Meter(process.pid, *([server] if server else [])) as meter:
        code = process.wait()
    terminal.close()
    if code != 0:
        raise SystemExit(f"map ended with {code}: {terminal.tail.decode(errors='replace')}")
    return terminal, meter


@contextlib.contextmanager
def serving(environment: dict[str, str]) -> Iterator[int]:
    process = subprocess.Popen(
        [PROGRAM, "serve", "--port", "0"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it listens
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def check_output(path: Path, count: int) -> None:
    lines = path.read_text().splitlines()
    right = {f"line {number}\t{len(f'line {number}')}" for number in range(count)}
    if len(lines) != count or set(lines) != right:
        raise SystemExit(f"{len(lines)} results for {count} lines, {len(set(lines) & right)} of them right")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure map on long lists.")
    parser.add_argument("--minimal", type=int, default=100_000)
    parser.add_argument("--standard", type=int, default=2_000)
    parser.add_argument("--served", type=int, default=100_000)
    given = parser.parse_args()
    worst = 0.0
    for isolation, count, served in (
        ("minimal", given.minimal, False),
        ("standard", given.standard, False),
        ("minimal", given.served, True),
    ):
        if count:
            found = measure(isolation, count, served=served)
            print(json.dumps(found), flush=True)
            assert isinstance(found["rss_mb"], dict)
            worst = max(worst, *found["rss_mb"].values())
    return int(worst >= LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())

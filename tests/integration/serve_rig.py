"""A real server process for tests: `serve` as the shipped command runs it, with a worker that does nothing unless asked otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

DEADLINE = 60.0
IDLE_WORKER = (sys.executable, "-c", "import sys, signal; signal.signal(15, lambda *a: sys.exit(0)); sys.stdin.read()")


async def until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds; for what gives no event to wait for."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - the state of another process or library is only to be looked at
            await asyncio.sleep(0.01)


@dataclass
class Running:
    """A started server. ``ready`` is what it said of itself."""

    process: subprocess.Popen[str]
    url: str
    socket: Path

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for its end and return the exit code."""
        return self.process.wait(DEADLINE)


def command(data_dir: Path, server: Mapping[str, object] | None = None, *, worker: bool = False) -> list[str]:
    options = {"settings": {"storage": {"data_dir": str(data_dir)}, "server": {"port": 0, **(server or {})}}}
    return [sys.executable, "-m", "tests.integration.serve_rig", json.dumps({**options, "worker": worker})]


@contextlib.contextmanager
def running(data_dir: Path, server: Mapping[str, object] | None = None, *, worker: bool = False) -> Iterator[Running]:
    """Start a server and wait until it listens; kill it at the end if it still runs."""
    process = subprocess.Popen(
        command(data_dir, server, worker=worker),
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server ended with {process.wait(DEADLINE)}"
        said = json.loads(line)
        yield Running(process, said["url"], Path(said["socket"]))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE)
        assert process.stdout is not None
        process.stdout.close()


def main() -> int:
    from blixard.api.local_worker import LocalWorker
    from blixard.api.serve import run_server
    from blixard.api.server import Listening, Server
    from blixard.config.settings import Settings
    from blixard.errors import BlixardError
    from blixard.worker.program import program_config

    options = json.loads(sys.argv[1])
    settings = Settings.model_validate(options["settings"])
    idle = LocalWorker(program_config(settings), grace_seconds=5, command=IDLE_WORKER)
    server = Server(settings, worker=None if options["worker"] else idle)

    def ready(listening: Listening) -> None:
        print(msgspec.json.encode(listening, enc_hook=str).decode(), flush=True)

    try:
        return run_server(settings, ready, server=server)
    except BlixardError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())

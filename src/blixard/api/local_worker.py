"""The worker that `blixard serve` runs beside itself: a child process, started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence

import msgspec
import structlog

from blixard.worker.child import COMMAND
from blixard.worker.program import WorkerProgramConfig

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
HEALTHY_SECONDS = 60.0
"""A worker that lived this long did not fail at starting, so the next one is started without delay."""
EXIT_MISUSED = 2
"""The worker's word for a configuration that cannot work here: starting it again would not help."""
KILL_SECONDS = 5.0
"""Beyond the grace time: what a worker may need to report and tidy up before it is killed."""
_log = structlog.get_logger("blixard.server")


class LocalWorker:
    """Keeps one worker process alive. It ends with us however we end: its standard input is our end of a pipe."""

    def __init__(self, config: WorkerProgramConfig, *, grace_seconds: float, command: Sequence[str] = COMMAND) -> None:
        self._config = msgspec.structs.replace(config, parent=os.getpid())
        self._grace_seconds = grace_seconds
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = False
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """The process that runs now."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def start(self) -> None:
        """Begin to keep a worker alive. Allowed once, and not after ``stop``."""
        if not self._stopping:
            self._keeper = asyncio.create_task(self._keep(), name="local-worker")

    async def stop(self) -> None:
        """Let the worker finish what runs or give it back, for the grace time; then kill it. Allowed before start and twice."""
        self._stopping = True
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        try:
            if self._process is not None and self._process.returncode is None:
                await self._end(self._process)
        finally:
            self._kill()
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    def kill(self) -> None:
        """End the worker and its jobs at once; none is started any more. A ``stop`` under way returns soon."""
        self._stopping = True
        self._kill()

    async def _keep(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._stopping:
            born = time.monotonic()
            code = await self._run()
            if self._stopping:
                return
            if code == EXIT_MISUSED:
                _log.error("the local worker cannot work with this configuration and is not started again")
                return
            pause = FIRST_PAUSE_SECONDS if time.monotonic() - born > HEALTHY_SECONDS else pause
            _log.warning("the local worker ended and is started again", exit_code=code, pause=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def _run(self) -> int:
        # A session of its own: Ctrl-C at the terminal is ours to pass on, in the right order.
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        self._process = process
        self.starts += 1
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it died at once: its exit code says so
            process.stdin.write(msgspec.json.encode(self._config) + b"\n")
            await process.stdin.drain()
        return await process.wait()

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace_seconds + KILL_SECONDS):
                await process.wait()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

"""A worker program as a child of this process: started, watched, started again, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Coroutine
from typing import TypeVar

import msgspec

from blixard.errors import WorkerError
from blixard.worker.program import EXIT_MISUSED, WorkerProgramConfig

MAX_QUICK_ENDS = 3
"""A child that ended so often in a row within ``STEADY_SECONDS`` will not do better the next time."""
STEADY_SECONDS = 10.0
RESTART_PAUSE_SECONDS = 0.2
STDERR_BYTES = 8192
STDERR_SECONDS = 1.0
"""How long after the child's end its last words may take: jobs that outlive it for a moment hold the same pipe."""
COMMAND = (sys.executable, "-P", "-m", "blixard.worker.program")
"""-P: what lies in the current directory must not be taken for our modules."""
R = TypeVar("R")


class ChildWorker:
    """At most one worker program that dies with this process, even when it is killed.

    ``start`` returns at once; ``attend`` awaits something and fails with ``WorkerError``, and the child's last words, once
    no child can be kept alive. Bound to the event loop of ``start``.
    """

    def __init__(self, config: WorkerProgramConfig, *, stop_seconds: float) -> None:
        self._config = msgspec.structs.replace(config, parent=os.getpid())
        self._stop_seconds = stop_seconds
        self._supervisor: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._last_words = b""

    @property
    def pid(self) -> int | None:
        """The running child, if there is one."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    def start(self) -> None:
        """See to it that a child runs from now on. Allowed twice; after ``stop`` it does nothing."""
        if self._supervisor is None and not self._stopping:
            self._supervisor = asyncio.create_task(self._supervise(), name="supervise the child worker")

    async def attend(self, waiting: Coroutine[None, None, R]) -> R:
        """Await ``waiting`` while a child runs. Raises ``WorkerError`` when none can be kept alive."""
        self.start()
        if self._supervisor is None:
            return await waiting
        task = asyncio.create_task(waiting)
        try:
            await asyncio.wait([task, self._supervisor], return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and self._supervisor.done() and not self._stopping:
                self._supervisor.result()
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def stop(self) -> None:
        """Let the child give back what has not started and end what runs, killing it if it takes too long. Allowed twice."""
        self._stopping = True
        supervisor = self._supervisor
        if supervisor is None:
            return
        if self._process is None:
            supervisor.cancel()
        else:
            self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._stop_seconds):
                await asyncio.wait([supervisor])
        except TimeoutError:
            self.kill()
            await asyncio.wait([supervisor])
        if not supervisor.cancelled():
            supervisor.exception()  # whoever waited was told; a client that is left is not
        self._supervisor = None

    def kill(self) -> None:
        """End the child at once."""
        self._stopping = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def _supervise(self) -> None:
        quick_ends = 0
        while not self._stopping:
            started_at = time.monotonic()
            code = await self._run_child()
            if self._stopping:
                return
            quick_ends = quick_ends + 1 if time.monotonic() - started_at < STEADY_SECONDS else 1
            if code == EXIT_MISUSED or quick_ends >= MAX_QUICK_ENDS:
                raise self._failure(code)
            await asyncio.sleep(RESTART_PAUSE_SECONDS * quick_ends)

    async def _run_child(self) -> int:
        self._last_words = b""
        # A session of its own: Ctrl-C in the terminal is for the parent, who decides what becomes of the worker.
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._process = process
        reader = asyncio.create_task(self._listen(process), name="listen to the child worker")
        try:
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(self._config) + b"\n")
            if self._stopping:
                self._signal(signal.SIGTERM)
            code = await process.wait()
            await asyncio.wait([reader], timeout=STDERR_SECONDS)
            return code
        finally:
            self._process = None
            reader.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()
            await asyncio.gather(reader, return_exceptions=True)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while piece := await process.stderr.read(STDERR_BYTES):
            self._last_words = (self._last_words + piece)[-STDERR_BYTES:]

    def _failure(self, code: int) -> WorkerError:
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        words = self._last_words.decode(errors="replace").strip()
        return WorkerError(
            f"the worker process that runs the jobs {ended}" + (f":\n{words}" if words else " and said nothing"),
            hint="the jobs are safe and will be continued; `blixard doctor` checks this machine",
        )

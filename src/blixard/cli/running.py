"""`run`: one job from its submission to its exit code."""

from __future__ import annotations

import asyncio
import contextlib

from blixard.cli.failures import INTERRUPTED, OURS, TIMED_OUT, show_error
from blixard.cli.follow import LogFollower
from blixard.cli.output import ReaderGone, note, print_line, write_error, write_out
from blixard.cli.signals import Interrupt
from blixard.client.contract import AsyncClient
from blixard.client.endings import describe_end, is_cancelled
from blixard.domain.outcome import OutcomeKind
from blixard.domain.state_machine import JobState
from blixard.errors import Conflict, NotSupportedHere, Unavailable
from blixard.protocol.jobs import JobResult, LogEntry

PATIENCE_SECONDS = 8.0
"""A job may be pending for so long before the user is told why."""
REMEMBERED_STDERR = 128 * 1024
"""Enough to recognise a traceback that the job has written itself: it is at most 64 KiB."""


class RunningJob:
    """Streams a submitted job's output to our own streams and tells how it ended."""

    def __init__(self, client: AsyncClient, job_id: str) -> None:
        self._client = client
        self._job_id = job_id
        self._stderr = b""
        self._at_line_start = True
        self._follower = LogFollower(client, job_id, self._show)

    async def watch(self, interrupt: Interrupt) -> int:
        """Wait for the end of the job and return the exit code. An interrupt cancels the job and still waits for it."""
        ending = asyncio.create_task(self._until_end(), name="run: until end")
        interrupted = asyncio.create_task(interrupt.wait(), name="run: interrupt")
        try:
            await asyncio.wait({ending, interrupted}, return_when=asyncio.FIRST_COMPLETED)
            if interrupt.exit_code and not ending.done():
                note(f"cancelling {self._job_id}; once more leaves at once")
                await self._cancel()
            result = await ending
        except (ReaderGone, OSError, NotSupportedHere):
            # Nobody can read the output any more, or no worker of ours can run it: nobody will ask for the job again.
            await self._cancel()
            raise
        except Unavailable:
            note(
                f"{self._job_id} is stored and goes on; `blixard job {self._job_id}` and `blixard logs` tell of it later"
            )
            raise
        finally:
            ending.cancel()
            interrupted.cancel()
            await asyncio.gather(ending, interrupted, return_exceptions=True)
        self._tell(result)
        await print_large_result(self._client, result)
        return interrupt.exit_code or exit_code_of_job(result)

    async def _cancel(self) -> None:
        # It may have ended just now, which is as good.
        with contextlib.suppress(Conflict):
            await self._client.cancel(self._job_id)

    async def _until_end(self) -> JobResult:
        following = asyncio.create_task(self._follower.follow(), name="run: follow output")
        waiting = asyncio.create_task(self._client.result(self._job_id), name="run: wait for result")
        explaining = asyncio.create_task(self._explain_waiting(), name="run: explain")
        try:
            await asyncio.wait({following, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()
            result = await waiting
        finally:
            for task in (following, waiting, explaining):
                task.cancel()
            await asyncio.gather(following, waiting, explaining, return_exceptions=True)
        await self._follower.finish(result.attempt)
        return result

    async def _explain_waiting(self) -> None:
        """Say once why the job does not run, if it is still pending after a while."""
        await asyncio.sleep(PATIENCE_SECONDS)
        view = await self._client.why(self._job_id)
        if view.state is JobState.PENDING and view.reasons:
            note(f"{self._job_id} is pending: {view.summary}")
            note(f"what would unblock it: {view.reasons[0].unblock}")

    def _show(self, entry: LogEntry) -> None:
        if entry.stream == "stderr":
            self._stderr = (self._stderr + entry.data)[-REMEMBERED_STDERR:]
            write_error(entry.data)
        else:
            write_out(entry.data)
        self._at_line_start = entry.data.endswith(b"\n")

    def _tell(self, result: JobResult) -> None:
        if result.state is JobState.COMPLETED:
            if result.result is not None and bytes(result.result) != b"null":
                print_line(bytes(result.result).decode())
            return
        if not self._at_line_start:
            note("")
        if result.error is not None and result.error.traceback and not self._has_shown(result.error.traceback):
            note(result.error.traceback.rstrip("\n"))
        show_error(describe_end(result), result.error.hint if result.error else None)

    def _has_shown(self, traceback: str) -> bool:
        """Say whether the job itself wrote this traceback, as a script does: it is told once."""
        lines = [line.strip() for line in traceback.strip().splitlines()]
        written = self._stderr.decode("utf-8", "replace")
        return bool(lines) and lines[-1] in written and "Traceback (most recent call last)" in written


async def print_large_result(client: AsyncClient, result: JobResult) -> None:
    """Print a result that was too large to travel with its job."""
    if result.state is JobState.COMPLETED and result.result_blob is not None:
        async for part in client.stream_blob(result.result_blob):
            write_out(part)
        print_line("")


def exit_code_of_job(result: JobResult) -> int:
    """Return the job's own exit code; 124 timeout, 125 a lost worker, 130 cancelled, 128+n killed by signal n."""
    if result.state is JobState.COMPLETED:
        return result.exit_code or 0
    if is_cancelled(result):
        return INTERRUPTED
    if result.outcome is OutcomeKind.TIMED_OUT:
        return TIMED_OUT
    if result.outcome is OutcomeKind.LOST:
        return OURS
    return result.exit_code or 1

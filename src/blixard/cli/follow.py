"""Following the output of one job, attempt after attempt, while it runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from blixard.client.contract import AsyncClient
from blixard.protocol.jobs import LogEntry, LogPageView

LOG_WAIT_SECONDS = 20.0
"""How long one request for more output is parked."""
PAUSE_SECONDS = 0.1
"""Between two looks when there is nothing to be parked on: before the first attempt and between two."""
DRAIN_SECONDS = 10.0
"""How long the rest of the output may take to arrive once the job has ended."""

Sink = Callable[[LogEntry], None]


class LogFollower:
    """Passes every entry of every attempt to ``sink``, in order, each once."""

    def __init__(self, client: AsyncClient, job_id: str, sink: Sink) -> None:
        self._client = client
        self._job_id = job_id
        self._sink = sink
        self._attempt = 0
        self._offset = 0

    async def follow(self) -> None:
        """Follow the newest attempt, and the next one when there is one, until cancelled."""
        while True:
            page = await self._client.logs(self._job_id, offset=self._offset, wait=LOG_WAIT_SECONDS)
            if page.attempt != self._attempt:
                await self._go_to(page.attempt)
                continue
            self._take(page)
            if page.ended or not page.entries:
                await asyncio.sleep(PAUSE_SECONDS)

    async def finish(self, attempt: int) -> None:
        """Pass on what is left of the last attempt of an ended job."""
        if attempt > self._attempt:
            await self._go_to(attempt)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while attempt and not await self._take_next(wait=1.0):
                    pass

    async def _go_to(self, attempt: int) -> None:
        while self._attempt and not await self._take_next(wait=0.0, until_empty=True):
            pass
        self._attempt, self._offset = attempt, 0

    async def _take_next(self, *, wait: float, until_empty: bool = False) -> bool:
        """Take one page of the attempt; say whether it was the last one."""
        page = await self._client.logs(self._job_id, attempt=self._attempt, offset=self._offset, wait=wait)
        self._take(page)
        return page.ended or (until_empty and not page.entries)

    def _take(self, page: LogPageView) -> None:
        for entry in page.entries:
            self._sink(entry)
        self._offset = page.offset

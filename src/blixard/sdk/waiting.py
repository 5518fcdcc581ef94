"""Waiting for many jobs at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from functools import partial
from itertools import islice
from typing import Literal

from blixard.client.contract import AsyncClient
from blixard.domain.limits import MAX_BATCH_JOBS
from blixard.errors import InvalidRequest, JobNotFound
from blixard.protocol.jobs import JobResult, WaitReply
from blixard.sdk.patience import Deadline, Patience

MAX_GROUP = MAX_BATCH_JOBS
"""Jobs that one request can wait for."""
MAX_GROUPS = 10
"""Requests that wait at the same time. Jobs above that take turns, the oldest first."""
TURN_SECONDS = 20.0


class Ends:
    """Tells the end of each of a changing set of jobs, once.

    ``watch`` goes on in the background on the client's loop, as do all calls; whoever started it stops it.
    """

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._idle: dict[str, None] = {}
        """Ids that nobody waits for at the moment, oldest first."""
        self._groups: dict[asyncio.Task[WaitReply], list[str]] = {}
        self._ended: list[JobResult] = []
        self._failure: BaseException | None = None
        self._news = asyncio.Event()
        self._bell = asyncio.Event()

    def add(self, ids: Iterable[str]) -> None:
        """Wait for these, too."""
        self._idle.update(dict.fromkeys(ids))
        self._bell.set()

    async def look(self, client: AsyncClient) -> None:
        """Note what has ended already, so that even a deadline that is over finds it. Before ``watch``."""
        ids = list(self._idle)
        self._idle.clear()
        for start in range(0, len(ids), MAX_GROUP):
            group = ids[start : start + MAX_GROUP]
            self._note(await self._patience.insist(partial(client.wait, group, wait=0.0)), group)

    async def take(self, deadline: Deadline | None = None) -> list[JobResult]:
        """Return what ended since the last call, waiting for something; empty only after the deadline or ``wake``.

        Raises ``JobNotFound``, what waiting raised, and ``InvalidRequest`` once the client is closed.
        """
        left = None if deadline is None else deadline.left()
        try:
            async with asyncio.timeout(left):
                await self._news.wait()
        except TimeoutError:
            return []
        if not self._ended and self._failure is not None:
            raise self._failure
        ended, self._ended = self._ended, []
        if self._failure is None:
            self._news.clear()
        return ended

    def wake(self) -> None:
        """Let ``take`` return, with nothing if nothing has ended."""
        self._news.set()

    async def watch(self, client: AsyncClient) -> None:
        """Wait until cancelled. What goes wrong is raised by ``take``."""
        try:
            while True:
                self._bell.clear()
                await self._make_groups(client)
                await self._wait()
        except asyncio.CancelledError:
            self._failure = InvalidRequest(
                "the app was closed while its jobs were waited for", hint="the jobs go on; take them up by their ids"
            )
            raise
        except Exception as error:  # the edge of a background task: kept for whoever takes
            self._failure = error
        finally:
            self._news.set()
            await _end(set(self._groups))

    async def _make_groups(self, client: AsyncClient) -> None:
        if self._idle and len(self._groups) >= MAX_GROUPS:
            await self._break_up_smallest()
        while self._idle and len(self._groups) < MAX_GROUPS:
            ids = list(islice(self._idle, MAX_GROUP))
            for job_id in ids:
                del self._idle[job_id]
            waiting = self._patience.insist(partial(client.wait, ids, wait=TURN_SECONDS))
            self._groups[asyncio.create_task(waiting, name="wait for jobs")] = ids

    async def _break_up_smallest(self) -> None:
        """Free a request for newcomers, unless all are full: asking again for the same jobs is harmless."""
        task, ids = min(self._groups.items(), key=lambda item: len(item[1]))
        if len(ids) < MAX_GROUP:
            del self._groups[task]
            await _end({task})
            self._idle = {**dict.fromkeys(ids), **self._idle}

    async def _wait(self) -> None:
        bell = asyncio.create_task(self._bell.wait(), name="newcomers")
        try:
            await asyncio.wait([*self._groups, bell], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end({bell})
        for task in [task for task in self._groups if task.done()]:
            self._note(task.result(), self._groups.pop(task))

    def _note(self, reply: WaitReply, ids: list[str]) -> None:
        if reply.unknown:
            raise JobNotFound(reply.unknown[0])
        ended = {result.id for result in reply.ended}
        self._idle.update(dict.fromkeys(job_id for job_id in ids if job_id not in ended))
        if ended:
            self._ended.extend(reply.ended)
            self._news.set()


async def _end(tasks: AbstractSet[asyncio.Task[WaitReply] | asyncio.Task[Literal[True]]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

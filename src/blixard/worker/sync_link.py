"""Delivery of numbered syncs: each is repeated as it was until it is answered."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from blixard.domain.lease import SyncReply, SyncRequest
from blixard.errors import BlixardError, InternalError, SessionExpired, Unavailable
from blixard.services.clock import Clock
from blixard.worker.backoff import Backoff
from blixard.worker.gateway import WorkerGateway

REPEATABLE = (Unavailable, InternalError)
"""What a server that is going down, coming up or broken for a while answers: the same call may succeed later."""
logger = logging.getLogger(__name__)


class SyncListener(Protocol):
    def answered(self, request: SyncRequest, reply: SyncReply) -> None: ...
    def expired(self, error: SessionExpired) -> None: ...
    def refused(self, error: BlixardError) -> None:
        """The server will not have us: no repetition helps."""


class SyncLink:
    """Numbers the requests of one session and knows which answers were read.

    ``renewed_at`` is when the newest answered request was sent (boot time in seconds): the lease holds for its length from then on at least.
    """

    def __init__(self, gateway: WorkerGateway, clock: Clock, listener: SyncListener, tasks: asyncio.TaskGroup) -> None:
        self._gateway = gateway
        self._clock = clock
        self._listener = listener
        self._tasks = tasks
        self._number = 0
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self.renewed_at = clock.boottime()

    @property
    def next_number(self) -> int:
        return self._number + 1

    @property
    def seen(self) -> int:
        """The highest number up to which every answer was read."""
        return min(self._under_way) - 1 if self._under_way else self._number

    def post(self, request: SyncRequest) -> None:
        """Send ``request``, whose number is ``next_number``; its answer goes to the listener."""
        self._number = request.number
        self._under_way[request.number] = self._tasks.create_task(
            self._deliver(request), name=f"sync {request.number} of {request.session}"
        )

    def close(self) -> None:
        """Stop repeating and waiting; nothing more is heard."""
        for task in self._under_way.values():
            task.cancel()

    async def _deliver(self, request: SyncRequest) -> None:
        backoff = Backoff(self._clock)
        failures = 0
        while True:
            sent_at = self._clock.boottime()
            try:
                reply = await self._gateway.sync(request)
                break
            except SessionExpired as error:
                self._listener.expired(error)
                return
            except REPEATABLE as error:
                if failures == 0:
                    logger.warning("sync %d was not answered and is repeated: %s", request.number, error)
                failures += 1
            except BlixardError as error:
                self._listener.refused(error)
                return
            await backoff.pause()
        if failures:
            logger.info("sync %d was answered after %d failures", request.number, failures)
        self.renewed_at = max(self.renewed_at, sent_at)
        del self._under_way[request.number]
        self._listener.answered(request, reply)

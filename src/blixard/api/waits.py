"""Calls that wait on behalf of a client, and end early when it goes away or the server stops."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable
from typing import TypeVar

from litestar.types import Receive

from blixard.domain.limits import MAX_WAIT_SECONDS

T = TypeVar("T")
WATCH_AFTER_SECONDS = 0.05
"""Most waits are answered sooner; only the others pay for a task that listens for the client's good-bye."""


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


class _End(enum.Enum):
    CLIENT_GONE = enum.auto()
    SERVER_STOPS = enum.auto()


class Waits:
    """All waits of one server. ``stop`` makes each answer at once with what there is, and every later one not wait at all."""

    def __init__(self) -> None:
        self._parked: set[_Parked] = set()
        self._watchers: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def parked(self) -> int:
        return len(self._parked)

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    async def run(self, receive: Receive, call: Callable[[float], Awaitable[T]], wait: float) -> T:
        """Return ``call(seconds)`` with ``wait`` cut to the limit. The call is cancelled when the client goes away
        (raises ``ClientGone``), and made anew without waiting when the server stops. The request's body must have been read.
        """
        seconds = min(wait, MAX_WAIT_SECONDS)
        if not seconds > 0:  # also what is negative or no number: the service says what is wrong with it
            return await call(seconds)
        if self._stopping:
            return await call(0.0)
        task = asyncio.current_task()
        assert task is not None
        parked = _Parked(task)
        self._parked.add(parked)
        timer = asyncio.get_running_loop().call_later(WATCH_AFTER_SECONDS, self._watch, parked, receive)
        try:
            return await call(seconds)
        except asyncio.CancelledError:
            # As asyncio.timeout does: ours was the only cancel, or somebody else wants the task to end as well.
            if parked.end is None or task.uncancel() > parked.cancelling:
                raise
            if parked.end is _End.CLIENT_GONE:
                raise ClientGone from None
        finally:
            timer.cancel()
            self._parked.discard(parked)
            if parked.watcher is not None:
                parked.watcher.cancel()
        return await call(0.0)

    async def stop(self) -> None:
        """End every wait. Allowed twice."""
        self._stopping = True
        for parked in list(self._parked):
            parked.finish(_End.SERVER_STOPS)
        watchers = list(self._watchers)
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)

    def _watch(self, parked: _Parked, receive: Receive) -> None:
        parked.watcher = asyncio.create_task(_end_with_client(parked, receive), name="wait-for-disconnect")
        self._watchers.add(parked.watcher)
        parked.watcher.add_done_callback(self._watchers.discard)


class _Parked:
    __slots__ = ("cancelling", "end", "task", "watcher")

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.task = task
        self.cancelling = task.cancelling()
        self.end: _End | None = None
        self.watcher: asyncio.Task[None] | None = None

    def finish(self, end: _End) -> None:
        if self.end is None:
            self.end = end
            self.task.cancel()


async def _end_with_client(parked: _Parked, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    parked.finish(_End.CLIENT_GONE)

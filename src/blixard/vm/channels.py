"""The way messages travel between the parts of the VM layer: bounded queues with one reader each."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from blixard.errors import InternalError, WrongPhase

COMMANDS = 100
"""Commands of callers that wait to be read; whoever sends one more waits until there is room."""
EVENTS = 16_384
"""Messages between parts. Each machine and each waiting job has a few under way at most, so a full channel is a bug of ours."""
T = TypeVar("T")


class Channel(Generic[T]):
    """First in, first out. After ``close`` nothing more goes in; what is in can still be read."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name = name
        self.capacity = capacity
        self._items: deque[T] = deque()
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._items)

    async def send(self, item: T) -> None:
        """Put one in, waiting for room. Raises ``WrongPhase`` when closed."""
        while len(self._items) >= self.capacity and not self._is_closed:
            self._drained.clear()
            await self._drained.wait()
        self._put(item)

    def post(self, item: T) -> None:
        """Put one in at once. Raises ``InternalError`` when there is no room, ``WrongPhase`` when closed."""
        if len(self._items) >= self.capacity:
            raise InternalError(f"the channel {self.name} is full: nobody reads its {self.capacity} messages")
        self._put(item)

    def close(self) -> None:
        """Let nobody send any more, and wake whoever waits. Allowed twice."""
        self._is_closed = True
        self._filled.set()
        self._drained.set()

    async def receive(self) -> T | None:
        """Take the oldest, waiting for one; None once the channel is closed and empty."""
        while not self._items:
            if self._is_closed:
                return None
            self._filled.clear()
            await self._filled.wait()
        item = self._items.popleft()
        self._drained.set()
        return item

    def _put(self, item: T) -> None:
        if self._is_closed:
            raise WrongPhase(f"the channel {self.name} is closed: its reader has stopped")
        self._items.append(item)
        self._filled.set()

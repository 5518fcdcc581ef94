"""Pauses between repeated calls."""

from __future__ import annotations

import asyncio

from blixard.services.clock import Clock

FIRST_SECONDS = 0.05
LONGEST_SECONDS = 1.0
"""A server that comes back is noticed within a second: a lease is ten."""


class Backoff:
    """Each pause is up to twice as long as the one before; random, so that workers do not come back in step."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._next = FIRST_SECONDS

    async def pause(self) -> None:
        seconds = self._next * (0.5 + self._clock.random() / 2)
        self._next = min(self._next * 2, LONGEST_SECONDS)
        await asyncio.sleep(seconds)

"""Waiting for changes: one watch of the database wakes all who wait in this process."""

from __future__ import annotations

import asyncio

from blixard.storage.database import Database

FREE_WAITERS = 8
SPACING_PER_WAITER = 0.0005
"""Seconds between two looks of one waiter, for each waiter beyond the free ones: so all together look at most 2,000 times a second."""


class Signals:
    """Tells waiters that something in the store may have changed. They look for themselves whether it concerns them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiters: set[asyncio.Future[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self.generation = 0

    def start(self) -> None:
        """Begin to watch. Allowed twice."""
        if self._task is None:
            self._task = asyncio.create_task(self._watch(), name="signals")

    async def stop(self) -> None:
        """End watching and wake everybody. Allowed before start and twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.wake()

    async def _watch(self) -> None:
        async for _ in self._database.watch():
            self.wake()

    def wake(self) -> None:
        """Let every waiter look again."""
        self.generation += 1
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self, since: int, timeout: float, poke: asyncio.Event | None = None) -> None:  # noqa: ASYNC109 - a wait is a value here
        """Return once the generation is above ``since``, ``poke`` is set, or ``timeout`` seconds have passed."""
        spacing = SPACING_PER_WAITER * max(0, len(self._waiters) - FREE_WAITERS)
        if spacing:
            await asyncio.sleep(min(spacing, max(0.0, timeout)))
        if self.generation > since or (poke is not None and poke.is_set()):
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        poked = None if poke is None else asyncio.ensure_future(poke.wait())
        try:
            await asyncio.wait(
                [waiter, poked] if poked else [waiter], timeout=max(0.0, timeout), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            self._waiters.discard(waiter)
            waiter.cancel()
            if poked is not None:
                poked.cancel()

"""What ``Database.watch`` hands out, the same for every store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from blixard.errors import StoreUnavailable


class Watch(AsyncIterator[None]):
    """Yields after changes; several that happen between two yields are one. Dropping it, or ``aclose``, ends the watching.

    ``forget`` is told when it is closed.
    """

    def __init__(self, forget: Callable[[Watch], None]) -> None:
        self._forget = forget
        self._bell = asyncio.Event()
        self._ended = False

    def ring(self) -> None:
        self._bell.set()

    def end(self) -> None:
        self._ended = True
        self._bell.set()

    async def __anext__(self) -> None:
        await self._bell.wait()
        if self._ended:
            raise StoreUnavailable("the database was closed while it was watched")
        self._bell.clear()

    async def aclose(self) -> None:
        """Stop watching. Calling it twice is harmless."""
        self._forget(self)

"""Going on over the restart of a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from blixard.errors import OutcomeUnknown, ServerUnreachable

R = TypeVar("R")
GIVE_UP_SECONDS = 60.0
"""A server that is away for longer is an error."""
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0


class Deadline:
    """The end of a time that a caller gave; None: there is none."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Return the seconds that are left, at least 0; None without an end."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def is_over(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end


class Patience:
    """What one app knows of its server: whether it ever answered. Only then is waiting for it to come back any use."""

    def __init__(self, give_up: float = GIVE_UP_SECONDS) -> None:
        self._give_up = give_up
        self._was_reached = False

    async def insist(
        self,
        call: Callable[[], Awaitable[R]],
        deadline: Deadline | None = None,
        *,
        proves_contact: bool = True,
        repeatable: bool = True,
    ) -> R:
        """Return what ``call`` returns, calling it again while the server is away.

        What is not ``repeatable`` without harm is only called again if it cannot have arrived.

        Raises ``ServerUnreachable`` or ``OutcomeUnknown`` after ``GIVE_UP_SECONDS`` or the deadline, and at once if the
        server has never answered. ``proves_contact``: the call asks the server in any case.
        """
        pauses = _pauses()
        lost_at: float | None = None
        while True:
            try:
                reply = await call()
            except (ServerUnreachable, OutcomeUnknown) as error:
                if not repeatable and isinstance(error, OutcomeUnknown):
                    raise
                lost_at = time.monotonic() if lost_at is None else lost_at
                is_hopeless = not self._was_reached or time.monotonic() - lost_at >= self._give_up
                if is_hopeless or (deadline is not None and deadline.is_over()):
                    raise
            else:
                self._was_reached = self._was_reached or proves_contact
                return reply
            await asyncio.sleep(next(pauses))


def _pauses() -> Iterator[float]:
    pause = FIRST_PAUSE_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

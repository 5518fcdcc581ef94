"""Time and chance as arguments."""

from __future__ import annotations

import random
import time
from typing import Protocol

_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Linux only; elsewhere a sleep of the machine is not counted."""


class Clock(Protocol):
    def now(self) -> int:
        """Microseconds since 1970: for people and for due times, never for leases."""

    def monotonic(self) -> float:
        """Seconds that never jump."""

    def boottime(self) -> float:
        """Seconds that never jump and go on while the machine sleeps: what a worker measures its lease with."""

    def random(self) -> float:
        """A number in [0, 1), for spreading retries."""


class SystemClock:
    def now(self) -> int:
        return time.time_ns() // 1_000

    def monotonic(self) -> float:
        return time.monotonic()

    def boottime(self) -> float:
        return time.clock_gettime(_BOOTTIME)

    def random(self) -> float:
        return random.random()  # noqa: S311 - spreads retries, guards nothing

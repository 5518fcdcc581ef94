"""A clock that stands until it is told to move."""

from __future__ import annotations


class FakeClock:
    """All of its times move together by ``advance``; ``random`` is always ``chance``."""

    def __init__(self, *, now: int = 1_750_000_000_000_000, chance: float = 0.5) -> None:
        self._now = now
        self._elapsed = 0.0
        self.chance = chance

    def now(self) -> int:
        return self._now + int(self._elapsed * 1e6)

    def monotonic(self) -> float:
        return self._elapsed

    def boottime(self) -> float:
        return self._elapsed

    def random(self) -> float:
        return self.chance

    def advance(self, seconds: float) -> None:
        self._elapsed += seconds

    def jump(self, seconds: float) -> None:
        """Set the wall clock ahead or back; the other times do not notice."""
        self._now += int(seconds * 1e6)

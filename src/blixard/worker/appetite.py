"""How many jobs a worker holds at once: enough that slots never wait for the server, few enough that others can run the rest."""

from __future__ import annotations

import math

AHEAD_SECONDS = 0.5
"""Work held ahead. A sync under load takes some tens of milliseconds; this bridges ten of them."""
SILENCE_SECONDS = 0.1
"""A shorter silence says nothing: on a busy machine other processes had the processor, and claiming less would add to it."""
_WEIGHT = 0.2
_SHORTEST_SECONDS = 1e-5


class Appetite:
    """Learns from the durations of ended jobs. Until it knows one, and when jobs are long, a worker holds as many as it has slots."""

    def __init__(self, slots: int, prefetch: int) -> None:
        self._slots = slots
        self._most = slots + prefetch
        self._mean: float | None = None
        self._heard_at = 0.0

    def heard(self, duration: float, at: float) -> None:
        """Note a job that took ``duration`` seconds and ended at ``at`` (monotonic)."""
        mean = duration if self._mean is None else self._mean + _WEIGHT * (duration - self._mean)
        self._mean = max(mean, _SHORTEST_SECONDS)
        self._heard_at = at

    def target(self, now: float, running: int) -> int:
        """Return how many jobs to hold. A silence while ``running`` jobs go on counts as a long job: the next one may be as long."""
        if self._mean is None:
            return self._slots
        silence = now - self._heard_at
        usual = max(self._mean, silence) if running and silence > SILENCE_SECONDS else self._mean
        return max(self._slots, min(self._most, math.ceil(self._slots * AHEAD_SECONDS / usual)))

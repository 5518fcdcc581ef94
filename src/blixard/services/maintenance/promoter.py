"""The promoter: moves jobs whose time has come into the claim index."""

from __future__ import annotations

import msgspec

from blixard.services.clock import Clock
from blixard.storage.repositories.maintenance import MaintenanceRepository


class PromoterConfig(msgspec.Struct, frozen=True, kw_only=True):
    step: int = 1_000
    most_steps: int = 20
    """Steps of one pass, so that other passes get their turn; the next pass goes on."""


class Promoter:
    def __init__(self, maintenance: MaintenanceRepository, clock: Clock, config: PromoterConfig) -> None:
        self._maintenance = maintenance
        self._clock = clock
        self._config = config

    async def run_once(self) -> dict[str, int]:
        """Make due jobs ready; return how many."""
        promoted = 0
        for _ in range(self._config.most_steps):
            due = await self._maintenance.next_run_at()
            if due is None or due > self._clock.now():
                break
            promoted += len(await self._maintenance.promote(self._clock.now(), self._config.step))
        return {"jobs_promoted": promoted}

    async def seconds_to_next(self) -> float | None:
        """Return how long until the next job falls due; None when none waits."""
        due = await self._maintenance.next_run_at()
        return None if due is None else max(0.0, (due - self._clock.now()) / 1e6)

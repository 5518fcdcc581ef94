"""The adopter: opens to every worker what embedded processes left behind when they died."""

from __future__ import annotations

from pathlib import Path

from blixard.storage.locks import is_free
from blixard.storage.repositories.placement import PlacementRepository


class Adopter:
    def __init__(self, placement: PlacementRepository, submitters: Path | None) -> None:
        self._placement = placement
        self._submitters = submitters

    async def run_once(self) -> dict[str, int]:
        """Open the placement classes of submitters whose lock is free; return how many."""
        if self._submitters is None:
            return {"classes_opened": 0}
        dead = [s for s in await self._placement.closed_submitters() if is_free(self._submitters / f"{s}.lock")]
        opened = await self._placement.open_classes(dead) if dead else []
        for submitter in dead:
            (self._submitters / f"{submitter}.lock").unlink(missing_ok=True)
        return {"classes_opened": len(opened)}

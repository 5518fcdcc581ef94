"""Specs and placement classes: stored once, remembered for a while, matched to workers."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from blixard.domain.placement import PlacementClass, mismatches
from blixard.domain.spec import JobSpec, encode_spec, spec_digest
from blixard.domain.worker import WorkerOffer
from blixard.services.clock import Clock
from blixard.storage.repositories.placement import PlacementRepository, StoredSpec

REMEMBER_SECONDS = 600.0
"""Far below the age from which the pruner removes an unused spec, so a remembered id is always good."""
PRUNE_AGE_SECONDS = 6 * 3600.0
MAX_REMEMBERED = 4096
RELOAD_SECONDS = 1.0
"""How long it may take until classes that another process opened are served here."""


class PlacementService:
    def __init__(self, placement: PlacementRepository, clock: Clock) -> None:
        self._placement = placement
        self._clock = clock
        self._specs: dict[tuple[str, str, str], tuple[StoredSpec, float]] = {}
        self._bodies: dict[int, JobSpec] = {}
        self._classes: dict[int, PlacementClass] = {}
        self._last_class = 0
        self._loaded_at = float("-inf")
        self._decoder = msgspec.json.Decoder(JobSpec)

    def remembered(self, namespace: str, spec: JobSpec, submitter: str) -> StoredSpec | None:
        """Return where a spec lies if it was stored from here within the last ten minutes."""
        known = self._specs.get((namespace, spec_digest(encode_spec(spec)), submitter))
        return known[0] if known and self._clock.monotonic() - known[1] < REMEMBER_SECONDS else None

    async def store(self, namespace: str, spec: JobSpec, submitter: str) -> StoredSpec:
        """Store a checked spec, or make the stored one young; return where it lies."""
        stored = await self._placement.add_spec(namespace, spec, submitter, self._clock.now())
        if len(self._specs) >= MAX_REMEMBERED:
            self._specs.clear()
        self._specs[namespace, stored.digest, submitter] = (stored, self._clock.monotonic())
        return stored

    async def specs(self, ids: Iterable[int]) -> dict[int, JobSpec]:
        """Return specs by id."""
        wanted = set(ids)
        missing = [spec_id for spec_id in wanted if spec_id not in self._bodies]
        if missing:
            if len(self._bodies) + len(missing) > MAX_REMEMBERED:
                self._bodies.clear()
                missing = list(wanted)
            for spec_id, body in (await self._placement.find_specs(missing)).items():
                self._bodies[spec_id] = self._decoder.decode(body)
        return {spec_id: self._bodies[spec_id] for spec_id in wanted}

    async def matching(self, namespace: str, offer: WorkerOffer, free_cpus: float, free_memory_mb: int) -> list[int]:
        """Return the classes whose jobs this worker may take now."""
        await self._refresh()
        return [
            needs.id
            for needs in self._classes.values()
            if needs.namespace == namespace
            and needs.cpus <= free_cpus
            and needs.memory_mb <= free_memory_mb
            and not mismatches(needs, offer)
        ]

    def submitted_by(self, submitter: str, classes: Iterable[int]) -> list[int]:
        """Return those of the classes whose jobs this process submitted."""
        return [class_id for class_id in classes if self._classes[class_id].submitter == submitter]

    async def has_ready_job(self, classes: Iterable[int]) -> bool:
        """Say whether anything is due in one of these classes: a look that costs no write."""
        return await self._placement.has_ready_job(classes)

    async def find_class(self, class_id: int) -> PlacementClass | None:
        return await self._placement.find_class(class_id)

    async def _refresh(self) -> None:
        if self._clock.monotonic() - self._loaded_at >= RELOAD_SECONDS:
            classes = await self._placement.classes(0)
            self._classes = {needs.id: needs for needs in classes}
            self._loaded_at = self._clock.monotonic()
        else:
            classes = await self._placement.classes(self._last_class)
            self._classes.update({needs.id: needs for needs in classes})
        self._last_class = max([self._last_class, *(needs.id for needs in classes)])

"""The pruner: removes what retention allows, in bounded steps, and never a blob that anything refers to."""

from __future__ import annotations

import msgspec

from blixard.domain.state_machine import JobState
from blixard.errors import BlobNotFound
from blixard.services.clock import Clock
from blixard.services.placement import PRUNE_AGE_SECONDS
from blixard.storage.blobs import BlobStore
from blixard.storage.logs import LogStore
from blixard.storage.repositories.maintenance import MaintenanceRepository

DAY = 24 * 3600.0
BLOB_GRACE_SECONDS = 1 * DAY
"""A blob may be uploaded long before a job refers to it; putting it again makes it young."""
SESSION_RETENTION_SECONDS = 1 * DAY
BLOB_STEP = 500


class PrunerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. ``most_steps`` bounds one pass; the next pass goes on."""

    completed_retention: float = 7 * DAY
    failed_retention: float = 30 * DAY
    events_retention: float = 90 * DAY
    step: int = 1_000
    most_steps: int = 50


class Pruner:
    def __init__(
        self,
        maintenance: MaintenanceRepository,
        blobs: BlobStore,
        logs: LogStore,
        clock: Clock,
        config: PrunerConfig,
    ) -> None:
        self._maintenance = maintenance
        self._blobs = blobs
        self._logs = logs
        self._clock = clock
        self._config = config
        self._spec_cursor = 0

    async def run_once(self) -> dict[str, int]:
        """Remove ended jobs, events, specs, classes, batches and sessions past their time; return counts by kind."""
        config, now = self._config, self._clock.now()
        young = now - int(PRUNE_AGE_SECONDS * 1e6)
        return {
            "jobs": await self._prune_jobs((JobState.COMPLETED,), now - int(config.completed_retention * 1e6))
            + await self._prune_jobs((JobState.FAILED, JobState.CANCELLED), now - int(config.failed_retention * 1e6)),
            "events": await self._prune_events(now - int(config.events_retention * 1e6)),
            "specs": await self._prune_specs(young),
            "classes": await self._maintenance.delete_unused_classes(young, config.step),
            "batches": await self._maintenance.delete_empty_batches(young, config.step),
            "sessions": await self._maintenance.delete_ended_sessions(
                now - int(SESSION_RETENTION_SECONDS * 1e6), config.step
            ),
        }

    async def _prune_jobs(self, states: tuple[JobState, ...], before: int) -> int:
        removed = 0
        for _ in range(self._config.most_steps):
            jobs = await self._maintenance.delete_finished(states, before, self._config.step)
            keys = [(namespace, job_id, n) for namespace, job_id, attempts in jobs for n in range(1, attempts + 1)]
            await self._logs.delete(keys)
            removed += len(jobs)
            if len(jobs) < self._config.step:
                break
        return removed

    async def _prune_events(self, before: int) -> int:
        removed = 0
        for _ in range(self._config.most_steps):
            step = await self._maintenance.delete_events(before, self._config.step)
            removed += step
            if step < self._config.step:
                break
        return removed

    async def _prune_specs(self, before: int) -> int:
        """Look at one stretch of specs; a cursor goes round, so that specs in use are not looked at in every pass."""
        removed, last = await self._maintenance.delete_unused_specs(self._spec_cursor, before, self._config.step)
        self._spec_cursor = 0 if last is None else last
        return removed

    async def prune_blobs(self) -> int:
        """Remove blobs that nothing refers to and that are older than a day; return how many. Walks the whole store."""
        removed, batch = 0, []
        async for digest in self._blobs.list_digests():
            batch.append(digest)
            if len(batch) == BLOB_STEP:
                removed += await self._prune_blob_step(batch)
                batch = []
        removed += await self._prune_blob_step(batch) if batch else 0
        await self._blobs.remove_leftovers(BLOB_GRACE_SECONDS)
        return removed

    async def _prune_blob_step(self, digests: list[str]) -> int:
        before = self._clock.now() - int(BLOB_GRACE_SECONDS * 1e6)
        kept = await self._maintenance.referenced_blobs(digests)
        removed = 0
        for digest in set(digests) - kept:
            if await self._is_old(digest, before):
                await self._blobs.delete(digest)
                removed += 1
        return removed

    async def _is_old(self, digest: str, before: int) -> bool:
        try:
            return (await self._blobs.stat(digest)).stored_at < before
        except BlobNotFound:  # somebody removed it since it was listed
            return False

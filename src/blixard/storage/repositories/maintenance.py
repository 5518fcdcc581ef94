"""What the maintenance passes do to the store, each in bounded steps."""

from __future__ import annotations

from collections.abc import Sequence

from blixard.domain.state_machine import JobState
from blixard.storage.database import Database, Params
from blixard.storage.repositories.rows import encode, maybe_number, number, text, texts
from blixard.storage.statements import Statements


class MaintenanceRepository:
    def __init__(self, database: Database, statements: Statements) -> None:
        self._database = database
        self._sql = statements

    async def promote(self, now: int, limit: int) -> list[int]:
        """Make due jobs ready; return the placement class of each."""
        rows = await self._database.write(self._sql["promote_jobs"], {"now": now, "limit": limit})
        return [number(row[0]) for row in rows]

    async def next_run_at(self) -> int | None:
        """Return when the next waiting job falls due."""
        return maybe_number((await self._database.read(self._sql["next_run_at"]))[0][0])

    async def delete_finished(self, states: Sequence[JobState], before: int, limit: int) -> list[tuple[str, str, int]]:
        """Remove ended jobs; return namespace, id and number of attempts of each, for their logs."""
        params: Params = {"states": encode(states), "finished_before": before, "limit": limit}
        rows = await self._database.write(self._sql["delete_finished_jobs"], params)
        return [(text(r[0]), text(r[1]), number(r[2])) for r in rows]

    async def delete_events(self, before: int, limit: int) -> int:
        return len(await self._database.write(self._sql["delete_events"], {"before": before, "limit": limit}))

    async def delete_unused_specs(self, after: int, before: int, limit: int) -> tuple[int, int | None]:
        """Look at the next ``limit`` specs behind id ``after``; return how many were removed and where to go on (None: at the end)."""
        rows = await self._database.read(self._sql["end_of_spec_stretch"], {"after": after, "limit": limit})
        last = maybe_number(rows[0][0])
        if last is None:
            return 0, None
        params = {"after": after, "last": last, "before": before}
        return len(await self._database.write(self._sql["delete_unused_specs"], params)), last

    async def delete_unused_classes(self, before: int, limit: int) -> int:
        rows = await self._database.write(self._sql["delete_unused_classes"], {"before": before, "limit": limit})
        if rows:
            ids = encode([row[0] for row in rows])
            await self._database.write(self._sql["delete_counts_of_missing_classes"], {"classes": ids})
        return len(rows)

    async def delete_ended_sessions(self, before: int, limit: int) -> int:
        params = {"before": before, "limit": limit}
        return len(await self._database.write(self._sql["delete_ended_sessions"], params))

    async def delete_empty_batches(self, before: int, limit: int) -> int:
        params = {"before": before, "limit": limit}
        return len(await self._database.write(self._sql["delete_empty_batches"], params))

    async def referenced_blobs(self, digests: Sequence[str]) -> set[str]:
        """Return those of the digests that something refers to."""
        rows = await self._database.read(self._sql["find_referenced_blobs"], {"digests": encode(digests)})
        return set(texts(rows))

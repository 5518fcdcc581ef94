"""Batches and their results."""

from __future__ import annotations

from collections.abc import Sequence

from blixard.domain.batch import Batch
from blixard.domain.state_machine import JobState
from blixard.protocol.jobs import JobResult
from blixard.storage.database import Database, Params, Row
from blixard.storage.repositories.jobs import result_of
from blixard.storage.repositories.rows import encode, maybe_number, number, text, texts
from blixard.storage.statements import Statements


def _batch_of(row: Row) -> Batch:
    return Batch(
        id=text(row[0]),
        namespace=text(row[1]),
        name=text(row[2]),
        identity=text(row[3]),
        generation=number(row[4]),
        total=number(row[5]),
        created_at=number(row[6]),
    )


class BatchRepository:
    def __init__(self, database: Database, statements: Statements) -> None:
        self._database = database
        self._sql = statements

    async def add(self, batch: Batch) -> bool:
        """Store a batch; say whether it is new."""
        params: Params = {
            "namespace": batch.namespace,
            "id": batch.id,
            "name": batch.name,
            "identity": batch.identity,
            "generation": batch.generation,
            "total": batch.total,
            "now": batch.created_at,
        }
        return bool(await self._database.write(self._sql["add_batch"], params))

    async def find(self, namespace: str, batch_id: str) -> Batch | None:
        rows = await self._database.read(self._sql["find_batch"], {"namespace": namespace, "id": batch_id})
        return _batch_of(rows[0]) if rows else None

    async def find_newest(self, namespace: str, identity: str) -> Batch | None:
        """Return the newest generation of what computes the same."""
        params: Params = {"namespace": namespace, "identity": identity}
        rows = await self._database.read(self._sql["find_newest_batch"], params)
        return _batch_of(rows[0]) if rows else None

    async def find_other_of_name(self, namespace: str, name: str, identity: str) -> Batch | None:
        """Return the newest batch of this name that computes something else."""
        params: Params = {"namespace": namespace, "name": name, "identity": identity}
        rows = await self._database.read(self._sql["find_batch_of_name"], params)
        return _batch_of(rows[0]) if rows else None

    async def count(self, namespace: str, batch_id: str) -> dict[JobState, int]:
        """Return the batch's jobs by state, from counters that triggers keep."""
        rows = await self._database.read(self._sql["count_batch"], {"namespace": namespace, "batch": batch_id})
        return {JobState(text(row[0])): number(row[1]) for row in rows}

    async def last_index(self, namespace: str, batch_id: str) -> int | None:
        """Return the highest index that was submitted."""
        rows = await self._database.read(self._sql["last_batch_index"], {"namespace": namespace, "batch": batch_id})
        return maybe_number(rows[0][0]) if rows else None

    async def ids(
        self, namespace: str, batch_id: str, states: Sequence[JobState], *, after: str, limit: int
    ) -> list[str]:
        """Return ids of the batch in these states, in order, behind ``after``."""
        params: Params = {
            "namespace": namespace,
            "batch": batch_id,
            "states": encode(states),
            "after": after,
            "limit": limit,
        }
        return texts(await self._database.read(self._sql["list_batch_ids"], params))

    async def results(self, namespace: str, batch_id: str, *, after: int, limit: int) -> tuple[list[JobResult], int]:
        """Return jobs that ended behind a position of the outbox, as they stand now, and the new position."""
        params: Params = {"namespace": namespace, "batch": batch_id, "after": after, "limit": limit}
        rows = await self._database.read(self._sql["list_batch_results"], params)
        return [result_of(row[1:]) for row in rows], number(rows[-1][0]) if rows else after

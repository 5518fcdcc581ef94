"""Placement classes and specs."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from blixard.domain.placement import PlacementClass, class_key
from blixard.domain.requirements import Isolation, WorkerType
from blixard.domain.spec import JobSpec, encode_spec, spec_digest
from blixard.storage.database import Database, Row
from blixard.storage.repositories.rows import encode, number, text, texts
from blixard.storage.statements import Statements

_labels_decoder = msgspec.json.Decoder(dict[str, str])


class StoredSpec(msgspec.Struct, frozen=True):
    """Where a spec lies: its id, its placement class, and the digest of its text."""

    id: int
    class_id: int
    digest: str


def _class_of(row: Row) -> PlacementClass:
    return PlacementClass(
        id=number(row[0]),
        namespace=text(row[1]),
        queue=text(row[2]),
        worker_type=WorkerType(text(row[3])),
        isolation=Isolation(text(row[4])),
        labels=_labels_decoder.decode(text(row[5])),
        cpus=float(row[6] or 0.0),
        memory_mb=number(row[7]),
        submitter=text(row[8]),
        is_open=bool(row[9]),
    )


class PlacementRepository:
    def __init__(self, database: Database, statements: Statements) -> None:
        self._database = database
        self._sql = statements

    async def add_spec(self, namespace: str, spec: JobSpec, submitter: str, now: int) -> StoredSpec:
        """Store a spec and its placement class if they are new; either way make them young for the pruner."""
        rows = await self._database.write(self._sql["add_class"], {**class_key(namespace, spec, submitter), "now": now})
        class_id = number(rows[0][0])
        body = encode_spec(spec)
        digest = spec_digest(body)
        rows = await self._database.write(
            self._sql["add_spec"],
            {
                "namespace": namespace,
                "digest": digest,
                "class_id": class_id,
                "name": spec.name,
                "body": body,
                "now": now,
            },
        )
        return StoredSpec(number(rows[0][0]), class_id, digest)

    async def find_specs(self, ids: Iterable[int]) -> dict[int, str]:
        """Return the JSON text of specs by id."""
        rows = await self._database.read(self._sql["find_specs"], {"ids": encode(list(ids))})
        return {number(row[0]): text(row[1]) for row in rows}

    async def classes(self, after: int) -> list[PlacementClass]:
        """Return the classes with ids above ``after``."""
        rows = await self._database.read(self._sql["list_classes"], {"after": after})
        return [_class_of(row) for row in rows]

    async def find_class(self, class_id: int) -> PlacementClass | None:
        rows = await self._database.read(self._sql["find_class"], {"id": class_id})
        return _class_of(rows[0]) if rows else None

    async def closed_submitters(self) -> list[str]:
        return texts(await self._database.read(self._sql["list_closed_submitters"]))

    async def open_classes(self, submitters: Iterable[str]) -> list[int]:
        """Let every worker run what these submitters left; return the ids of the opened classes."""
        rows = await self._database.write(self._sql["open_classes"], {"submitters": encode(list(submitters))})
        return [number(row[0]) for row in rows]

    async def has_ready_job(self, classes: Iterable[int]) -> bool:
        rows = await self._database.read(self._sql["has_ready_job"], {"classes": encode(list(classes))})
        return bool(rows[0][0])

"""Migrations through the log: each is one entry, so all nodes have it or none has."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from blixard_hiqlite import Failure, Operation

from blixard.errors import InternalError
from blixard.storage.database import Row, Statement
from blixard.storage.hiqlite.operations import Outcome
from blixard.storage.migrator import MIGRATIONS_TABLE, Migration, find_pending

_EXISTS = Statement(
    "find_migrations_table", "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'schema_migrations'"
)
_APPLIED = Statement("list_migrations", "SELECT number, digest FROM schema_migrations")

Read = Callable[[Statement], Awaitable[list[Row]]]
Write = Callable[[Operation], Awaitable[Outcome]]


async def migrate(read: Read, write: Write, migrations: Sequence[Migration]) -> None:
    """Bring the cluster to this code's schema. Several nodes may do so at once: who comes second finds it done.

    Raises ``StoreUnavailable`` for a schema newer than this code, ``InternalError`` for an applied file that was changed and for a wrong one.
    """
    while pending := find_pending(await _list_applied(read), migrations):
        outcome = await write(Operation.script(_write_script(pending[0])))
        if isinstance(outcome, Failure) and pending[0].number not in await _list_applied(read):
            raise InternalError(f"migration {pending[0].number:04}_{pending[0].name} is wrong: {outcome.message}")


async def _list_applied(read: Read) -> Mapping[int, str]:
    if not await read(_EXISTS):
        return {}
    return {int(str(number)): str(digest) for number, digest in await read(_APPLIED)}


def _write_script(migration: Migration) -> str:
    # Numbers, and names and digests of which only [a-z0-9_] can be part: nothing to quote.
    applied_at = time.time_ns() // 1_000
    return (
        f"{MIGRATIONS_TABLE};\n{migration.sql}\n;\nINSERT INTO schema_migrations (number, name, digest, applied_at) "
        f"VALUES ({migration.number}, '{migration.name}', '{migration.digest}', {applied_at});"
    )

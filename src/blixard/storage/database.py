"""The one door to a SQL store. SQLite on one machine and the replicated store of a cluster pass the same conformance suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

import msgspec

Value = str | int | float | bytes | None
Params = Mapping[str, Value]
Row = tuple[Value, ...]


class Statement(msgspec.Struct, frozen=True):
    """One named statement of a ``.sql`` file, or of a migration. ``name`` is for errors and metrics; ``sql`` takes ``:name`` parameters.

    ``quick``: a read that touches a handful of pages, so that a store may run it without leaving the event loop's thread.
    """

    name: str
    sql: str
    quick: bool = False


class Database(Protocol):
    """SQL in, rows out. Deterministic statements only: times, ids and random numbers are parameters.

    Raises ``StoreUnavailable`` (not opened, closed, cannot be read or written; ``StoreFull`` when the disk is full),
    ``OutcomeUnknown`` (a write was sent and its fate is not known; repeat it), ``InternalError`` (the statement is wrong: our bug).
    A failed constraint raises ``ConstraintFailed``. All methods may be called from one event loop, many at once.
    """

    async def open(self) -> None:
        """Open, creating what is missing, and migrate to the newest schema. Raises ``StoreUnavailable`` for a newer schema."""

    async def close(self) -> None:
        """Finish the writes that were accepted, then close. Allowed twice and before ``open``."""

    async def read(self, statement: Statement, params: Params | None = None) -> list[Row]:
        """Return all rows. Sees every write that this object has acknowledged."""

    async def write(self, statement: Statement, params: Params | None = None) -> list[Row]:
        """Execute one statement atomically and return its RETURNING rows once they are on disk.

        Concurrent calls share commits, in the order of the calls: a later one sees an earlier one's effect. A statement that fails changes nothing and fails nobody else.
        """

    async def transaction(self, statements: Sequence[tuple[Statement, Params]]) -> list[int]:
        """Execute all or nothing; return the number of rows that each changed."""

    def watch(self) -> AsyncIterator[None]:
        """Yield soon after each change that anybody commits, also another process; many changes may be one yield. Never ends by itself."""

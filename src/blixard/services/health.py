"""Whether the store works, found out by using it."""

from __future__ import annotations

import asyncio
from importlib.resources import files

from blixard.errors import StoreUnavailable
from blixard.storage.database import Database
from blixard.storage.statements import load_statements

CHECK_SECONDS = 5.0
_statements = load_statements(files("blixard.storage") / "sql")


async def check_store(database: Database) -> None:
    """Read, and begin and commit a write that changes no row. Raises ``StoreUnavailable`` within five seconds."""
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await database.read(_statements["health_read"])
            await database.write(_statements["health_write"])
    except TimeoutError:
        raise StoreUnavailable(f"the store did not answer within {CHECK_SECONDS:g} s") from None

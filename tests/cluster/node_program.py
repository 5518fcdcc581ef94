"""One node of a cluster as a process of its own: takes requests as JSON lines, answers them as they are done.

Started as ``python -m tests.cluster.node_program SETTINGS MIGRATIONS``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from blixard.errors import BlixardError
from blixard.storage.database import Statement
from blixard.storage.hiqlite.database import HiqliteDatabase
from blixard.storage.hiqlite.settings import NodeSettings


# Any: the rig knows what each operation takes and returns.
async def _carry(database: HiqliteDatabase, request: dict[str, Any]) -> Any:
    match request["operation"]:
        case "write":
            return await database.write(Statement(request["name"], request["sql"]), request["params"])
        case "read":
            return await database.read(Statement(request["name"], request["sql"]), request["params"])
        case "transaction":
            return await database.transaction(
                [(Statement("part", sql), params) for sql, params in request["statements"]]
            )
        case "status":
            return await database.status()
        case "remove":
            return await database.remove_member(request["node_id"])
        case "changed":
            return await anext(database.watch())
        case other:
            raise ValueError(other)


async def _answer(database: HiqliteDatabase, request: dict[str, Any]) -> None:
    try:
        answer = {"value": await _carry(database, request)}
    except BlixardError as error:
        answer = {"error": error.code, "message": error.message}
    _say({"id": request["id"], **answer})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def main(settings: NodeSettings, migrations: Path) -> None:
    """Serve until standard input ends, then leave in good order."""
    database = HiqliteDatabase(settings, migrations=migrations)
    await database.open()
    _say({"ready": settings.node_id})
    reader = asyncio.StreamReader(limit=1 << 26)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with asyncio.TaskGroup() as group:
        while line := await reader.readline():
            group.create_task(_answer(database, json.loads(line)))
    await database.close()


if __name__ == "__main__":
    given = msgspec.json.decode(
        Path(sys.argv[1]).read_bytes(), type=NodeSettings, dec_hook=lambda kind, text: kind(text)
    )
    asyncio.run(main(given, Path(sys.argv[2])))

"""/blobs: content under its SHA-256, never as a whole in memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

from blixard.api.answer import Answer, Header
from blixard.api.bodies import read_chunks
from blixard.api.operation import Call, Operation
from blixard.domain.limits import KIB, MAX_BLOB_BYTES, MIB
from blixard.errors import InvalidRequest
from blixard.protocol import routes

PIECE_BYTES = 1 * MIB
"""The store is handed pieces of this size, since each costs it a trip to another thread."""
READ_BYTES = 256 * KIB


async def put(call: Call[bytes]) -> None:
    chunks = read_chunks(call.scope, call.receive, MAX_BLOB_BYTES)
    await call.plane.blobs.put(_checked(chunks, call.parameters["digest"]))


async def get(call: Call[None]) -> Answer:
    digest = call.parameters["digest"]
    path = await call.plane.blobs.open_path(digest)
    if path is None:
        return Answer(200, await call.plane.blobs.get(digest), content_type=routes.BLOB, headers=_cached(digest))
    size = (await call.plane.blobs.stat(digest)).size
    return Answer(200, content_type=routes.BLOB, headers=_cached(digest), chunks=_read(path), length=size)


async def head(call: Call[None]) -> Answer:
    digest = call.parameters["digest"]
    size = (await call.plane.blobs.stat(digest)).size
    return Answer(200, content_type=routes.BLOB, headers=_cached(digest), length=size)


async def _checked(chunks: AsyncIterator[bytes], digest: str) -> AsyncIterator[bytes]:
    """Yield larger pieces, and fail before the last one if the content is not what its name says: so it is never stored."""
    found = hashlib.sha256()
    piece = bytearray()
    async for chunk in chunks:
        found.update(chunk)
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
        piece += chunk
    if found.hexdigest() != digest:
        raise InvalidRequest(
            f"the content has the SHA-256 {found.hexdigest()}, not {digest}", field="digest", hint="send it again"
        )
    yield bytes(piece)


async def _read(path: Path) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while chunk := await asyncio.to_thread(file.read, READ_BYTES):
            yield chunk
    finally:
        file.close()


def _cached(digest: str) -> list[Header]:
    return [(b"etag", f'"{digest}"'.encode()), (b"cache-control", b"private, immutable, max-age=31536000")]


OPERATIONS = (Operation(routes.PUT_BLOB, put), Operation(routes.GET_BLOB, get), Operation(routes.HEAD_BLOB, head))

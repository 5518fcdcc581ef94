"""Tokens, stored as hashes."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from blixard.protocol.workers import Scope
from blixard.storage.database import Database, Params, Row
from blixard.storage.repositories.rows import encode, maybe_number, number, text
from blixard.storage.statements import Statements

MAX_LISTED = 1_000
_scopes_decoder = msgspec.json.Decoder(tuple[Scope, ...])


class StoredToken(msgspec.Struct, frozen=True, kw_only=True):
    """Times in microseconds since 1970."""

    id: str
    namespace: str
    name: str
    hash: str
    scopes: tuple[Scope, ...]
    created_at: int
    expires_at: int | None
    revoked_at: int | None = None
    last_used_at: int | None = None


def _token_of(row: Row) -> StoredToken:
    return StoredToken(
        id=text(row[0]),
        namespace=text(row[1]),
        name=text(row[2]),
        hash=text(row[3]),
        scopes=_scopes_decoder.decode(text(row[4])),
        created_at=number(row[5]),
        expires_at=maybe_number(row[6]),
        revoked_at=maybe_number(row[7]),
        last_used_at=maybe_number(row[8]),
    )


def _all(rows: Sequence[Row]) -> list[StoredToken]:
    return [_token_of(row) for row in rows]


class TokenRepository:
    def __init__(self, database: Database, statements: Statements) -> None:
        self._database = database
        self._sql = statements

    async def add(self, token: StoredToken) -> None:
        params: Params = {
            "id": token.id,
            "namespace": token.namespace,
            "name": token.name,
            "hash": token.hash,
            "scopes": encode(token.scopes),
            "now": token.created_at,
            "expires_at": token.expires_at,
        }
        await self._database.write(self._sql["add_token"], params)

    async def find_by_hash(self, digest: str) -> StoredToken | None:
        tokens = _all(await self._database.read(self._sql["find_token_by_hash"], {"hash": digest}))
        return tokens[0] if tokens else None

    async def list_all(self, namespace: str) -> list[StoredToken]:
        params: Params = {"namespace": namespace, "limit": MAX_LISTED}
        return _all(await self._database.read(self._sql["list_tokens"], params))

    async def revoke(self, namespace: str, token_id: str, now: int) -> StoredToken | None:
        params: Params = {"namespace": namespace, "id": token_id, "now": now}
        tokens = _all(await self._database.write(self._sql["revoke_token"], params))
        return tokens[0] if tokens else None

    async def note_use(self, token_id: str, now: int) -> None:
        await self._database.write(self._sql["use_token"], {"id": token_id, "now": now})

    async def any_valid(self, now: int) -> bool:
        return bool((await self._database.read(self._sql["has_token"], {"now": now}))[0][0])

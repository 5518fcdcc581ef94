"""Sessions: the lives of workers."""

from __future__ import annotations

import msgspec

from blixard.domain.worker import Registration, SessionState, WorkerOffer, WorkerSession
from blixard.storage.database import Database, Params, Row
from blixard.storage.repositories.rows import encode, number, text
from blixard.storage.statements import Statements

MAX_LISTED = 10_000
_offer_decoder = msgspec.json.Decoder(WorkerOffer)


class Watched(msgspec.Struct, frozen=True):
    """What a rescuer sees of a session."""

    id: str
    state: SessionState
    host: str
    renewals: int


class StoredSession(msgspec.Struct, frozen=True):
    """A session with its namespace, the highest number of its syncs, and the id of the token that registered it."""

    namespace: str
    session: WorkerSession
    last_number: int
    token: str


def _stored_of(row: Row) -> StoredSession:
    session = WorkerSession(
        id=text(row[0]),
        name=text(row[2]),
        offer=_offer_decoder.decode(text(row[3])),
        state=SessionState(text(row[4])),
        host=text(row[5]),
        pid=number(row[6]),
        interpreter=text(row[7]),
        registered_at=number(row[8]),
        seen_at=number(row[9]),
        renewals=number(row[10]),
        leased=number(row[13]) if len(row) > 13 else 0,
    )
    return StoredSession(text(row[1]), session, number(row[11]), text(row[12]))


class SessionRepository:
    def __init__(self, database: Database, statements: Statements) -> None:
        self._database = database
        self._sql = statements

    async def add(self, namespace: str, session: str, registration: Registration, now: int, *, token: str) -> None:
        """Register a session; a repetition changes nothing."""
        params: Params = {
            "id": session,
            "namespace": namespace,
            "name": registration.name,
            "offer": encode(registration.offer),
            "host": registration.host,
            "pid": registration.pid,
            "interpreter": registration.interpreter,
            "now": now,
            "token": token,
        }
        await self._database.write(self._sql["add_session"], params)

    async def find(self, session: str) -> StoredSession | None:
        rows = await self._database.read(self._sql["find_session"], {"id": session})
        return _stored_of(rows[0]) if rows else None

    async def alive(self, namespace: str) -> list[WorkerSession]:
        """Return online and draining sessions (at most 10,000) with the leases that each holds."""
        params: Params = {"namespace": namespace, "limit": MAX_LISTED}
        rows = await self._database.read(self._sql["list_sessions"], params)
        return [_stored_of(row).session for row in rows]

    async def watched(self) -> list[Watched]:
        rows = await self._database.read(self._sql["list_watched_sessions"])
        return [Watched(text(r[0]), SessionState(text(r[1])), text(r[2]), number(r[3])) for r in rows]

    async def renew(self, namespace: str, session: str, sync_number: int, now: int) -> SessionState | None:
        """Count a sync and return the session's state; None if it is not alive."""
        params: Params = {"namespace": namespace, "session": session, "number": sync_number, "now": now}
        rows = await self._database.write(self._sql["renew_session"], params)
        return SessionState(text(rows[0][0])) if rows else None

    async def drain(self, namespace: str, session: str) -> bool:
        return bool(await self._database.write(self._sql["drain_session"], {"namespace": namespace, "id": session}))

    async def expire(self, session: str, renewals: int, now: int) -> bool:
        """Declare a session dead unless it has renewed since; say whether it was."""
        params: Params = {"id": session, "renewals": renewals, "now": now}
        return bool(await self._database.write(self._sql["expire_session"], params))

    async def close(self, namespace: str, session: str, now: int, *, token: str) -> bool:
        params: Params = {"namespace": namespace, "id": session, "now": now, "token": token}
        return bool(await self._database.write(self._sql["close_session"], params))

"""Workers, tokens and the server itself as a client sees them. Leases travel as ``domain.lease`` says."""

from __future__ import annotations

import datetime as dt
import enum

import msgspec

from blixard.domain.lease import AttemptRef
from blixard.domain.limits import WireInt
from blixard.domain.log import LogRecord
from blixard.domain.worker import SessionState, WorkerOffer


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    session: str
    name: str
    state: SessionState
    offer: WorkerOffer
    host: str
    pid: int
    interpreter: str
    registered_at: dt.datetime
    seen_at: dt.datetime
    leased: int


class RegisterReply(msgspec.Struct, frozen=True, kw_only=True):
    """``lease_seconds``: without an answered sync for so long, a worker ends its jobs. ``lock_path``: hold a lock on it if the path is on this machine."""

    session: str
    lease_seconds: float
    lock_path: str | None = None


class LogBatch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Output of one attempt, in order, behind what was sent before. ``offset``: bytes of output sent before, so that a repeat is recognised.

    ``ended`` closes the log; ``dropped`` bytes were over the cap.
    """

    ref: AttemptRef
    offset: WireInt
    records: list[LogRecord] = []
    ended: bool = False
    dropped: WireInt = 0


class Scope(enum.StrEnum):
    READ = "read"
    SUBMIT = "submit"
    WORKER = "worker"
    ADMIN = "admin"


class TokenView(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    namespace: str
    scopes: tuple[Scope, ...]
    created_at: dt.datetime
    expires_at: dt.datetime | None
    revoked_at: dt.datetime | None
    last_used_at: dt.datetime | None = None


class CreateTokenRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """``expires_in`` seconds from now; None: never."""

    name: str
    scopes: tuple[Scope, ...]
    expires_in: float | None = None


class CreateTokenReply(msgspec.Struct, frozen=True, kw_only=True):
    """``secret`` is shown this once and stored only as a hash."""

    token: TokenView
    secret: str


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error over HTTP (RFC 9457, ``application/problem+json``). ``code`` is the stable code of the error class."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str | None = None
    field: str | None = None
    request_id: str | None = None
    extra: dict[str, str] = {}


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """``checks`` names each check with ``ok`` or what is wrong."""

    status: str
    version: str
    checks: dict[str, str] = {}

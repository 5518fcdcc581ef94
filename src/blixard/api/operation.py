"""One operation of the API: the way every request takes, from who asks to the answer.

admit (access.py) → read and decode (bodies.py) → the resource's function → encode. Whatever goes wrong on the way becomes a
problem here, at the edge of the request, and is recorded if it is our own fault.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec
import structlog
from litestar.types import HTTPScope, Receive

from blixard.api.access import Access, Gatekeeper
from blixard.api.answer import Answer, Header, json_answer, problem_answer
from blixard.api.bodies import Decoder, WrongMediaType, check_media_type, decode, decode_query, read_body
from blixard.api.metrics import ApiMetrics
from blixard.api.waits import ClientGone, Waits
from blixard.domain.ids import check_id
from blixard.domain.limits import MAX_REQUEST_BYTES
from blixard.errors import BlixardError, InternalError, InvalidRequest, Unauthenticated, Unavailable
from blixard.protocol.problems import RETRY_AFTER_SECONDS, problem_of
from blixard.protocol.routes import JSON, MSGPACK, WORKER_LOGS, Route

if TYPE_CHECKING:
    from blixard.services.control_plane import ControlPlane

Q = TypeVar("Q")
R = TypeVar("R")
P = TypeVar("P")
CLIENT_CLOSED_REQUEST = 499
"""For metrics only, as nginx counts it: nobody reads this answer."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_log = structlog.get_logger("blixard.api")


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """What the door knows of a request before anybody looks into it. ``trusted``: it came over the Unix socket."""

    request_id: str
    trusted: bool
    waits: Waits


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiContext:
    """What every operation works with."""

    plane: ControlPlane
    gate: Gatekeeper
    metrics: ApiMetrics
    request_limit: int = MAX_REQUEST_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class Call(Generic[Q]):
    """One admitted and decoded request."""

    context: ApiContext
    access: Access
    parameters: Mapping[str, str]
    body: Q
    query: object
    scope: HTTPScope
    receive: Receive

    @property
    def plane(self) -> ControlPlane:
        return self.context.plane

    @property
    def namespace(self) -> str:
        return self.access.namespace

    @property
    def token(self) -> str:
        """The id of the caller's token; empty where none was needed."""
        return self.access.token_id or ""

    def query_as(self, kind: type[P]) -> P:
        assert isinstance(self.query, kind)
        return self.query

    async def wait(self, call: Callable[[float], Awaitable[P]], seconds: float) -> P:
        """Return ``call(seconds)``, ended early when the client goes away or the server stops."""
        return await exchange_of(self.scope).waits.run(self.receive, call, seconds)


Serve = Callable[[Call[Q]], Awaitable[R | Answer]]
"""The function of a resource: it may build its answer itself."""


class Operation(Generic[Q, R]):
    """A route and the function that serves it."""

    def __init__(self, route: Route[Q, R], serve: Serve[Q, R]) -> None:
        self.route = route
        self._serve = serve
        self._read = _reader_for(route)

    async def run(
        self, context: ApiContext, scope: HTTPScope, receive: Receive, parameters: Mapping[str, str]
    ) -> Answer:
        """Return the answer, whatever happens."""
        exchange = exchange_of(scope)
        try:
            answer = await self._run(context, scope, receive, parameters, exchange)
        except ClientGone:
            answer = Answer(CLIENT_CLOSED_REQUEST)
        except Exception as error:
            answer = answer_for(error, exchange.request_id)
        context.metrics.count_request(self.route.name, answer.status)
        return answer

    async def _run(
        self,
        context: ApiContext,
        scope: HTTPScope,
        receive: Receive,
        parameters: Mapping[str, str],
        exchange: Exchange,
    ) -> Answer:
        access = await context.gate.admit(scope, self.route, trusted=exchange.trusted)
        for name, value in parameters.items():
            _check_parameter(name, value)
        query = decode_query(scope, self.route.query)
        body = await self._read(scope, receive, context.request_limit)
        reply = await self._serve(Call(context, access, parameters, body, query, scope, receive))
        if isinstance(reply, Answer):
            return reply
        return Answer(self.route.status) if reply is None else json_answer(reply, self.route.status)


def exchange_of(scope: HTTPScope) -> Exchange:
    exchange = scope["state"]["exchange"]
    assert isinstance(exchange, Exchange)
    return exchange


def answer_for(error: Exception, request_id: str) -> Answer:
    """Return the problem for ``error``. A bug, and a store that fails, are written to the log."""
    status = 415 if isinstance(error, WrongMediaType) else None
    problem = problem_of(error, request_id=request_id, status=status)
    if not isinstance(error, BlixardError) or isinstance(error, InternalError):
        _log.error("request failed by a bug", request_id=request_id, exc_info=error)
    elif isinstance(error, Unavailable):
        _log.warning("request failed", request_id=request_id, code=error.code, reason=error.message)
    headers: list[Header] = []
    if isinstance(error, Unavailable):
        headers.append((b"retry-after", str(RETRY_AFTER_SECONDS).encode()))
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    return problem_answer(problem, headers)


def request_id_of(scope: HTTPScope) -> str:
    """Return the id that the client gave if it is a sane one, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = value.decode("latin-1")
            return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
    return secrets.token_hex(8)


def _check_parameter(name: str, value: str) -> None:
    if name != "digest":
        check_id(value, field=name)
    elif not _DIGEST.fullmatch(value):
        raise InvalidRequest(f"digest {value[:80]!r} is not a SHA-256 in lower-case hex", field="digest")


Reader = Callable[[HTTPScope, Receive, int], Awaitable[Q]]


def _reader_for(route: Route[Q, R]) -> Reader[Q]:
    """Return the function that reads and decodes the bodies of a route."""
    if route.request in (type(None), bytes):
        return _read_nothing
    decoders: dict[str, Decoder[Q]] = {JSON: msgspec.json.Decoder(route.request)}
    if route.name == WORKER_LOGS.name:
        decoders[MSGPACK] = msgspec.msgpack.Decoder(route.request)
    allowed = tuple(decoders)

    async def read(scope: HTTPScope, receive: Receive, limit: int) -> Q:
        media = check_media_type(scope, allowed)
        body = await read_body(scope, receive, limit)
        return decode(decoders[media], body, what="JSON" if media == JSON else "MessagePack")

    return read


async def _read_nothing(scope: HTTPScope, receive: Receive, limit: int) -> Q:
    """Leave the body alone: there is none, or it is a blob that its own function reads in pieces."""
    del scope, receive, limit
    return None  # type: ignore[return-value]  # Q is NoneType or bytes here, see _reader_for

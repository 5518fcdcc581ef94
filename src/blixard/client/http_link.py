"""One HTTP connection pool to one server: sends typed requests, retries what may be repeated, raises the error tree.

What happened to a request decides the error: nothing was sent → ``ServerUnreachable``; sent and no answer → tried again, since
writes carry their ids, and only then ``OutcomeUnknown``; an answer → the reply, or the error that the server raised.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from blixard.errors import BlixardError, ConfigError, InternalError, OutcomeUnknown, ServerUnreachable
from blixard.protocol.problems import error_of
from blixard.protocol.routes import JSON, PROTOCOL_HEADER, PROTOCOL_VERSION, Route
from blixard.protocol.transport import AiohttpTransport
from blixard.protocol.workers import Problem

R = TypeVar("R")
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
"""How long an answer may take beyond what the request itself waits for."""
RETRY_PAUSES = (0.05, 0.2, 1.0)
"""Seconds before each repetition of a request whose answer was lost."""
Content = bytes | Callable[[], AsyncIterator[bytes]]
"""A body, or what makes it anew for every try."""
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_encoder = msgspec.json.Encoder()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerAddress:
    """Where a server listens: a URL, or a Unix socket on this machine. ``ca_file``: trust this certificate authority."""

    url: str = "http://localhost"
    socket: Path | None = None
    token: str = dataclasses.field(default="", repr=False)
    ca_file: Path | None = None

    def __str__(self) -> str:
        return f"the socket {self.socket}" if self.socket else self.url


class HttpLink:
    """Use as ``async with``. Serves many concurrent calls on one event loop."""

    def __init__(self, address: ServerAddress, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """``transport`` replaces the one that the address calls for, such as a double in tests."""
        _check_url(address.url)
        self._address = address
        self._given = transport
        self._headers = {"Authorization": f"Bearer {address.token}"} if address.token else {}
        self._decoders: dict[str, msgspec.json.Decoder[Any]] = {}  # Any: one decoder per type of reply
        self._transport: httpx.AsyncBaseTransport | None = None

    async def open(self) -> None:
        """Make the pool; connects with the first call. Allowed twice."""
        if self._transport is None:
            self._transport = self._given or _transport(self._address)

    async def close(self) -> None:
        """Close all connections. Allowed twice and before ``open``."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()

    async def call(
        self,
        route: Route[Any, R],  # Any: the body comes encoded or is checked by the caller's types
        body: object = None,
        *,
        query: msgspec.Struct | None = None,
        wait: float = 0.0,
        repeat: bool = True,
        content: Content | None = None,
        headers: Mapping[str, str] | None = None,
        **parameters: str,
    ) -> R:
        """Send one request and return its typed reply. ``wait``: seconds that the server may take by request."""
        sent = dict(headers or {})
        if body is not None:
            content = _encoder.encode(body)
            sent.setdefault("Content-Type", JSON)
        response = await self._send(
            route, route.url(**parameters), content, sent, _query(query), wait=wait, repeat=repeat
        )
        return self._decode(route, response)

    @asynccontextmanager
    async def stream(self, route: Route[Any, bytes], **parameters: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Yield the body of a reply piece by piece. Not repeated: the caller may have seen a part of it."""
        try:
            response = await self._opened().handle_async_request(self._request(route, route.url(**parameters)))
            try:
                self._check_protocol(response)
                if response.status_code >= 400:
                    await response.aread()
                    raise _error_in(response)
                yield response.aiter_bytes()
            finally:
                await response.aclose()
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    async def _send(
        self,
        route: Route[Any, Any],
        url: str,
        content: Content | None,
        headers: Mapping[str, str],
        query: Mapping[str, object],
        *,
        wait: float,
        repeat: bool,
    ) -> httpx.Response:
        transport = self._opened()
        pauses = iter(RETRY_PAUSES if repeat else ())
        was_sent = False
        while True:
            body = content() if callable(content) else content
            request = self._request(route, url, body, headers, query, wait=wait)
            try:
                response = await transport.handle_async_request(request)
                await response.aread()
            except _NOT_SENT as error:
                raise self._lost(route, error) if was_sent else self._unreachable(error) from error
            except httpx.TransportError as error:
                was_sent = True
                pause = next(pauses, None)
                if pause is None:
                    raise self._lost(route, error) from error
                await asyncio.sleep(pause)
            else:
                self._check_protocol(response)
                return response

    def _request(
        self,
        route: Route[Any, Any],
        url: str,
        content: bytes | AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, object] | None = None,
        *,
        wait: float = 0.0,
    ) -> httpx.Request:
        return httpx.Request(
            route.method,
            self._address.url.rstrip("/") + url,
            content=content,
            headers={**self._headers, **(headers or {})},
            params=query or None,  # type: ignore[arg-type]  # to_builtins gives what httpx takes
            extensions={"timeout": _timeout(wait)},
        )

    def _decode(self, route: Route[Any, R], response: httpx.Response) -> R:
        if response.status_code >= 400:
            raise _error_in(response)
        if route.reply is type(None):
            return None
        decoder = self._decoders.get(route.name)
        if decoder is None:
            decoder = self._decoders[route.name] = msgspec.json.Decoder(route.reply)
        try:
            reply: R = decoder.decode(response.content)
        except msgspec.MsgspecError as error:
            raise InternalError(f"{self._address} answered {route.name} with something unexpected: {error}") from error
        return reply

    def _opened(self) -> httpx.AsyncBaseTransport:
        if self._transport is None:
            raise InternalError("the client is used outside of its `async with`")
        return self._transport

    def _check_protocol(self, response: httpx.Response) -> None:
        version = response.headers.get(PROTOCOL_HEADER)
        if version is None:
            raise ServerUnreachable(
                f"what answers at {self._address} is no Blixard server", hint="check server.url (BLIXARD_SERVER)"
            )
        if version != PROTOCOL_VERSION:
            raise ServerUnreachable(
                f"{self._address} speaks version {version} of the protocol, this client version {PROTOCOL_VERSION}",
                hint="install the same version on both sides",
            )

    def _unreachable(self, error: httpx.TransportError) -> ServerUnreachable:
        return ServerUnreachable(
            f"no answer from {self._address}: {_words(error)}",
            hint="is it running? `blixard serve` starts one; server.url (BLIXARD_SERVER) says which is meant",
        )

    def _lost(self, route: Route[Any, Any], error: httpx.TransportError) -> BlixardError:
        if route.method in {"GET", "HEAD"}:
            return self._unreachable(error)
        return OutcomeUnknown(
            f"the connection to {self._address} broke before it answered: {_words(error)}",
            hint="repeating it with the same ids is safe",
        )


def _transport(address: ServerAddress) -> AiohttpTransport:
    return AiohttpTransport(socket=address.socket, verify=_verification(address))


def _verification(address: ServerAddress) -> ssl.SSLContext | bool:
    """Return what certificates are verified with; plain HTTP skips loading certificates, 20 ms."""
    if not address.url.startswith("https://"):
        return False
    if address.ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(address.ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{address.ca_file} cannot be read as certificates: {error}", hint="give a PEM file"
        ) from error


def _timeout(wait: float) -> dict[str, float]:
    return {"connect": CONNECT_SECONDS, "read": wait + ANSWER_SECONDS}


def _query(query: msgspec.Struct | None) -> dict[str, object]:
    if query is None:
        return {}
    return {name: value for name, value in msgspec.to_builtins(query).items() if value not in (None, [], ())}


def _error_in(response: httpx.Response) -> BlixardError:
    try:
        return error_of(msgspec.json.decode(response.content, type=Problem))
    except msgspec.MsgspecError:
        # HEAD has no body, and a proxy's error page no problem.
        phrase = response.reason_phrase or "an error"
        status = response.status_code
        return error_of(Problem(type="about:blank", title=phrase, status=status, detail=phrase, code=""))


def _words(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"{url!r} is not the URL of a server", hint="give one such as http://127.0.0.1:3020")

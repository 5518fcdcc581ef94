"""The gateway of a worker whose control plane is behind HTTP, over TCP or a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec

from blixard.domain.lease import SyncReply, SyncRequest
from blixard.domain.limits import MIB
from blixard.domain.worker import Registration
from blixard.errors import BlixardError, OutcomeUnknown, ServerUnreachable
from blixard.protocol import routes
from blixard.protocol.problems import error_of
from blixard.protocol.transport import AiohttpTransport
from blixard.protocol.workers import LogBatch, Problem, RegisterReply

ANSWER_SECONDS = 10.0
"""How long an answer may take beyond the wait that was asked for. Whoever is slower is asked again."""
CONNECT_SECONDS = 5.0
PIECE_BYTES = 1 * MIB
R = TypeVar("R")

_encoder = msgspec.json.Encoder()
_packer = msgspec.msgpack.Encoder()
_problems = msgspec.json.Decoder(Problem)
_register_replies = msgspec.json.Decoder(RegisterReply)
_sync_replies = msgspec.json.Decoder(SyncReply)
_JSON = {"content-type": routes.JSON}
_MSGPACK = {"content-type": routes.MSGPACK}
_BLOB = {"content-type": routes.BLOB}


class HttpGateway:
    """Several calls at once, each on a kept connection of its own. ``socket`` is the server's Unix socket; ``url`` then only names the host."""

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        socket: Path | None = None,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._where = str(socket or url)
        self._url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._transport = AiohttpTransport(socket=socket, verify=verify)

    async def register(self, registration: Registration) -> RegisterReply:
        answer = await self._call(routes.REGISTER.method, routes.REGISTER.url(), _encoder.encode(registration), _JSON)
        return _decode(_register_replies, answer)

    async def sync(self, request: SyncRequest) -> SyncReply:
        url = routes.SYNC.url(session=request.session)
        answer = await self._call(routes.SYNC.method, url, _encoder.encode(request), _JSON, wait=request.wait)
        return _decode(_sync_replies, answer)

    async def append_logs(self, session: str, batches: Sequence[LogBatch]) -> None:
        url = routes.WORKER_LOGS.url(session=session)
        await self._call(routes.WORKER_LOGS.method, url, _packer.encode(batches), _MSGPACK)

    async def close_session(self, session: str) -> None:
        await self._call(routes.GOODBYE.method, routes.GOODBYE.url(session=session))

    async def put_blob(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        await self._call(routes.PUT_BLOB.method, routes.PUT_BLOB.url(digest=digest), content, _BLOB)
        return digest

    async def fetch_blob(self, digest: str, directory: Path) -> Path:
        """Download to ``directory/digest``; a broken or wrong download leaves nothing and is ``OutcomeUnknown``."""
        target = directory / digest
        partial = directory / f"{digest}.part"
        await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
        try:
            if await self._download(digest, partial) != digest:
                raise OutcomeUnknown(f"blob {digest} arrived damaged from {self._where}", hint="it is fetched again")
            partial.chmod(0o444)
            return await asyncio.to_thread(partial.replace, target)
        finally:
            await asyncio.to_thread(partial.unlink, missing_ok=True)

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _download(self, digest: str, partial: Path) -> str:
        """Write the blob to ``partial`` and return the digest of what came."""
        found = hashlib.sha256()
        file = await asyncio.to_thread(partial.open, "wb")
        try:
            with _explained(self._where):
                url = routes.GET_BLOB.url(digest=digest)
                response = await self._transport.handle_async_request(self._request(routes.GET_BLOB.method, url))
                try:
                    if response.is_error:
                        raise _error_of(response.status_code, await response.aread(), self._where)
                    async for piece in response.aiter_bytes(PIECE_BYTES):
                        found.update(piece)
                        await asyncio.to_thread(file.write, piece)
                finally:
                    await response.aclose()
        finally:
            file.close()
        return found.hexdigest()

    async def _call(
        self, method: str, url: str, content: bytes = b"", headers: dict[str, str] | None = None, *, wait: float = 0.0
    ) -> bytes:
        with _explained(self._where):
            response = await self._transport.handle_async_request(self._request(method, url, content, headers, wait))
            await response.aread()
        if response.is_error:
            raise _error_of(response.status_code, response.content, self._where)
        return response.content

    def _request(
        self, method: str, url: str, content: bytes = b"", headers: dict[str, str] | None = None, wait: float = 0.0
    ) -> httpx.Request:
        return httpx.Request(
            method,
            self._url + url,
            content=content or None,
            headers={**self._headers, **(headers or {})},
            extensions={"timeout": {"connect": CONNECT_SECONDS, "read": wait + ANSWER_SECONDS}},
        )


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ServerUnreachable(f"no server answers at {where}: {error}", hint="is `blixard serve` running?") from error
    except (httpx.TransportError, httpx.StreamError) as error:
        raise OutcomeUnknown(f"the connection to {where} broke: {error or type(error).__name__}") from error


def _error_of(status: int, body: bytes, where: str) -> BlixardError:
    try:
        return error_of(_problems.decode(body))
    except msgspec.MsgspecError:
        # A proxy's page, or a server that is no Blixard: perhaps ours is back behind it soon.
        return ServerUnreachable(f"what answers at {where} is no Blixard server (status {status})")


def _decode(decoder: msgspec.json.Decoder[R], body: bytes) -> R:
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise OutcomeUnknown(
            f"the answer cannot be read: {error}", hint="are both sides of the same version?"
        ) from error

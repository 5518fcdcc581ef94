"""What goes back over HTTP: status, headers, and a body at once or in pieces. Every part of the API answers with one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec
from litestar.types import HTTPResponseStartEvent, Receive, Scope, Send

from blixard.protocol.routes import JSON, PROBLEM_JSON
from blixard.protocol.workers import Problem

Header = tuple[bytes, bytes]
_encoder = msgspec.json.Encoder()


class Answer:
    """An ASGI application that sends one response. ``chunks`` replaces ``body`` and is ``length`` bytes long together."""

    __slots__ = ("body", "chunks", "headers", "status")

    def __init__(
        self,
        status: int = 200,
        body: bytes = b"",
        *,
        content_type: str | None = None,
        headers: Sequence[Header] = (),
        chunks: AsyncIterator[bytes] | None = None,
        length: int | None = None,
    ) -> None:
        self.status = status
        self.body = body
        self.chunks = chunks
        self.headers: list[Header] = list(headers)
        if content_type is not None:
            self.headers.append((b"content-type", content_type.encode("latin-1")))
        if status != 204:
            self.headers.append((b"content-length", str(len(body) if length is None else length).encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive  # an ASGI application is given it all the same
        start: HTTPResponseStartEvent = {"type": "http.response.start", "status": self.status, "headers": self.headers}
        await send(start)
        if self.chunks is not None and scope.get("method") != "HEAD":
            async for chunk in self.chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        body = b"" if scope.get("method") == "HEAD" else self.body
        await send({"type": "http.response.body", "body": body, "more_body": False})


def json_answer(value: object, status: int = 200) -> Answer:
    return Answer(status, _encoder.encode(value), content_type=JSON)


def problem_answer(problem: Problem, headers: Sequence[Header] = ()) -> Answer:
    return Answer(problem.status, _encoder.encode(problem), content_type=PROBLEM_JSON, headers=headers)

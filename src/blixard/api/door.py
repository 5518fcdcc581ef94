"""The outermost layer of the server: every request gets its id here, and the hottest routes their short cut.

Litestar's routing costs more than all else that a submit, a wait or a sync does, so these are recognised here and run the very
same ``Operation`` that Litestar would.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPResponseStartEvent, HTTPScope, Message, Receive, Scope, Send

from blixard.api.jobs import SUBMIT, WAIT
from blixard.api.operation import ApiContext, Exchange, request_id_of
from blixard.api.waits import Waits
from blixard.api.workers import SYNC
from blixard.protocol.routes import PREFIX, PROTOCOL_HEADER, PROTOCOL_VERSION, REQUEST_ID_HEADER

_BY_PATH = {PREFIX + SUBMIT.route.path: SUBMIT.run, PREFIX + WAIT.route.path: WAIT.run}
_SYNC_START, _, _SYNC_END = (PREFIX + SYNC.route.path).partition("{session}")
_NO_PARAMETERS: Mapping[str, str] = {}
_PROTOCOL = (PROTOCOL_HEADER.lower().encode(), PROTOCOL_VERSION.encode())
_REQUEST_ID = REQUEST_ID_HEADER.lower().encode()
_NO_SNIFF = (b"x-content-type-options", b"nosniff")


class Door:
    """One per listening socket; ``trusted``: who can connect to it may do everything. ``waits`` are those of its clients."""

    def __init__(self, app: ASGIApp, context: ApiContext, *, trusted: bool) -> None:
        self.waits = Waits()
        self._app = app
        self._context = context
        self._trusted = trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            return  # uvicorn is told that there are neither web sockets nor a lifespan
        request_id = request_id_of(scope)
        scope["state"] = {"exchange": Exchange(request_id, self._trusted, self.waits)}
        structlog.contextvars.bind_contextvars(request_id=request_id)
        added = (_PROTOCOL, (_REQUEST_ID, request_id.encode()), _NO_SNIFF)

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                start: HTTPResponseStartEvent = message
                start["headers"] = [*start["headers"], *added]
            await send(message)

        if not await self._short_cut(scope, receive, send_marked):
            await self._app(scope, receive, send_marked)

    async def _short_cut(self, scope: HTTPScope, receive: Receive, send: Send) -> bool:
        if scope["method"] != "POST":
            return False
        path = scope["path"]
        if (run := _BY_PATH.get(path)) is not None:
            answer = await run(self._context, scope, receive, _NO_PARAMETERS)
        elif path.startswith(_SYNC_START) and path.endswith(_SYNC_END):
            session = path[len(_SYNC_START) : -len(_SYNC_END)]
            if "/" in session or not session:
                return False
            answer = await SYNC.run(self._context, scope, receive, {"session": session})
        else:
            return False
        await answer(scope, receive, send)
        return True

"""The Litestar application: every operation at its route, the OpenAPI document with its page, and problems for all errors."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, get
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.response import Redirect
from litestar.types import Method

from blixard.api import batches, blobs, jobs, system, tokens, workers
from blixard.api.answer import Answer, Header, problem_answer
from blixard.api.docs_page import CONTENT_SECURITY_POLICY, render_page
from blixard.api.openapi import build_document
from blixard.api.operation import ApiContext, Operation, answer_for, exchange_of
from blixard.errors import BlixardError, InternalError, InvalidRequest, NotFound
from blixard.protocol.problems import problem_of
from blixard.protocol.routes import JSON, PREFIX

DOCS_PATH = f"{PREFIX}/docs"
OPENAPI_PATH = f"{PREFIX}/openapi.json"
# Any: each operation has its own types of body and reply, checked where it is defined.
OPERATIONS: tuple[Operation[Any, Any], ...] = (
    *jobs.OPERATIONS,
    *batches.OPERATIONS,
    *workers.OPERATIONS,
    *blobs.OPERATIONS,
    *system.OPERATIONS,
    *tokens.OPERATIONS,
)
# Any: Litestar's type parameters for user, auth and state, none of which is used.
AnyRequest = Request[Any, Any, Any]
_PARAMETER = re.compile(r"\{(\w+)\}")


def create_application(context: ApiContext) -> Litestar:
    """Return the application. It opens and closes nothing: whoever serves it owns the control plane."""
    return Litestar(
        route_handlers=[*(_handler_for(operation, context) for operation in OPERATIONS), *_page_handlers()],
        exception_handlers={HTTPException: _framework_error, Exception: _bug},
        openapi_config=None,  # Litestar would describe its own decoding; ours is described in openapi.py
        logging_config=None,
        request_max_body_size=None,  # bodies.py counts
    )


def _handler_for(operation: Operation[Any, Any], context: ApiContext) -> HTTPRouteHandler:
    async def handle(request: AnyRequest) -> Answer:
        return await operation.run(context, request.scope, request.receive, request.path_params)

    method: Method = operation.route.method  # type: ignore[assignment]  # the table holds plain text
    path = PREFIX + _PARAMETER.sub(r"{\1:str}", operation.route.path)
    # The status that Litestar is told means nothing, since the Answer has its own; only must it allow a body.
    return HTTPRouteHandler(path, http_method=[method], name=operation.route.name, status_code=200)(handle)


def _page_handlers() -> list[HTTPRouteHandler]:
    document = build_document([operation.route for operation in OPERATIONS])
    as_json = msgspec.json.encode(document)
    as_page = render_page(document).encode()
    headers: list[Header] = [(b"content-security-policy", CONTENT_SECURITY_POLICY.encode())]

    @get("/")
    async def root() -> Redirect:
        return Redirect(DOCS_PATH)

    @get(OPENAPI_PATH)
    async def openapi() -> Answer:
        return Answer(200, as_json, content_type=JSON)

    @get(DOCS_PATH)
    async def docs() -> Answer:
        return Answer(200, as_page, content_type="text/html; charset=utf-8", headers=headers)

    return [root, openapi, docs]


def _framework_error(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    """Turn what Litestar itself refuses into a problem of ours."""
    ours: BlixardError
    if error.status_code == 404:
        ours = NotFound(f"there is nothing at {request.url.path}", hint=f"{DOCS_PATH} lists what there is")
    elif error.status_code < 500:
        ours = InvalidRequest(_refusal(request, error))
    else:
        return _bug(request, error)
    request_id = exchange_of(request.scope).request_id
    answer = problem_answer(problem_of(ours, request_id=request_id, status=error.status_code))
    return _response(answer, error.headers)


def _refusal(request: AnyRequest, error: HTTPException) -> str:
    if error.status_code == 405:
        return f"{request.url.path} does not take {request.method}"
    return error.detail


def _bug(request: AnyRequest, error: Exception) -> Response[bytes]:
    ours = error if isinstance(error, BlixardError) else InternalError(str(error))
    ours.__cause__ = None if ours is error else error
    return _response(answer_for(ours, exchange_of(request.scope).request_id))


def _response(answer: Answer, headers: dict[str, str] | None = None) -> Response[bytes]:
    kept = {name.decode(): value.decode() for name, value in answer.headers if name != b"content-length"}
    media = kept.pop("content-type")
    return Response(answer.body, status_code=answer.status, media_type=media, headers={**kept, **(headers or {})})

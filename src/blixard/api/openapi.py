"""The OpenAPI document, made from the route table and the structs that travel: what it says is what the decoders do."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from blixard.api.examples import EXAMPLES
from blixard.api.version import server_version
from blixard.protocol.routes import BLOB, JSON, MSGPACK, PREFIX, PROBLEM_JSON, WORKER_LOGS, NoQuery, Route
from blixard.protocol.workers import Problem

# Any: an OpenAPI document is free-form JSON.
Json = dict[str, Any]
_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)\}")
_ID_PATTERN = "^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,254}$"
_DIGEST_PATTERN = "^[0-9a-f]{64}$"
_COMMON_PROBLEMS = (400, 401, 403, 500, 503)
_DESCRIPTION = """Durable jobs in isolated sandboxes.

Every error is a problem document (RFC 9457) with a stable `code`. Every write may be repeated with the same ids.
Send a token as `Authorization: Bearer blx_…`; a server on a loopback address works without until the first token is made.
"""


def build_document(routes: Sequence[Route[object, object]]) -> Json:
    """Return the OpenAPI 3.1 document of these routes."""
    kinds = [kind for route in routes for kind in (route.request, route.reply, route.query) if _has_schema(kind)]
    schemas, components = msgspec.json.schema_components([*kinds, Problem], ref_template=_REF)
    by_kind = dict(zip([str(kind) for kind in [*kinds, Problem]], schemas, strict=True))
    paths: dict[str, Json] = {}
    for route in routes:
        paths.setdefault(PREFIX + route.path, {})[route.method.lower()] = _operation(route, by_kind, components)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Blixard", "version": server_version(), "description": _DESCRIPTION},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "blx_…"}},
        },
    }


def _operation(route: Route[object, object], by_kind: Mapping[str, Json], components: Mapping[str, Json]) -> Json:
    operation: Json = {
        "operationId": route.name,
        "summary": route.summary,
        "tags": [route.path.split("/")[1]],
        "parameters": [*_path_parameters(route), *_query_parameters(route, components)],
        "responses": _responses(route, by_kind),
    }
    doc = inspect.getdoc(route.request) if _has_schema(route.request) and isinstance(route.request, type) else None
    if doc and issubclass(route.request, msgspec.Struct):
        operation["description"] = doc
    if route.scopes:
        operation["security"] = [{"token": sorted(str(scope) for scope in route.scopes)}, {}]
    if body := _request_body(route, by_kind):
        operation["requestBody"] = body
    return operation


def _request_body(route: Route[object, object], by_kind: Mapping[str, Json]) -> Json | None:
    if route.request is type(None):
        return None
    if route.request is bytes:
        return {"required": True, "content": {BLOB: {"schema": {"type": "string", "format": "binary"}}}}
    content: Json = {"schema": by_kind[str(route.request)]}
    if example := EXAMPLES.get(route.name):
        content["example"] = example
    media = {JSON: content}
    if route.name == WORKER_LOGS.name:
        media[MSGPACK] = {"schema": {}}
    return {"required": True, "content": media}


def _responses(route: Route[object, object], by_kind: Mapping[str, Json]) -> Json:
    success: Json = {"description": HTTPStatus(route.status).phrase}
    if route.reply is bytes:
        media = BLOB if route.path.startswith("/blobs") else "text/plain"
        success["content"] = {media: {"schema": {"type": "string"}}}
    elif route.reply is not type(None):
        success["content"] = {JSON: {"schema": by_kind[str(route.reply)]}}
    return {str(route.status): success, **{str(status): _problem(status) for status in _problem_statuses(route)}}


def _problem_statuses(route: Route[object, object]) -> list[int]:
    statuses = set(_COMMON_PROBLEMS if route.scopes else (400, 500, 503))
    if route.request is not type(None):
        statuses |= {413, 507} if route.request is bytes else {409, 413, 415, 422, 507}
    if route.query is not NoQuery:
        statuses |= {413}
    if "{" in route.path or route.request is not type(None):
        statuses |= {404}
    if route.method != "GET" and "{" in route.path:
        statuses |= {409, 410, 507}
    return sorted(statuses)


def _problem(status: int) -> Json:
    return {
        "description": HTTPStatus(status).phrase,
        "content": {PROBLEM_JSON: {"schema": {"$ref": _REF.format(name="Problem")}}},
    }


def _path_parameters(route: Route[object, object]) -> list[Json]:
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "pattern": _DIGEST_PATTERN if name == "digest" else _ID_PATTERN},
        }
        for name in _PARAMETER.findall(route.path)
    ]


def _query_parameters(route: Route[object, object], components: Mapping[str, Json]) -> list[Json]:
    if route.query is NoQuery:
        return []
    properties = components[route.query.__name__]["properties"]
    return [
        {"name": name, "in": "query", "required": False, "schema": _without_null(schema)}
        for name, schema in properties.items()
    ]


def _without_null(schema: Json) -> Json:
    """A query parameter is absent rather than null."""
    kept = {name: value for name, value in schema.items() if not (name == "default" and value is None)}
    choices = [choice for choice in kept.pop("anyOf", []) if choice != {"type": "null"}]
    if len(choices) == 1:
        return {**kept, **choices[0]}
    return {**kept, "anyOf": choices} if choices else kept


def _has_schema(kind: object) -> bool:
    return kind not in (type(None), bytes)

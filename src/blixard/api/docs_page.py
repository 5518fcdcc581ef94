"""The browsable page of the API: plain HTML made from the OpenAPI document, so it needs no network, no script and no assets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import Any

from blixard.protocol.problems import TABLE

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
_BACKTICKS = re.compile(r"``?([^`]+)``?")
# Any: an OpenAPI document is free-form JSON.
Json = dict[str, Any]
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #2563a8; }
@media (prefers-color-scheme: dark) { :root { --accent: #7db4ee; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; display: grid; grid-template-columns: 15rem minmax(0, 1fr); }
nav { border-right: 1px solid var(--line); padding: 1.25rem; position: sticky; top: 0; height: 100vh; overflow-y: auto; }
nav h2 { font-size: .75rem; text-transform: uppercase; letter-spacing: .06em; margin: 1.1rem 0 .25rem; opacity: .7; }
nav a { display: block; text-decoration: none; padding: .1rem 0; }
main { padding: 1.5rem 2.5rem 4rem; max-width: 62rem; }
h1 { margin: 0 0 .25rem; font-size: 1.6rem; }
main h2 { margin: 2.25rem 0 .5rem; border-bottom: 1px solid var(--line); text-transform: capitalize; }
a { color: var(--accent); }
code, pre { font-family: ui-monospace, monospace; font-size: .87em; }
pre { background: var(--soft); padding: .75rem; border-radius: 6px; overflow-x: auto; margin: .4rem 0; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; padding: 0 .8rem; }
details[open] { padding-bottom: .6rem; }
summary { cursor: pointer; padding: .5rem 0; }
summary span { opacity: .75; margin-left: .6rem; }
.method { display: inline-block; min-width: 4.2rem; font: 600 .78rem ui-monospace, monospace; color: var(--accent); }
table { border-collapse: collapse; width: 100%; margin: .4rem 0; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
h4 { margin: .8rem 0 .2rem; font-size: .85rem; }
@media (max-width: 48rem) { body { display: block; } nav { display: none; } main { padding: 1rem; } }
"""


def render_page(document: Json) -> str:
    """Return the whole page; every text from the document is escaped."""
    info = document["info"]
    operations = [
        (path, method, operation) for path, item in document["paths"].items() for method, operation in item.items()
    ]
    groups = [(tag, list(group)) for tag, group in groupby(sorted(operations, key=_tag), key=_tag)]
    main = "".join(_group(tag, group) for tag, group in groups)
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style></head><body>"
        f"<nav><strong>{escape(info['title'])} API</strong>{_index(groups)}</nav><main>"
        f"<h1>{escape(info['title'])} API <small>{escape(info['version'])}</small></h1>"
        f"<p>{_prose(info['description'])}</p><p><a href=openapi.json>openapi.json</a></p>"
        f"{main}{_problems()}{_schemas(document['components']['schemas'])}</main></body></html>"
    )


def _tag(entry: tuple[str, str, Json]) -> str:
    return str(entry[2]["tags"][0])


def _index(groups: list[tuple[str, list[tuple[str, str, Json]]]]) -> str:
    parts = []
    for tag, group in groups:
        links = (f"<a href='#{escape(o['operationId'])}'>{escape(o['operationId'])}</a>" for _, _, o in group)
        parts.append(f"<h2>{escape(tag)}</h2>{''.join(links)}")
    return "".join([*parts, "<h2>more</h2><a href=#problems>problems</a><a href=#schemas>schemas</a>"])


def _group(tag: str, group: list[tuple[str, str, Json]]) -> str:
    return f"<h2>{escape(tag)}</h2>" + "".join(_operation(*entry) for entry in group)


def _operation(path: str, method: str, operation: Json) -> str:
    head = (
        f"<summary><b class=method>{escape(method.upper())}</b><code>{escape(path)}</code>"
        f"<span>{escape(operation['summary'])}</span></summary>"
    )
    body = "".join(_operation_parts(operation))
    return f"<details id='{escape(operation['operationId'])}'>{head}{body}</details>"


def _operation_parts(operation: Json) -> Iterator[str]:
    if text := operation.get("description"):
        yield f"<p>{_prose(text)}</p>"
    scopes = [scope for entry in operation.get("security", []) for scope in entry.get("token", [])]
    yield f"<p>Scope: {' or '.join(f'<code>{escape(scope)}</code>' for scope in scopes) or 'none needed'}</p>"
    if parameters := operation["parameters"]:
        rows = "".join(
            f"<tr><td><code>{escape(p['name'])}</code><td>{p['in']}<td>{_kind(p['schema'])}" for p in parameters
        )
        yield f"<h4>Parameters</h4><table><tr><th>Name<th>In<th>Type{rows}</table>"
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<h4>Body</h4><p>{_kind(content['schema'])} as <code>{escape(media)}</code></p>"
        if "example" in content:
            yield _code(content["example"])
    yield f"<h4>Answers</h4><table>{''.join(_answer(*entry) for entry in operation['responses'].items())}</table>"


def _answer(status: str, response: Json) -> str:
    kinds = ", ".join(_kind(content["schema"]) for content in response.get("content", {}).values())
    return f"<tr><td><code>{escape(status)}</code><td>{escape(response['description'])}<td>{kinds}"


def _kind(schema: Json) -> str:
    """Return the type in a few words, named schemas as links."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f"<a href='#schema-{name}'>{name}</a>"
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return " or ".join(_kind(choice) for choice in schema[word])
    if schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        return f"list of {_kind(schema['items'])}"
    if "enum" in schema:
        return "one of " + ", ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    return escape(str(schema.get("format") or schema.get("type") or "any JSON value"))


def _problems() -> str:
    rows = "".join(
        f"<tr id='problem-{row.error.code}'><td><code>{row.error.code}</code><td>{row.status}"
        f"<td>{_prose((row.error.__doc__ or '').strip())}"
        for row in TABLE
    )
    return f"<h2 id=problems>Problems</h2><table><tr><th>Code<th>Status<th>Meaning{rows}</table>"


def _schemas(schemas: Json) -> str:
    parts = (
        f"<details id='schema-{escape(name)}'><summary><code>{escape(name)}</code></summary>"
        f"<p>{_prose(schema.get('description', ''))}</p>{_properties(schema)}</details>"
        for name, schema in sorted(schemas.items())
    )
    return f"<h2 id=schemas>Schemas</h2>{''.join(parts)}"


def _properties(schema: Json) -> str:
    if "properties" not in schema:
        return f"<p>{_kind({key: value for key, value in schema.items() if key != 'description'})}</p>"
    required = set(schema.get("required", ()))
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{_kind(kind)}<td>{_default(name, kind, required)}"
        for name, kind in schema["properties"].items()
    )
    return f"<table><tr><th>Field<th>Type<th>Default{rows}</table>"


def _default(name: str, schema: Json, required: set[str]) -> str:
    if name in required:
        return "<b>required</b>"
    return f"<code>{escape(json.dumps(schema['default']))}</code>" if "default" in schema else ""


def _prose(text: str) -> str:
    """Return text as HTML, with what stands between backticks as code."""
    return _BACKTICKS.sub(r"<code>\1</code>", escape(text))


def _code(value: object) -> str:
    return f"<pre>{escape(json.dumps(value, indent=2))}</pre>"

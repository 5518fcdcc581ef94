"""From bytes to typed values at the door: size, content type, JSON, fields; each refusal names what is wrong and where."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Protocol, TypeVar
from urllib.parse import parse_qsl

import msgspec
from litestar.types import HTTPScope, Receive

from blixard.api.waits import ClientGone
from blixard.domain.limits import MAX_REQUEST_BYTES
from blixard.errors import InvalidRequest, LimitExceeded

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$?\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_NAMED = re.compile(r"field `(?P<name>[^`]+)`")


class WrongMediaType(InvalidRequest):
    """The body is not of a type that this route reads (answered as 415)."""


class Decoder(Protocol[T_co]):
    def decode(self, content: bytes, /) -> T_co: ...


async def read_chunks(scope: HTTPScope, receive: Receive, limit: int) -> AsyncIterator[bytes]:
    """Yield the body as it comes. Raises ``LimitExceeded`` as soon as it is known to be too long, ``ClientGone``."""
    if (length := _content_length(scope)) is not None and length > limit:
        raise _too_long(limit)
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        chunk = message["body"]
        size += len(chunk)
        if size > limit:
            raise _too_long(limit)
        if chunk:
            yield chunk
        if not message.get("more_body", False):
            return


async def read_body(scope: HTTPScope, receive: Receive, limit: int = MAX_REQUEST_BYTES) -> bytes:
    """Return the whole body, at most ``limit`` bytes."""
    chunks = [chunk async for chunk in read_chunks(scope, receive, limit)]
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def check_media_type(scope: HTTPScope, allowed: tuple[str, ...]) -> str:
    """Return the body's media type if it is one of ``allowed``. Raises ``WrongMediaType``."""
    given = next((value for name, value in scope["headers"] if name == b"content-type"), b"").decode("latin-1")
    media = given.partition(";")[0].strip().lower()
    if media not in allowed:
        what = f"a body of type {media!r}" if media else "a body without a Content-Type"
        raise WrongMediaType(f"{what} is not read here", hint=f"send Content-Type: {' or '.join(allowed)}")
    return media


def decode(decoder: Decoder[T], body: bytes, *, what: str = "JSON") -> T:
    """Return the typed value. Raises ``InvalidRequest`` with the path of the field that is wrong."""
    try:
        if what == "JSON":
            body.isascii() or body.decode()  # msgspec passes the bytes of raw values through unread
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not {what}: {error}", hint=f"send {what} in UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def decode_query(scope: HTTPScope, kind: type[T]) -> T:
    """Return the query parameters. Raises ``InvalidRequest`` for unknown, repeated or wrong ones."""
    raw = scope["query_string"]
    if not raw:
        return kind()
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
        return msgspec.convert(_collect(pairs, kind), kind, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), "query parameter") from None
    except ValueError as error:
        raise InvalidRequest(f"the query string cannot be read: {error}") from None


def _collect(pairs: list[tuple[str, str]], kind: type) -> dict[str, str | list[str]]:
    collected: dict[str, str | list[str]] = {}
    lists = {field.name for field in msgspec.structs.fields(kind) if str(field.type).startswith("tuple[")}
    for name, value in pairs:
        if name in lists:
            so_far = collected.setdefault(name, [])
            assert isinstance(so_far, list)
            so_far.append(value)
        elif name in collected:
            raise InvalidRequest(f"the query parameter {name!r} is given twice", field=name)
        else:
            collected[name] = value
    return collected


def _invalid(message: str, what: str = "field") -> InvalidRequest:
    """Turn ``Expected `int`, got `str` - at `$.spec.timeout` `` into an error with the field ``spec.timeout``."""
    match = _PATH.match(message)
    assert match is not None  # the pattern matches any text
    path = match["path"] or ""
    if named := _NAMED.search(
        match["what"]
    ):  # a missing or unknown field is named in the words, its parent in the path
        path = f"{path}.{named['name']}" if path else named["name"]
    place = f"{what} {path}: " if path else "the body: "
    return InvalidRequest(f"{place}{match['what']}", field=path or None)


def _content_length(scope: HTTPScope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None


def _too_long(limit: int) -> LimitExceeded:
    return LimitExceeded(
        f"the body is longer than {limit} bytes", field="body", hint="send less at once; large values travel as blobs"
    )

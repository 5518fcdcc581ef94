"""Arguments and results of Python functions between values and what travels."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping, Sequence

import msgspec

from blixard.domain.json_text import encode_json
from blixard.domain.limits import MAX_ARGUMENTS_BYTES
from blixard.domain.payload import Encoding
from blixard.errors import InvalidRequest, LimitExceeded


def encode_arguments(encoding: Encoding, args: Sequence[object], kwargs: Mapping[str, object]) -> bytes:
    """Return the arguments of one call as JSON text. Raises ``InvalidRequest`` naming the argument that does not serialise."""
    try:
        data = _encode(encoding, [list(args), dict(kwargs)])
    except Exception as error:  # a user's type may raise anything when it is serialised
        raise _not_serialisable(encoding, args, kwargs, error) from error
    if len(data) > MAX_ARGUMENTS_BYTES:
        raise LimitExceeded(
            f"the arguments are {len(data)} bytes; {MAX_ARGUMENTS_BYTES} are allowed (MAX_ARGUMENTS_BYTES)",
            field="arguments",
            hint="write it to a file, pass its path, and let the job read it: allow_read=[path]",
        )
    return data


def _encode(encoding: Encoding, value: object) -> bytes:
    if encoding is Encoding.JSON:
        return encode_json(value)
    packed = msgspec.msgpack.encode(value) if encoding is Encoding.MSGPACK else pickle.dumps(value)
    return b'"' + base64.b64encode(packed) + b'"'


def _not_serialisable(
    encoding: Encoding, args: Sequence[object], kwargs: Mapping[str, object], error: Exception
) -> InvalidRequest:
    named = [*((str(place), value) for place, value in enumerate(args)), *kwargs.items()]
    wrong = next(((name, value) for name, value in named if not _serialises(encoding, value)), None)
    what = f"argument {wrong[0]} ({type(wrong[1]).__name__})" if wrong else "the arguments"
    others = " or ".join(repr(str(other)) for other in Encoding if other is not encoding)
    return InvalidRequest(
        f"{what} cannot be written as {encoding}: {error}",
        field="arguments",
        hint=f"pass plain values (numbers, text, lists, dictionaries), or choose encoding={others} for the job",
    )


def _serialises(encoding: Encoding, value: object) -> bool:
    try:
        _encode(encoding, value)
    except Exception:  # the same: only whether it works is asked
        return False
    return True


def decode_result(encoding: Encoding, data: bytes | None) -> object:
    """Return the value that the function returned. Pickle is only read when the job was declared with it."""
    if data is None:
        return None
    return _decode(encoding, data)


def decode_arguments(encoding: Encoding, data: bytes) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments of one call as its function receives them."""
    args, kwargs = msgspec.convert(_decode(encoding, data), tuple[list[object], dict[str, object]])
    return tuple(args), kwargs


def _decode(encoding: Encoding, data: bytes) -> object:
    value = msgspec.json.decode(data)
    if encoding is Encoding.JSON or value is None:
        return value
    packed = base64.b64decode(value)
    if encoding is Encoding.MSGPACK:
        return msgspec.msgpack.decode(packed)
    return pickle.loads(packed)  # noqa: S301 - the user asked for pickle by name, for this very function

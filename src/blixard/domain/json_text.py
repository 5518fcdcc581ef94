"""Values as JSON, without the silent loss that JSON brings along."""

from __future__ import annotations

import math

import msgspec

_encode = msgspec.json.Encoder().encode


def encode_json(value: object) -> bytes:
    """Return the JSON of a value. Raises ``ValueError`` for NaN and infinities, of which JSON would make null, and what msgspec raises."""
    text = _encode(value)
    if b"null" in text and _has_odd_number(msgspec.to_builtins(value)):
        raise ValueError("JSON has no NaN and no infinity")
    return text


def _has_odd_number(value: object) -> bool:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, float) and not math.isfinite(item):
            return True
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
    return False

"""What people write for times and sizes on the command line. Each raises ``InvalidRequest`` that names the option."""

from __future__ import annotations

import datetime as dt
import math

from blixard.config.units import parse_duration, parse_size
from blixard.domain.limits import MIB
from blixard.errors import InvalidRequest


def read_seconds(text: str, option: str) -> float:
    """Return seconds of ``30``, ``1.5s``, ``5m``, ``2h``, ``7d``."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise InvalidRequest(f"{option}: {error}", field=option) from error


def read_megabytes(text: str, option: str) -> int:
    """Return MiB, rounded up, of ``512`` (MiB), ``512MiB``, ``2GB``."""
    try:
        size = int(text) * MIB if text.strip().isdecimal() and len(text) < 20 else parse_size(text)
    except ValueError as error:
        raise InvalidRequest(f"{option}: {error}", field=option) from error
    return math.ceil(size / MIB)


def read_moment(text: str, option: str) -> dt.datetime:
    """Return the time of an age (``1h``: an hour ago) or of an RFC 3339 time; without a zone it is local."""
    try:
        return dt.datetime.now(dt.UTC) - dt.timedelta(seconds=parse_duration(text))
    except (ValueError, OverflowError):
        pass
    try:
        return dt.datetime.fromisoformat(text).astimezone(dt.UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"{option}: {text!r} is neither an age such as 90s, 15m, 1h, 7d nor a time such as 2026-11-23T14:00:00Z",
            field=option,
        ) from error


def read_pairs(items: list[str], option: str) -> dict[str, str]:
    """Return the names and values of ``NAME=VALUE`` items."""
    pairs = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise InvalidRequest(f"{option}: {item!r} is not of the form NAME=VALUE", field=option)
        pairs[name] = value
    return pairs

"""Durations and sizes as people write them: 500ms, 10s, 7d; 64KiB, 10MB."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal

DURATION_UNITS: Mapping[str, Decimal] = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
}
SIZE_UNITS: Mapping[str, Decimal] = {
    "B": Decimal(1),
    "KB": Decimal(10**3),
    "MB": Decimal(10**6),
    "GB": Decimal(10**9),
    "TB": Decimal(10**12),
    "KiB": Decimal(2**10),
    "MiB": Decimal(2**20),
    "GiB": Decimal(2**30),
    "TiB": Decimal(2**40),
}
_QUANTITY = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)")


def parse_duration(value: object) -> float:
    """Return seconds. A bare number is seconds. Raises ``ValueError`` that says which units exist."""
    return float(_parse(value, DURATION_UNITS, "a duration such as 10s", bare="seconds"))


def parse_size(value: object) -> int:
    """Return bytes. A bare number is bytes. Raises ``ValueError`` that says which units exist."""
    amount = _parse(value, SIZE_UNITS, "a size such as 64MiB", bare="bytes")
    if amount != int(amount):
        raise ValueError(f"{value!r} is not a whole number of bytes")
    return int(amount)


def format_duration(seconds: float) -> str:
    """Return the shortest text that ``parse_duration`` turns back into exactly ``seconds``."""
    return _format(Decimal(repr(seconds)), DURATION_UNITS, "s")


def format_size(size: int) -> str:
    """Return the shortest text that ``parse_size`` turns back into exactly ``size``."""
    return _format(Decimal(size), SIZE_UNITS, "B")


def _parse(value: object, units: Mapping[str, Decimal], wanted: str, *, bare: str) -> Decimal:
    help_text = f"{wanted} is needed; units are {', '.join(units)}, a number alone means {bare}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{value!r} is not possible; {help_text}")
        return Decimal(repr(value))
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is not understood; {help_text}")
    number, unit = match.groups()
    if not unit:
        return Decimal(number)
    factor = next((units[name] for name in units if name.lower() == unit.lower()), None)
    if factor is None:
        raise ValueError(f"there is no unit {unit!r} in {value!r}; {help_text}")
    return Decimal(number) * factor


def _format(amount: Decimal, units: Mapping[str, Decimal], base: str) -> str:
    if amount == 0:
        return f"0{base}"
    whole = [f"{int(amount / factor)}{name}" for name, factor in units.items() if amount % factor == 0]
    # Of equally short ones the later, that is the larger unit: 1GiB rather than 1024MiB.
    return min(reversed(whole), key=len) if whole else f"{amount:f}{base}"

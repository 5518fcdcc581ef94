"""Checks a job's arguments against what the module expects, and writes the values that come back as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from blixard.backends.wasm.wire import FunctionType
from blixard.domain.outcome import AttemptError

_INTEGERS = {"i32": 32, "i64": 64}
_FLOATS = frozenset({"f32", "f64"})
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_decode_any = msgspec.json.Decoder().decode


class JobRefused(Exception):
    """The job cannot run as it stands, for a reason of its own."""

    def __init__(self, error: AttemptError) -> None:
        super().__init__(error.message)
        self.error = error


def refuse(kind: str, message: str, hint: str | None = None) -> JobRefused:
    """Return an error that no second attempt would change."""
    return JobRefused(AttemptError(type=kind, message=message, hint=hint, retryable=False))


def decode_words(arguments: bytes) -> tuple[str, ...]:
    """Return the strings behind the program's name. Raises ``JobRefused``."""
    words = _decode_list(arguments, "strings")
    for word in words:
        if not isinstance(word, str) or "\0" in word:
            raise refuse(
                "InvalidArguments",
                f"the arguments of a Wasm command are a list of strings without NUL; {word!r} is not one",
                "write numbers as text, or name a function to call with numbers",
            )
    return tuple(word for word in words if isinstance(word, str))


def decode_values(arguments: bytes, name: str, kind: FunctionType) -> tuple[int | float, ...]:
    """Return the numbers to call the export with. A float may also be "NaN", "Infinity" or "-Infinity". Raises ``JobRefused``."""
    values = _decode_list(arguments, "numbers")
    if len(values) != len(kind.params):
        raise refuse(
            "InvalidArguments", f"{describe(name, kind)} takes {len(kind.params)} arguments; {len(values)} were given"
        )
    return tuple(
        _convert(value, param, position, describe(name, kind))
        for position, (value, param) in enumerate(zip(values, kind.params, strict=True), 1)
    )


def find_function(functions: dict[str, FunctionType], name: str) -> FunctionType:
    """Return the type of the exported function. Raises ``JobRefused`` naming what there is."""
    if (kind := functions.get(name)) is None:
        known = ", ".join(sorted(functions)[:20]) or "none"
        raise refuse("FunctionNotFound", f"the module exports no function {name!r}", f"it exports: {known}")
    unknown = [word for word in (*kind.params, *kind.results) if word not in _INTEGERS and word not in _FLOATS]
    if unknown:
        raise refuse(
            "UnsupportedSignature",
            f"{describe(name, kind)} uses {unknown[0]}, which JSON cannot carry",
            "call a function of i32, i64, f32 and f64 only",
        )
    return kind


def find_start(functions: dict[str, FunctionType]) -> None:
    """Check that the module is a command. Raises ``JobRefused``."""
    if (kind := functions.get("_start")) is None or kind.params or kind.results:
        known = ", ".join(sorted(functions)[:20]) or "none"
        raise refuse(
            "NotACommand",
            "the module has no _start function, so it is not a WASI command",
            f"name the function to call; it exports: {known}",
        )


def encode_values(values: Sequence[int | float]) -> msgspec.Raw:
    """Return no value as null, one as a number, more as a list; a float that JSON lacks as the strings of ``decode_values``."""
    written = [_write(value) for value in values]
    return msgspec.Raw(msgspec.json.encode(None if not written else written[0] if len(written) == 1 else written))


def describe(name: str, kind: FunctionType) -> str:
    return f"{name}({', '.join(kind.params)}) -> ({', '.join(kind.results)})"


def _decode_list(arguments: bytes, what: str) -> list[object]:
    try:
        decoded = _decode_any(arguments)
    except msgspec.DecodeError as error:
        raise refuse("InvalidArguments", f"the arguments are not JSON: {error}") from error
    if not isinstance(decoded, list):
        raise refuse("InvalidArguments", f"the arguments must be a JSON list of {what}")
    return decoded


def _convert(value: object, param: str, position: int, function: str) -> int | float:
    converted = _to_integer(value, _INTEGERS[param]) if param in _INTEGERS else _to_float(value, param)
    if converted is None:
        raise refuse("InvalidArguments", f"argument {position} of {function} is {value!r}, which is no {param}")
    return converted


def _to_integer(value: object, bits: int) -> int | None:
    """Accept the signed and the unsigned reading of the type; the engine wants the signed one."""
    if not isinstance(value, int) or isinstance(value, bool) or not -(1 << bits - 1) <= value < 1 << bits:
        return None
    return value - (1 << bits) if value >= 1 << bits - 1 else value


def _to_float(value: object, param: str) -> float | None:
    if isinstance(value, str):
        return _NOT_FINITE.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if param == "f32" and abs(number) > _MAX_F32 else number


_MAX_F32 = 3.4028234663852886e38


def _write(value: float) -> int | float | str:
    if isinstance(value, int) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"

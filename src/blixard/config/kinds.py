"""The kinds of values a setting can have: how each is read from TOML or text, checked, shown and described.

A kind stands in the annotation of a setting, ``Annotated[int, Whole(0, 65535)]``; pydantic calls its ``parse``.
``parse`` raises ``ValueError`` that names the value, what is allowed and an example.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from blixard.config.units import format_duration, format_size, parse_duration, parse_size

MAX_TEXT = 4096
MAX_ENTRIES = 64


def did_you_mean(wrong: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ``; did you mean 'x'?`` for a near miss, else nothing. ``cutoff`` of 1 asks for the same word."""
    close = difflib.get_close_matches(wrong, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


T = TypeVar("T")


class Kind(abc.ABC, Generic[T]):
    """Base of all kinds."""

    @abc.abstractmethod
    def parse(self, value: object) -> T:
        """Return the checked value of what stood in TOML, in a variable or on the command line."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Return what is allowed, for a table cell."""

    def show(self, value: T) -> str:
        """Return the value as a TOML literal that ``parse`` accepts."""
        return json.dumps(value, ensure_ascii=False)

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.parse, handler(source))


@dataclasses.dataclass(frozen=True)
class Whole(Kind[int]):
    low: int
    high: int

    def parse(self, value: object) -> int:
        if isinstance(value, str) and value.strip().lstrip("-").isdecimal() and len(value) <= 20:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{value!r} is not a whole number; {self.describe()} is needed")  # noqa: TRY004  pydantic reports only ValueError
        if not self.low <= value <= self.high:
            raise ValueError(f"{value} is out of range; {self.low} to {self.high} is allowed")
        return value

    def describe(self) -> str:
        return f"whole number, {self.low} to {self.high}"


@dataclasses.dataclass(frozen=True)
class Number(Kind[float]):
    low: float
    high: float

    def parse(self, value: object) -> float:
        number = _to_float(value)
        if number is None:
            raise ValueError(f"{value!r} is not a number; {self.describe()} is needed")
        if not self.low <= number <= self.high:
            raise ValueError(f"{number:g} is out of range; {self.low:g} to {self.high:g} is allowed")
        return number

    def describe(self) -> str:
        return f"number, {self.low:g} to {self.high:g}"


def _to_float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


@dataclasses.dataclass(frozen=True)
class Flag(Kind[bool]):
    """On or off. A variable that is set to nothing is off, as if it were not there."""

    YES = ("true", "yes", "on", "1")
    NO = ("false", "no", "off", "0", "")

    def parse(self, value: object) -> bool:
        word = value.strip().lower() if isinstance(value, str) else value
        if isinstance(word, bool):
            return word
        if word in self.YES:
            return True
        if word in self.NO:
            return False
        raise ValueError(f"{value!r} is neither true nor false")

    def describe(self) -> str:
        return "true or false"


@dataclasses.dataclass(frozen=True)
class Duration(Kind[float]):
    """Seconds once parsed."""

    low: float
    high: float

    def parse(self, value: object) -> float:
        seconds = parse_duration(value)
        if not self.low <= seconds <= self.high:
            raise ValueError(f"{value!r} is out of range; {self._range()} is allowed")
        return seconds

    def show(self, value: float) -> str:
        return json.dumps(format_duration(value))

    def _range(self) -> str:
        return f"{format_duration(self.low)} to {format_duration(self.high)}"

    def describe(self) -> str:
        return f"duration, {self._range()}"


@dataclasses.dataclass(frozen=True)
class Size(Kind[int]):
    """Bytes once parsed."""

    low: int
    high: int

    def parse(self, value: object) -> int:
        size = parse_size(value)
        if not self.low <= size <= self.high:
            raise ValueError(f"{value!r} is out of range; {self._range()} is allowed")
        return size

    def show(self, value: int) -> str:
        return json.dumps(format_size(value))

    def _range(self) -> str:
        return f"{format_size(self.low)} to {format_size(self.high)}"

    def describe(self) -> str:
        return f"size, {self._range()}"


@dataclasses.dataclass(frozen=True)
class Choice(Kind[str]):
    choices: tuple[str, ...]

    def parse(self, value: object) -> str:
        if isinstance(value, str) and value.strip().lower() in self.choices:
            return value.strip().lower()
        near = did_you_mean(value, self.choices) if isinstance(value, str) else ""
        raise ValueError(f"{value!r} is not one of {', '.join(self.choices)}{near}")

    def describe(self) -> str:
        return "one of " + ", ".join(self.choices)


@dataclasses.dataclass(frozen=True)
class Text(Kind[str]):
    what: str = "text"
    prefixes: tuple[str, ...] = ()
    """A value that is not empty starts with one of these."""
    secret: bool = False

    def parse(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{self._quote(value)} is not text")  # noqa: TRY004  pydantic reports only ValueError
        text = value.strip()
        if len(text) > MAX_TEXT or not text.isprintable():
            raise ValueError(f"{self._quote(value)} has control characters or is over {MAX_TEXT} characters long")
        if text and self.prefixes and not text.startswith(self.prefixes):
            raise ValueError(f"{self._quote(text)} does not start with {' or '.join(self.prefixes)}")
        return text

    def _quote(self, value: object) -> str:
        return "the value (hidden)" if self.secret else repr(value)

    def describe(self) -> str:
        return self.what


@dataclasses.dataclass(frozen=True)
class Place(Kind[Path | None]):
    """A path; ``~`` is the user's home, and a relative one starts at the current directory. Empty: none."""

    optional: bool = True

    def parse(self, value: object) -> Path | None:
        if not isinstance(value, str | Path) or "\0" in str(value):
            raise ValueError(f"{value!r} is not a path")
        if not str(value).strip():
            if self.optional:
                return None
            raise ValueError("is empty; a path is needed")
        return Path(os.path.abspath(Path(value).expanduser()))  # noqa: PTH100  Path.absolute() keeps '..'

    def show(self, value: Path | None) -> str:
        return json.dumps("" if value is None else str(value), ensure_ascii=False)

    def describe(self) -> str:
        return "path"


@dataclasses.dataclass(frozen=True)
class Words(Kind[tuple[str, ...]]):
    """A list of names; in a variable they stand between commas."""

    choices: tuple[str, ...] = ()

    def parse(self, value: object) -> tuple[str, ...]:
        words = [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word for word in words):
            raise ValueError(f"{value!r} is not a list of names")
        if len(words) > MAX_ENTRIES or len(set(words)) != len(words):
            raise ValueError(f"{value!r} names something twice or has over {MAX_ENTRIES} entries")
        for word in words:
            if self.choices and word not in self.choices:
                near = did_you_mean(word, self.choices)
                raise ValueError(f"{word!r} is not one of {', '.join(self.choices)}{near}")
        return tuple(words)

    def show(self, value: tuple[str, ...]) -> str:
        return json.dumps(list(value), ensure_ascii=False)

    def describe(self) -> str:
        return "list of " + (" | ".join(self.choices) if self.choices else "names")


@dataclasses.dataclass(frozen=True)
class Labels(Kind[dict[str, str]]):
    """Names with values: a TOML table; in a variable ``zone=a,disk=fast``."""

    def parse(self, value: object) -> dict[str, str]:
        pairs = _split_pairs(value) if isinstance(value, str) else value
        if not isinstance(pairs, Mapping) or not all(isinstance(k, str) and k for k in pairs):
            raise ValueError(f'{value!r} is not a table of labels such as {{ zone = "a" }}, or zone=a,disk=fast')
        wrong = [name for name, label in pairs.items() if not isinstance(label, str)]
        if wrong:
            raise ValueError(f'the label {wrong[0]!r} has a value that is not text; write {wrong[0]} = "…"')
        if len(pairs) > MAX_ENTRIES:
            raise ValueError(f"has {len(pairs)} labels; {MAX_ENTRIES} are allowed")
        return dict(pairs)

    def show(self, value: dict[str, str]) -> str:
        pairs = ", ".join(f"{json.dumps(k)} = {json.dumps(v, ensure_ascii=False)}" for k, v in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"

    def describe(self) -> str:
        return "table of labels"


def _split_pairs(text: str) -> dict[str, str] | None:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all("=" in part for part in parts):
        return None
    return {name.strip(): label.strip() for name, _, label in (part.partition("=") for part in parts)}

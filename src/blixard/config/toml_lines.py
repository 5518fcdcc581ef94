"""Where in a TOML file a key stands: tomllib does not say."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping

KeyPath = tuple[str, ...]


def find_lines(text: str) -> dict[KeyPath, int]:
    """Return the line, from 1, where each key path of a valid TOML document first appears.

    Lines are collected until they parse by themselves: that is one statement, whatever strings or arrays it spans.
    """
    found: dict[KeyPath, int] = {}
    header, statement, first = "", "", 0
    for number, line in enumerate(text.split("\n"), 1):
        if not statement and (not line.strip() or line.lstrip().startswith("#")):
            continue
        first = first if statement else number
        statement += line + "\n"
        parsed = _parse(header + statement)
        if parsed is None:
            continue
        for path in _paths(parsed):
            found.setdefault(path, first)
        header = statement if statement.lstrip().startswith("[") else header
        statement = ""
    return found


def _parse(text: str) -> Mapping[str, object] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def _paths(table: Mapping[str, object], above: KeyPath = ()) -> Iterator[KeyPath]:
    for name, value in table.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from _paths(value, (*above, name))

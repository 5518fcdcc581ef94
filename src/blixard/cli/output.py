"""What goes to standard output (results) and to standard error (everything else)."""

from __future__ import annotations

import datetime as dt
import os
import sys
from collections.abc import Sequence
from typing import TextIO

import msgspec

STATE_STYLES = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "in_progress": "cyan",
    "claimed": "cyan",
    "online": "green",
    "dead": "red",
    "ok": "green",
    "missing": "red",
    "damaged": "red",
    "limited": "yellow",
}


GAP = 2
"""Blanks between two columns of a table."""
CUT_WIDTH = 12
FEWEST_COLUMNS = 3


class ReaderGone(Exception):
    """Nobody reads our output any more. Not an ``OSError``: Typer would take it for its own and choose another exit code."""


def write_out(data: bytes) -> None:
    """Write to standard output, at once. Raises ``ReaderGone``."""
    _write(sys.stdout, data)


def write_error(data: bytes) -> None:
    """Write to standard error, at once. Raises ``ReaderGone``."""
    _write(sys.stderr, data)


def _write(stream: TextIO, data: bytes) -> None:
    try:
        stream.flush()
        stream.buffer.write(data)
        stream.flush()
    except BrokenPipeError as error:
        raise ReaderGone from error
    except OSError as error:
        error.filename = "standard output" if stream is sys.stdout else "standard error"
        raise


def print_line(text: str) -> None:
    write_out(f"{text}\n".encode("utf-8", "backslashreplace"))


def note(text: str) -> None:
    """Tell a person something that is no result."""
    write_error(f"{text}\n".encode("utf-8", "backslashreplace"))


def print_json(value: object) -> None:
    """Print one JSON document with every field: readable on a terminal, on one line elsewhere."""
    text = msgspec.json.encode(complete(value))
    write_out((msgspec.json.format(text, indent=2) if sys.stdout.isatty() else text) + b"\n")


def complete(value: object) -> object:
    """Return ``value`` with its structs as dictionaries of all their fields: on the wire those at their defaults are left out."""
    if isinstance(value, msgspec.Struct) and not value.__struct_config__.array_like:
        return fields_of(value)
    if isinstance(value, dict):
        return {key: complete(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [complete(item) for item in value]
    return value


def fields_of(value: msgspec.Struct) -> dict[str, object]:
    """Return all fields of a struct, and its tag, as JSON names them."""
    config = value.__struct_config__
    tag: dict[str, object] = {config.tag_field: config.tag} if config.tag_field else {}
    return tag | {field.encode_name: complete(getattr(value, field.name)) for field in msgspec.structs.fields(value)}


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, state: str | None = None, keep_all: bool = False
) -> None:
    """Print rows as a table on a terminal, elsewhere with tabs between the cells; ``state`` is the coloured column.

    Where a terminal is too narrow, the last columns are left out (``keep_all``: cut instead), and others cut. The first one,
    which is what one copies into the next command, and the state are always whole.
    """
    cells = [[_one_line(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich_table(columns, cells, state, keep_all=keep_all)
        return
    lines = ["\t".join(row) for row in (columns, *cells)]
    write_out("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))


def _one_line(cell: str) -> str:
    return " ".join(cell.splitlines()).replace("\t", " ")


def fit_columns(widths: Sequence[int], whole: set[int], room: int) -> list[int]:
    """Return the widths of the first columns, as many as fit into ``room`` when those that are not ``whole`` are cut."""
    fitted = [width if n in whole else min(width, CUT_WIDTH) for n, width in enumerate(widths)]
    while len(fitted) > FEWEST_COLUMNS and sum(fitted) + GAP * len(fitted) > room:
        fitted.pop()
    for n, width in enumerate(fitted):
        spare = max(0, room - sum(fitted) - GAP * len(fitted))
        fitted[n] = width + min(spare, widths[n] - width)
    return fitted


def _print_rich_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], state: str | None, *, keep_all: bool
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, no_color=bool(os.environ.get("NO_COLOR")) or None)
    widths = [max(len(row[n]) for row in (columns, *rows)) for n in range(len(columns))]
    whole = {0, *(n for n, column in enumerate(columns) if column == state)}
    fitted: Sequence[int | None] = [None] * len(columns) if keep_all else fit_columns(widths, whole, console.width)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for column, width in zip(columns, fitted, strict=False):
        table.add_column(column, no_wrap=True, overflow="ellipsis", width=width)
    for row in rows:
        style = [
            STATE_STYLES.get(cell, "") if column == state else "" for column, cell in zip(columns, row, strict=True)
        ]
        table.add_row(*(Text(row[n], style=style[n]) for n in range(len(fitted))))
    # On a terminal too narrow even for the fewest columns, lines wrap: an id that is cut is of no use.
    console.width = max(console.width, sum(width + GAP for width in fitted if width))
    console.print(table)


def print_version() -> None:
    print_line(f"blixard {version()}")


def version() -> str:
    from importlib.metadata import version as installed

    return installed("blixard")


def show_time(at: dt.datetime | None) -> str:
    """Return a time as this machine's clock would show it."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if at else "-"


def show_duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"

"""What goes to standard output (results) and to standard error (everything else)."""

from __future__ import annotations

import datetime as dt
import os
import sys
from collections.abc import Iterable, Sequence
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
    "limited": "yellow",
}


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


def print_line(text: str) -> None:
    write_out(f"{text}\n".encode("utf-8", "backslashreplace"))


def note(text: str) -> None:
    """Tell a person something that is no result."""
    write_error(f"{text}\n".encode("utf-8", "backslashreplace"))


def print_json(value: object) -> None:
    """Print one JSON document: readable on a terminal, on one line elsewhere."""
    text = msgspec.json.encode(value)
    write_out((msgspec.json.format(text, indent=2) if sys.stdout.isatty() else text) + b"\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, state: str | None = None) -> None:
    """Print rows as a table on a terminal, elsewhere with tabs between the cells; ``state`` is the coloured column."""
    if not sys.stdout.isatty():
        lines = ["\t".join(columns), *("\t".join(_one_line(cell) for cell in row) for row in rows)]
        write_out("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
        return
    _print_rich_table(columns, rows, state)


def _one_line(cell: str) -> str:
    return cell.replace("\t", " ").replace("\r", " ").replace("\n", " ")


def _print_rich_table(columns: Sequence[str], rows: Iterable[Sequence[str]], state: str | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        # The first column is what one copies into the next command: it is never cut.
        table.add_column(column, no_wrap=True, overflow="fold" if number == 0 else "ellipsis")
    for row in rows:
        cells = [Text(_one_line(cell)) for cell in row]
        for column, cell in zip(columns, cells, strict=True):
            if column == state:
                cell.stylize(STATE_STYLES.get(cell.plain, ""))
        table.add_row(*cells)
    Console(highlight=False, no_color=bool(os.environ.get("NO_COLOR")) or None).print(table)


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
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"

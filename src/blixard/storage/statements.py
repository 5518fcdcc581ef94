"""Named SQL: queries live in ``.sql`` files and are asked for by name.

A file holds any number of queries, each like this::

    -- name: find_job
    -- One job by its primary key.
    -- quick
    SELECT id, state FROM jobs WHERE namespace = :namespace AND id = :id;

The purpose is required. ``-- quick`` marks a read that touches a handful of pages (see ``Statement.quick``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources.abc import Traversable

from blixard.errors import InternalError
from blixard.storage.database import Statement

_NAME = re.compile(r"-- name:(?P<name>.*)")
_GOOD_NAME = re.compile(r"[a-z][a-z0-9_]*")
_QUICK = "-- quick"
_TOKEN = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/|;", re.DOTALL)


class Statements:
    """The named statements of one directory, read at the first use and then kept."""

    def __init__(self, directory: Traversable) -> None:
        self._directory = directory
        self._by_name: dict[str, Statement] | None = None

    def __getitem__(self, name: str) -> Statement:
        """Return the statement of that name. Raises ``InternalError`` for an unknown name and for files that break the rules."""
        statement = self._load().get(name)
        if statement is None:
            raise InternalError(f"there is no statement {name!r} in {self._directory}")
        return statement

    def __iter__(self) -> Iterator[Statement]:
        return iter(self._load().values())

    def __len__(self) -> int:
        return len(self._load())

    def _load(self) -> dict[str, Statement]:
        if self._by_name is None:
            self._by_name = _read_directory(self._directory)
        return self._by_name


def load_statements(package_dir: Traversable) -> Statements:
    """Return the named statements of all ``*.sql`` files in ``package_dir``, such as ``importlib.resources.files(...) / "sql"``.

    Nothing is read before the first statement is asked for.
    """
    return Statements(package_dir)


def _read_directory(directory: Traversable) -> dict[str, Statement]:
    found: dict[str, Statement] = {}
    for file in sorted(directory.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".sql"):
            for statement in parse_statements(file.read_text(encoding="utf-8"), source=file.name):
                if statement.name in found:
                    raise InternalError(f"{file.name}: the statement {statement.name!r} is defined twice")
                found[statement.name] = statement
    return found


def parse_statements(text: str, *, source: str) -> list[Statement]:
    """Return the statements of one file in order. Raises ``InternalError`` naming ``source`` and what breaks the rules."""
    blocks: list[tuple[str, list[str]]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = _NAME.fullmatch(line.rstrip())
        if match:
            blocks.append((match["name"].strip(), []))
        elif blocks:
            blocks[-1][1].append(line)
        elif line.strip() and not line.startswith("--"):
            raise InternalError(f"{source}:{number}: text before the first '-- name:' line")
    return [_parse_block(name, lines, source) for name, lines in blocks]


def _parse_block(name: str, lines: list[str], source: str) -> Statement:
    if not _GOOD_NAME.fullmatch(name):
        raise InternalError(f"{source}: {name!r} is not a name for a statement; use lower case letters, digits and _")
    comments = _leading_comments(lines)
    quick = _QUICK in comments
    if not any(comment not in (_QUICK, "--") for comment in comments):
        raise InternalError(f"{source}: {name}: a line of purpose ('-- ...') must follow the name")
    sql = _one_statement("\n".join(lines[len(comments) :]))
    if not sql:
        raise InternalError(f"{source}: {name}: exactly one statement must follow the comment")
    return Statement(name=name, sql=sql, quick=quick)


def _leading_comments(lines: list[str]) -> list[str]:
    comments = []
    for line in lines:
        if not line.startswith("--"):
            break
        comments.append(line.rstrip())
    return comments


def _one_statement(text: str) -> str:
    """Return the text without its closing semicolon, or nothing when it is empty or has more than one statement."""
    for token in _TOKEN.finditer(text):
        if token[0] == ";":
            rest = _TOKEN.sub(lambda found: found[0] if found[0][0] in "'\";" else "", text[token.end() :])
            return "" if rest.strip() else text[: token.start()].strip()
    return text.strip()

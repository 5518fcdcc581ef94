"""Brings a SQLite file to the newest schema: numbered files, each applied once, in order, in a transaction of its own.

A file is ``NNNN_name.sql``; its first line is ``-- phase: before`` (safe while the previous release still runs) or
``-- phase: after`` (only once every process runs the new one).
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable

import apsw
import msgspec

from blixard.errors import InternalError, StoreUnavailable

_FILE = re.compile(r"(?P<number>\d{4})_(?P<name>[a-z0-9_]+)\.sql")
_PHASE = re.compile(r"-- phase: (?P<phase>before|after)")
MIGRATIONS_TABLE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    number INTEGER NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    applied_at INTEGER NOT NULL
) STRICT
"""


class Phase(enum.StrEnum):
    BEFORE = "before"
    """May be applied while the previous release still runs."""
    AFTER = "after"
    """Only once no process of the previous release runs."""


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the schema. ``digest``: SHA-256 of the file, so that a later edit of an applied step is noticed."""

    number: int
    name: str
    phase: Phase
    sql: str
    digest: str


def load_migrations(directory: Traversable) -> tuple[Migration, ...]:
    """Return the migrations of a directory in order. Raises ``InternalError`` for a bad name, a gap or a missing phase."""
    files = sorted((file for file in directory.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)
    migrations = tuple(_read_migration(file) for file in files)
    for expected, migration in enumerate(migrations, start=1):
        if migration.number != expected:
            raise InternalError(
                f"migration {migration.number:04} ({migration.name}) stands where {expected:04} is expected"
            )
    return migrations


def _read_migration(file: Traversable) -> Migration:
    name = _FILE.fullmatch(file.name)
    if not name:
        raise InternalError(f"{file.name} is not a migration's name; it must be like 0001_jobs.sql")
    text = file.read_text(encoding="utf-8")
    phase = _PHASE.fullmatch(text.partition("\n")[0].rstrip())
    if not phase:
        raise InternalError(f"{file.name}: the first line must be '-- phase: before' or '-- phase: after'")
    return Migration(
        number=int(name["number"]),
        name=name["name"],
        phase=Phase(phase["phase"]),
        sql=text,
        digest=hashlib.sha256(text.encode()).hexdigest(),
    )


def migrate(connection: apsw.Connection, migrations: Sequence[Migration], *, applied_at: int) -> int:
    """Apply what is missing and return how many were applied. ``applied_at``: microseconds since 1970, kept for the reader.

    Two processes may do this at once: each step looks again under the write lock. A crash leaves whole steps only.
    Raises ``StoreUnavailable`` for a schema newer than this code, ``InternalError`` for an applied file that was changed.
    """
    if _pending(connection, migrations) == ():
        return 0
    applied = 0
    while _apply_next(connection, migrations, applied_at):
        applied += 1
    return applied


def _apply_next(connection: apsw.Connection, migrations: Sequence[Migration], applied_at: int) -> bool:
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(MIGRATIONS_TABLE)
        pending = _pending(connection, migrations)
        if pending:
            _apply(connection, pending[0], applied_at)
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return bool(pending)


def _apply(connection: apsw.Connection, migration: Migration, applied_at: int) -> None:
    try:
        connection.execute(migration.sql)
    except apsw.SQLError as error:
        raise InternalError(f"migration {migration.number:04}_{migration.name} is wrong: {error}") from error
    connection.execute(
        "INSERT INTO schema_migrations (number, name, digest, applied_at) VALUES (?, ?, ?, ?)",
        (migration.number, migration.name, migration.digest, applied_at),
    )


def _pending(connection: apsw.Connection, migrations: Sequence[Migration]) -> tuple[Migration, ...]:
    return find_pending(_applied(connection), migrations)


def find_pending(done: Mapping[int, str], migrations: Sequence[Migration]) -> tuple[Migration, ...]:
    """Return what is not applied yet, after checking that what is applied (number to digest) is what this code knows.

    Raises ``StoreUnavailable`` for a schema newer than this code, ``InternalError`` for an applied file that was changed.
    """
    newest = max(done, default=0)
    if newest > len(migrations):
        raise StoreUnavailable(
            f"this data directory was written by a newer Blixard (schema {newest}, this one knows {len(migrations)})",
            hint="upgrade Blixard, or use another data directory",
        )
    for migration in migrations:
        digest = done.get(migration.number)
        if digest is not None and digest != migration.digest:
            raise InternalError(
                f"migration {migration.number:04}_{migration.name} was changed after it had been applied"
            )
    return tuple(migration for migration in migrations if migration.number not in done)


def _applied(connection: apsw.Connection) -> dict[int, str]:
    exists = connection.execute(
        "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'schema_migrations'"
    ).fetchall()
    if not exists:
        return {}
    rows = connection.execute("SELECT number, digest FROM schema_migrations").fetchall()
    return {int(str(number)): str(digest) for number, digest in rows}

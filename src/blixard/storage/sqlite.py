"""``Database`` on one SQLite file, for one machine. See ``DESIGN.md`` beside this file."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

import apsw

from blixard.errors import InternalError, StoreUnavailable
from blixard.storage.database import Params, Row, Statement
from blixard.storage.filesystem import check_local, make_private_directory
from blixard.storage.migrator import load_migrations, migrate
from blixard.storage.reader import ReaderPool
from blixard.storage.sqlite_errors import translate_error
from blixard.storage.turnstile import Turnstile
from blixard.storage.watch import Watch
from blixard.storage.writer import GroupCommitWriter

MEMORY = ":memory:"
READERS = 2
BUSY_SECONDS = 15.0
"""How long a write waits for the write lock of another process."""
WRITER_CACHE_KIB = 32 * 1024
READER_CACHE_KIB = 8 * 1024
CHECKPOINT_PAGES = 4_000
"""The WAL is copied into the database about every 16 MiB, and kept at most this long by ``journal_size_limit``."""
MAX_WAL_BYTES = 64 * 1024 * 1024
STATEMENT_CACHE = 256
FORBIDDEN_FUNCTIONS = (
    "random",
    "randomblob",
    "date",
    "time",
    "datetime",
    "julianday",
    "unixepoch",
    "strftime",
    "timediff",
    "current_date",
    "current_time",
    "current_timestamp",
)
"""Not deterministic: a replica that applied the same statement would get another row."""


class SqliteDatabase:
    """A SQLite file in WAL mode, or with ``:memory:`` a private one that ends with this object.

    Acknowledged means on disk (``synchronous`` FULL; NORMAL exists for the test that proves the need). ``vfs`` names an
    apsw VFS. The file and the directory made for it can be read by their owner only. Bound to the event loop of ``open``.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        migrations: Traversable | None = None,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
        vfs: str | None = None,
        checkpoint_pages: int = CHECKPOINT_PAGES,
    ) -> None:
        self._path = str(path)
        self._migrations = files("blixard.storage") / "migrations" if migrations is None else migrations
        self._synchronous = synchronous
        self._vfs = vfs
        self._checkpoint_pages = checkpoint_pages
        self._gate = asyncio.Lock()
        self._connections: list[apsw.Connection] = []
        self._turnstile: Turnstile | None = None
        self._writer: GroupCommitWriter | None = None
        self._readers: ReaderPool | None = None
        self._inline: apsw.Connection | None = None
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()

    async def open(self) -> None:
        """Open the file, creating and migrating it as needed. Calling it twice is harmless; a closed one can be opened again.

        Raises ``StoreUnavailable`` for a directory or file that cannot be used, a network file system, a file that is not a
        database or damaged, and a schema newer than this code.
        """
        async with self._gate:
            if self._writer is None:
                self._start(await self._open_on_thread())

    async def close(self) -> None:
        """Finish the writes that were accepted, checkpoint, close. Allowed before ``open``, during it, and twice."""
        async with self._gate:
            writer, readers, self._writer, self._readers, self._inline = self._writer, self._readers, None, None, None
            for watch in self._watches:
                watch.end()
            if writer is not None:
                await writer.stop()
            if readers is not None:
                await readers.stop()
            await asyncio.to_thread(self._close_blocking)

    async def read(self, statement: Statement, params: Params | None = None) -> list[Row]:
        """Return all rows, seeing every acknowledged write. A ``quick`` statement runs on the calling thread."""
        writer = self._writer
        if writer is None:
            raise self._not_open()
        if self._readers is None:
            return await writer.write(statement, params or {})
        if statement.quick and self._inline is not None:
            try:
                return self._inline.execute(statement.sql, params or {}).fetchall()
            except apsw.BusyError:
                pass  # the WAL is being recovered or reset: wait for that on a thread, not on the loop
            except Exception as error:
                raise translate_error(error, path=self._path, statement=statement.name) from error
        return await self._readers.read(statement, params or {})

    async def write(self, statement: Statement, params: Params | None = None) -> list[Row]:
        """Execute one statement atomically; return its rows once they are on disk. A cancelled call may still be carried out."""
        writer = self._writer
        if writer is None:
            raise self._not_open()
        return await writer.write(statement, params or {})

    async def transaction(self, statements: Sequence[tuple[Statement, Params]]) -> list[int]:
        """Execute all or nothing; return how many rows each statement changed itself (not by triggers)."""
        writer = self._writer
        if writer is None:
            raise self._not_open()
        return await writer.transaction(statements)

    def watch(self) -> Watch:
        """Return an iterator that yields soon after each change from now on. Ends with ``StoreUnavailable`` at ``close``."""
        if self._writer is None:
            raise self._not_open()
        watch = Watch(self._forget)
        self._watches.add(watch)
        self._writer.watch(True)
        return watch

    def _forget(self, watch: Watch) -> None:
        self._watches.discard(watch)
        if self._writer is not None and not self._watches:
            self._writer.watch(False)

    def _ring(self) -> None:
        for watch in self._watches:
            watch.ring()
        if self._writer is not None and not self._watches:  # dropped without aclose
            self._writer.watch(False)

    def _not_open(self) -> StoreUnavailable:
        return StoreUnavailable(f"the database {self._path} is not open")

    def _start(self, writing: apsw.Connection) -> None:
        loop = asyncio.get_running_loop()
        writer = GroupCommitWriter(writing, path=self._path, loop=loop, turnstile=self._turnstile, changed=self._ring)
        if self._path != MEMORY:
            *pooled, self._inline = self._connections[1:]
            self._readers = ReaderPool(pooled, path=self._path, loop=loop)
            self._readers.start()
        writer.start()
        self._writer = writer

    async def _open_on_thread(self) -> apsw.Connection:
        """Open on a thread; a cancelled caller waits for it all the same, so that nothing stays open behind its back."""
        opening = asyncio.ensure_future(asyncio.to_thread(self._open_blocking))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait([opening])
            self._close_blocking()
            raise

    def _open_blocking(self) -> apsw.Connection:
        try:
            return self._open_all()
        except BaseException as error:
            self._close_blocking()
            if isinstance(error, Exception):
                raise translate_error(error, path=self._path, statement="open") from error
            raise

    def _open_all(self) -> apsw.Connection:
        migrations = load_migrations(self._migrations)
        if self._path != MEMORY:
            path = Path(self._path)
            _prepare_file(path)
            self._turnstile = Turnstile(path.with_name(path.name + "-turn"), patience=BUSY_SECONDS)
        writing = self._connect(cache_kib=WRITER_CACHE_KIB, busy_seconds=BUSY_SECONDS)
        _configure_writer(writing, self._synchronous, self._checkpoint_pages)
        migrate(writing, migrations, applied_at=time.time_ns() // 1_000)
        if self._path != MEMORY:
            for busy_seconds in (BUSY_SECONDS,) * READERS + (0.0,):
                reading = self._connect(cache_kib=READER_CACHE_KIB, busy_seconds=busy_seconds)
                reading.execute("PRAGMA query_only = ON")
        return writing

    def _connect(self, *, cache_kib: int, busy_seconds: float) -> apsw.Connection:
        connection = apsw.Connection(self._path, vfs=self._vfs, statementcachesize=STATEMENT_CACHE)
        self._connections.append(connection)
        connection.set_busy_timeout(int(busy_seconds * 1000))
        configure_connection(connection)
        connection.execute(f"PRAGMA cache_size = -{cache_kib}; PRAGMA mmap_size = 0; PRAGMA temp_store = MEMORY")
        return connection

    def _close_blocking(self) -> None:
        """Close all connections; the last one to leave the file copies the WAL into it and removes it."""
        connections, self._connections = self._connections, []
        for connection in reversed(connections):
            connection.close(True)
        if self._turnstile is not None:
            self._turnstile.close()
            self._turnstile = None


def _prepare_file(path: Path) -> None:
    make_private_directory(path.parent)
    check_local(path)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreUnavailable(
            f"the database {path} cannot be opened for writing: {error.strerror}",
            hint="make it a file that this user can write, or use another data directory",
        ) from error


def configure_connection(connection: apsw.Connection) -> None:
    """Set what every connection has in common: strict SQL, foreign keys, and nothing that could differ between two runs."""
    for option, value in (
        (apsw.SQLITE_DBCONFIG_DQS_DML, 0),
        (apsw.SQLITE_DBCONFIG_DQS_DDL, 0),
        (apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0),
        (apsw.SQLITE_DBCONFIG_ENABLE_FKEY, 1),
        (apsw.SQLITE_DBCONFIG_DEFENSIVE, 1),
        # One plan whatever the parameters. Else SQLite compiles a statement that goes by a partial index anew for each new value: 250 µs each time.
        (apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1),
    ):
        connection.config(option, value)
    _forbid_functions(connection)


def _configure_writer(connection: apsw.Connection, synchronous: str, checkpoint_pages: int) -> None:
    _switch_to_wal(connection)
    connection.execute(
        f"PRAGMA synchronous = {synchronous}; PRAGMA wal_autocheckpoint = {checkpoint_pages}; "
        f"PRAGMA journal_size_limit = {MAX_WAL_BYTES}"
    )


def _switch_to_wal(connection: apsw.Connection) -> None:
    """Set WAL mode. Of two processes that create a file at once, one is told "locked" at once, without any waiting."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
        except apsw.BusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)
        else:
            return


def _forbid_functions(connection: apsw.Connection) -> None:
    for name in FORBIDDEN_FUNCTIONS:
        connection.create_scalar_function(name, _Forbidden(name))


class _Forbidden:
    """Stands in for a function that is not deterministic."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: object) -> None:
        raise InternalError(f"the SQL function {self._name}() is forbidden: pass its value as a parameter")

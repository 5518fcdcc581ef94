"""The implementations that must pass the suites of this folder. A further one is a further parameter, no further test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from blixard.storage.blobs import BlobStore, LocalBlobStore, ObjectBlobStore
from blixard.storage.database import Database, Statement
from blixard.storage.hiqlite.database import HiqliteDatabase
from blixard.storage.logs import LocalLogStore, LogStore
from blixard.storage.sqlite import MEMORY, SqliteDatabase
from tests.cluster.addresses import make_single

SCHEMA = """-- phase: before
CREATE TABLE items (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL DEFAULT 0 CHECK (size >= 0)
) STRICT;
CREATE TABLE history (item INTEGER NOT NULL REFERENCES items (id), size INTEGER NOT NULL CHECK (size < 1000)) STRICT;
CREATE TRIGGER items_changed AFTER UPDATE ON items BEGIN
    INSERT INTO history (item, size) VALUES (new.id, new.size);
END;
"""

ADD = Statement("add", "INSERT INTO items (name, size) VALUES (:name, :size) RETURNING id, name")
ADD_MANY = Statement(
    "add_many", "INSERT INTO items (name, size) SELECT value ->> 0, value ->> 1 FROM json_each(:items) RETURNING name"
)
GROW = Statement("grow", "UPDATE items SET size = size + :by WHERE name = :name RETURNING size")
GROW_ALL = Statement("grow_all", "UPDATE items SET size = size + :by")
SIZE = Statement("size", "SELECT size FROM items WHERE name = :name")
QUICK_SIZE = Statement("quick_size", "SELECT size FROM items WHERE name = :name", quick=True)
COUNT = Statement("count", "SELECT count(*) FROM items")
HISTORY = Statement("history", "SELECT count(*) FROM history")


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    directory = tmp_path / "migrations"
    directory.mkdir()
    (directory / "0001_items.sql").write_text(SCHEMA)
    return directory


@pytest.fixture(params=["memory", "file", "cluster"])
async def database(request: pytest.FixtureRequest, tmp_path: Path, migrations: Path) -> AsyncIterator[Database]:
    made: Database
    if request.param == "cluster":
        made = HiqliteDatabase(make_single(tmp_path / "node"), migrations=migrations)
    else:
        path = MEMORY if request.param == "memory" else tmp_path / "data" / "blixard.db"
        made = SqliteDatabase(path, migrations=migrations)
    await made.open()
    yield made
    await made.close()


BlobStoreMaker = Callable[[int], BlobStore]
Damage = Callable[[BlobStore, str], None]


@pytest.fixture(params=["local", "object"])
def make_blob_store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStoreMaker:
    """Return what makes a store with a limit in bytes. Each call returns one on the same content."""
    memory = MemoryStore()

    def make(max_bytes: int) -> BlobStore:
        if request.param == "local":
            return LocalBlobStore(tmp_path / "blobs", max_bytes=max_bytes)
        return ObjectBlobStore(memory, max_bytes=max_bytes)

    return make


@pytest.fixture
async def logs(tmp_path: Path) -> AsyncIterator[LogStore]:
    made = LocalLogStore(tmp_path / "logs", max_output_bytes=1_000_000)
    yield made
    await made.close()

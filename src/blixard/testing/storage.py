"""Storage that needs no disk: the real SQLite in memory, and the real object store code on memory."""

from __future__ import annotations

from obstore.store import MemoryStore

from blixard.storage.blobs import ObjectBlobStore
from blixard.storage.sqlite import MEMORY, SqliteDatabase


def memory_database() -> SqliteDatabase:
    """Return a closed database that lives in memory: the product's own code, schema and SQL, without a file."""
    return SqliteDatabase(MEMORY)


def memory_blob_store() -> ObjectBlobStore:
    return ObjectBlobStore(MemoryStore())

"""Large values under the SHA-256 of their content: inputs, bundles, modules, results."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Protocol, Self

import msgspec
import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import ObjectStore, from_url

from blixard.domain.limits import MAX_BLOB_BYTES, MIB
from blixard.errors import BlobNotFound, ConfigError, InvalidRequest, LimitExceeded, StoreFull, StoreUnavailable
from blixard.storage.filesystem import make_private_directory, sync_directory

CHUNK_BYTES = 1 * MIB
_DIGEST = re.compile(r"[0-9a-f]{64}")
_QUARANTINE = "quarantine"
_TEMPORARY = "tmp"

BlobSource = bytes | Path | AsyncIterator[bytes]


class BlobInfo(msgspec.Struct, frozen=True, kw_only=True):
    """``size`` in bytes; ``stored_at``: microseconds since 1970, also renewed when the same content is put again."""

    digest: str
    size: int
    stored_at: int


class BlobStore(Protocol):
    """Content under its digest (SHA-256, 64 hex digits). A blob is there as a whole or not at all.

    All methods raise ``StoreUnavailable`` (``StoreFull``), ``InvalidRequest`` for what is not a digest, and those that need
    the blob ``BlobNotFound``.
    """

    async def put(self, source: BlobSource) -> str:
        """Store the content durably and return its digest. Content that is there already costs no second copy.

        Raises ``LimitExceeded`` above ``MAX_BLOB_BYTES``. After a crash or a cancel nothing half-written is visible.
        """

    async def get(self, digest: str) -> bytes:
        """Return the content after checking it. Content that does not fit the digest is set aside: ``StoreUnavailable``."""

    async def open_path(self, digest: str) -> Path | None:
        """Return the local read-only file of the blob, unchecked, or None when the store has no local files."""

    async def stat(self, digest: str) -> BlobInfo: ...

    async def delete(self, digest: str) -> None:
        """Remove the blob; one that is not there is no error."""

    def list_digests(self) -> AsyncIterator[str]:
        """Yield the digests of all blobs, in no particular order."""

    async def remove_leftovers(self, older_than: float) -> int:
        """Remove what interrupted calls left behind more than ``older_than`` seconds ago; return how much."""


def open_blob_store(location: Path | str) -> BlobStore:
    """Return the store at a local directory, or at a URL such as ``s3://bucket/prefix``. Raises ``ConfigError``.

    Credentials for a URL come from the environment, as obstore reads them (``AWS_ACCESS_KEY_ID`` and so on).
    """
    if isinstance(location, Path) or "://" not in location:
        return LocalBlobStore(Path(location))
    try:
        return ObjectBlobStore(from_url(location))
    except (BaseError, ValueError) as error:
        raise ConfigError(
            f"{location!r} cannot be used for blobs: {error}", hint="give a directory, or a URL like s3://bucket/prefix"
        ) from error


def check_digest(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise InvalidRequest(f"{digest!r} is not a digest; a SHA-256 has 64 hex digits in lower case", field="digest")
    return digest


class LocalBlobStore:
    """Blobs as read-only files ``<two digits>/<digest>`` in a directory.

    Written here and not by obstore, whose local store renames into place without any fsync: acknowledged would not mean
    on disk.
    """

    def __init__(self, directory: Path, *, max_bytes: int = MAX_BLOB_BYTES) -> None:
        self._directory = directory
        self._max_bytes = max_bytes

    async def put(self, source: BlobSource) -> str:
        if isinstance(source, bytes):
            return await asyncio.to_thread(self._put_chunks, iter([source]))
        if isinstance(source, Path):
            return await asyncio.to_thread(self._put_file, source)
        return await self._put_stream(source)

    async def get(self, digest: str) -> bytes:
        return await asyncio.to_thread(self._get, check_digest(digest))

    async def open_path(self, digest: str) -> Path | None:
        return self._find(digest)

    async def stat(self, digest: str) -> BlobInfo:
        found = self._find(digest).stat()
        return BlobInfo(digest=digest, size=found.st_size, stored_at=found.st_mtime_ns // 1_000)

    async def delete(self, digest: str) -> None:
        with _explained(self._directory):
            self._path(digest).unlink(missing_ok=True)

    async def list_digests(self) -> AsyncIterator[str]:
        for shard in await asyncio.to_thread(self._shards):
            for digest in await asyncio.to_thread(_names, shard):
                yield digest

    async def remove_leftovers(self, older_than: float) -> int:
        return await asyncio.to_thread(_remove_old, self._directory / _TEMPORARY, time.time() - older_than)

    def _path(self, digest: str) -> Path:
        return self._directory / check_digest(digest)[:2] / digest

    def _find(self, digest: str) -> Path:
        path = self._path(digest)
        if not path.is_file():
            raise BlobNotFound(digest)
        return path

    def _shards(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        return [entry for entry in self._directory.iterdir() if len(entry.name) == 2 and entry.is_dir()]

    def _put_file(self, source: Path) -> str:
        with _open_source(source) as file:
            return self._put_chunks(iter(lambda: file.read(CHUNK_BYTES), b""))

    def _put_chunks(self, chunks: Iterator[bytes]) -> str:
        with _explained(self._directory), _Draft(self._directory, self._max_bytes) as draft:
            for chunk in chunks:
                draft.add(chunk)
            return draft.publish(self._path)

    async def _put_stream(self, source: AsyncIterator[bytes]) -> str:
        # What the source raises is the source's: only our own steps are explained.
        with _explained(self._directory):
            draft = _Draft(self._directory, self._max_bytes)
        with draft:
            async for chunk in source:
                with _explained(self._directory):
                    await asyncio.to_thread(draft.add, chunk)
            with _explained(self._directory):
                return await asyncio.to_thread(draft.publish, self._path)

    def _get(self, digest: str) -> bytes:
        with _explained(self._directory):
            try:
                content = self._path(digest).read_bytes()
            except FileNotFoundError:
                raise BlobNotFound(digest) from None
            if hashlib.sha256(content).hexdigest() != digest:
                make_private_directory(self._directory / _QUARANTINE)
                self._path(digest).replace(self._directory / _QUARANTINE / digest)
                raise _damaged(digest)
        return content


class _Draft:
    """A temporary file that becomes a blob, or disappears."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        temporary = directory / _TEMPORARY
        make_private_directory(temporary)
        self._directory = directory
        self._max_bytes = max_bytes
        self._size = 0
        self._hash = hashlib.sha256()
        descriptor, name = tempfile.mkstemp(dir=temporary)
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._path = Path(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, chunk: bytes) -> None:
        self._size += len(chunk)
        _check_size(self._size, self._max_bytes)
        self._hash.update(chunk)
        rest = memoryview(chunk)
        while rest:
            rest = rest[self._file.write(rest) :]

    def publish(self, locate: _Locate) -> str:
        digest = self._hash.hexdigest()
        target = locate(digest)
        if not _renew(target, self._size):
            os.fchmod(self._file.fileno(), 0o444)
            os.fsync(self._file.fileno())
            if not target.parent.is_dir():
                make_private_directory(target.parent)
                sync_directory(self._directory)
            self._path.replace(target)
        # Also when it was there: whoever put it may not have come this far yet.
        sync_directory(target.parent)
        return digest


class _Locate(Protocol):
    def __call__(self, digest: str) -> Path: ...


class ObjectBlobStore:
    """Blobs in an object store (S3, GCS, Azure, memory) through obstore. A put is atomic and durable by the service's promise."""

    def __init__(self, store: ObjectStore, *, max_bytes: int = MAX_BLOB_BYTES) -> None:
        self._store = store
        self._max_bytes = max_bytes

    async def put(self, source: BlobSource) -> str:
        if isinstance(source, bytes):
            _check_size(len(source), self._max_bytes)
            return await self._put(hashlib.sha256(source).hexdigest(), source)
        if isinstance(source, Path):
            return await self._put(await asyncio.to_thread(self._digest_file, source), source)
        with tempfile.NamedTemporaryFile() as spool:  # the key is the digest, known only at the end
            size = 0
            async for chunk in source:
                size += len(chunk)
                _check_size(size, self._max_bytes)
                await asyncio.to_thread(spool.write, chunk)
            spool.flush()
            return await self.put(Path(spool.name))

    async def get(self, digest: str) -> bytes:
        with _object_errors(digest):
            answer = await obstore.get_async(self._store, _key(digest))
            content = bytes(await answer.bytes_async())
            if hashlib.sha256(content).hexdigest() != digest:
                await obstore.rename_async(self._store, _key(digest), f"{_QUARANTINE}/{digest}")
                raise _damaged(digest)
        return content

    async def open_path(self, digest: str) -> Path | None:
        await self.stat(digest)
        return None

    async def stat(self, digest: str) -> BlobInfo:
        with _object_errors(digest):
            found = await obstore.head_async(self._store, _key(digest))
        return BlobInfo(
            digest=digest, size=found["size"], stored_at=int(found["last_modified"].timestamp() * 1_000_000)
        )

    async def delete(self, digest: str) -> None:
        with contextlib.suppress(BlobNotFound), _object_errors(digest):
            await obstore.delete_async(self._store, _key(digest))

    async def list_digests(self) -> AsyncIterator[str]:
        async for entries in obstore.list(self._store):
            for entry in entries:
                shard, _, name = entry["path"].rpartition("/")
                if _DIGEST.fullmatch(name) and shard == name[:2]:
                    yield name

    async def remove_leftovers(self, older_than: float) -> int:
        """Return 0: an object is there as a whole or not at all, and unfinished uploads are the bucket's life cycle rule's."""
        del older_than
        return 0

    def _digest_file(self, source: Path) -> str:
        with _open_source(source) as file:
            _check_size(os.fstat(file.fileno()).st_size, self._max_bytes)
            return hashlib.file_digest(file, "sha256").hexdigest()

    async def _put(self, digest: str, source: bytes | Path) -> str:
        with _object_errors(digest):
            await obstore.put_async(self._store, _key(digest), source)
        return digest


def _key(digest: str) -> str:
    return f"{check_digest(digest)[:2]}/{digest}"


def _damaged(digest: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"the content of blob {digest} does not fit its digest; it was moved to {_QUARANTINE}/",
        hint="upload it again, and check the disk",
    )


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise LimitExceeded(f"a blob may have {limit} bytes (MAX_BLOB_BYTES); this one has more", field="blob")


def _renew(path: Path, size: int) -> bool:
    """Give an existing blob a new time, so that a collector spares it. False if it is not there, or not whole."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _open_source(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidRequest(f"the file {path} cannot be read: {error.strerror}", field="blob") from error


def _names(shard: Path) -> list[str]:
    return [entry.name for entry in shard.iterdir() if _DIGEST.fullmatch(entry.name)]


def _remove_old(directory: Path, before: float) -> int:
    removed = 0
    if directory.is_dir():
        for entry in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # its owner may finish meanwhile
                if entry.stat().st_mtime < before:
                    entry.unlink()
                    removed += 1
    return removed


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"the disk is full: {directory} could not be written", hint="free some space") from error
        raise StoreUnavailable(
            f"the blobs in {directory} cannot be used: {error}", hint="check the disk and the permissions"
        ) from error


@contextlib.contextmanager
def _object_errors(digest: str) -> Iterator[None]:
    try:
        yield
    except (NotFoundError, FileNotFoundError):
        raise BlobNotFound(digest) from None
    except BaseError as error:
        raise StoreUnavailable(f"the blob store did not answer for {digest}: {error}") from error

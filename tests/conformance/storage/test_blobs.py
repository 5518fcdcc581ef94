"""What every ``BlobStore`` promises."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blixard.errors import BlobNotFound, InvalidRequest, LimitExceeded
from blixard.storage.blobs import BlobSource, BlobStore
from tests.conformance.storage.conftest import BlobStoreMaker

LIMIT = 3_000_000
ABSENT = "0" * 64


@pytest.fixture
def blobs(make_blob_store: BlobStoreMaker) -> BlobStore:
    return make_blob_store(LIMIT)


async def pieces(content: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def digests(blobs: BlobStore) -> set[str]:
    return {digest async for digest in blobs.list_digests()}


@pytest.mark.parametrize("size", [0, 1, 65_536, LIMIT])
async def test_all_three_ways_to_put_give_the_same_blob(blobs: BlobStore, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    file = tmp_path / "source"
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    assert await blobs.put(content) == digest
    assert await blobs.put(file) == digest
    assert await blobs.put(pieces(content, 10_000)) == digest
    assert await blobs.get(digest) == content
    assert (await blobs.stat(digest)).size == size
    assert await digests(blobs) == {digest}


@pytest.mark.parametrize("way", ["bytes", "path", "stream"])
async def test_a_blob_over_the_limit_is_refused_and_leaves_nothing(blobs: BlobStore, tmp_path: Path, way: str) -> None:
    content = bytes(LIMIT + 1)
    file = tmp_path / "source"
    file.write_bytes(content)
    sources: dict[str, BlobSource] = {"bytes": content, "path": file, "stream": pieces(content, 100_000)}
    with pytest.raises(LimitExceeded, match="MAX_BLOB_BYTES"):
        await blobs.put(sources[way])
    assert await digests(blobs) == set()
    assert await blobs.remove_leftovers(older_than=-10) == 0


async def test_what_is_not_there_says_so(blobs: BlobStore) -> None:
    for call in (blobs.get(ABSENT), blobs.stat(ABSENT), blobs.open_path(ABSENT)):
        with pytest.raises(BlobNotFound, match=ABSENT):
            await call
    await blobs.delete(ABSENT)


@pytest.mark.parametrize("digest", ["", "abc", "../../etc/passwd", "A" * 64, "g" * 64, "0" * 65])
async def test_what_is_not_a_digest_is_refused(blobs: BlobStore, digest: str) -> None:
    for call in (blobs.get(digest), blobs.stat(digest), blobs.open_path(digest), blobs.delete(digest)):
        with pytest.raises(InvalidRequest, match="not a digest"):
            await call


async def test_a_file_that_cannot_be_read_is_the_callers_mistake(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="absent"):
        await blobs.put(tmp_path / "absent")


async def test_a_deleted_blob_is_gone_and_can_come_back(blobs: BlobStore) -> None:
    digest = await blobs.put(b"content")
    await blobs.delete(digest)
    assert await digests(blobs) == set()
    with pytest.raises(BlobNotFound):
        await blobs.get(digest)
    assert await blobs.put(b"content") == digest
    assert await blobs.get(digest) == b"content"


async def test_putting_the_same_content_at_once_is_harmless(blobs: BlobStore) -> None:
    content = os.urandom(200_000)
    answers = await asyncio.gather(*(blobs.put(content) for _ in range(20)))
    assert set(answers) == await digests(blobs)
    assert len(set(answers)) == 1
    assert await blobs.get(answers[0]) == content


async def test_an_interrupted_put_shows_nothing(blobs: BlobStore) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await blobs.put(broken())
    assert await digests(blobs) == set()


async def test_a_second_store_on_the_same_place_sees_the_same(make_blob_store: BlobStoreMaker) -> None:
    digest = await make_blob_store(LIMIT).put(b"shared")
    assert await make_blob_store(LIMIT).get(digest) == b"shared"

"""What is particular to blobs and logs as local files: damage, torn tails, sharing, limits on open files."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blixard.domain.log import LogRecord
from blixard.errors import BlobNotFound, ConfigError, StoreUnavailable
from blixard.storage.blobs import LocalBlobStore, ObjectBlobStore, open_blob_store
from blixard.storage.logs import MAX_OPEN_LOGS, MAX_RECORD_BYTES, LocalLogStore, LogAppend

PATIENCE = 60.0


def log_file(directory: Path) -> Path:
    (found,) = directory.rglob("*.log")
    return found


def append(data: bytes, *, ended: bool = False, job: str = "job", offset: int | None = None) -> LogAppend:
    records = [LogRecord(1, "stdout", data)] if data else []
    return LogAppend(namespace="default", job_id=job, attempt=1, records=records, ended=ended, offset=offset)


async def text(logs: LocalLogStore, job: str = "job") -> tuple[bytes, bool]:
    page = await logs.read("default", job, 1, 0, 100_000_000)
    return b"".join(entry.data for entry in page.entries), page.ended


async def test_a_damaged_blob_is_set_aside_and_can_be_uploaded_again(tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path)
    digest = await blobs.put(b"content")
    path = await blobs.open_path(digest)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(b"CONTENT")
    with pytest.raises(StoreUnavailable, match=f"{digest} does not fit"):
        await blobs.get(digest)
    assert (tmp_path / "quarantine" / digest).read_bytes() == b"CONTENT"
    with pytest.raises(BlobNotFound):
        await blobs.get(digest)
    await blobs.put(b"content")
    assert await blobs.get(digest) == b"content"


async def test_a_blob_cut_short_is_replaced_by_the_next_put(tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path)
    digest = await blobs.put(b"content")
    path = await blobs.open_path(digest)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(b"con")
    await blobs.put(b"content")
    assert await blobs.get(digest) == b"content"


async def test_blobs_are_read_only_files_in_a_private_directory(tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path / "blobs")
    path = await blobs.open_path(await blobs.put(b"content"))
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert stat.S_IMODE((tmp_path / "blobs").stat().st_mode) == 0o700
    assert path.parent.name == path.name[:2]


async def test_a_blob_and_its_name_are_synced_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    digest = await LocalBlobStore(tmp_path).put(b"content")
    assert Path(synced[0]).parent == tmp_path / "tmp"
    assert synced[1:] == [str(tmp_path), str(tmp_path / digest[:2])]


async def test_leftovers_of_a_crash_are_removed_when_they_are_old(tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path)
    digest = await blobs.put(b"content")
    leftover = tmp_path / "tmp" / "half"
    leftover.write_bytes(b"x")
    assert await blobs.remove_leftovers(older_than=3_600) == 0
    os.utime(leftover, (0, 0))
    assert await blobs.remove_leftovers(older_than=3_600) == 1
    assert not leftover.exists()
    assert await blobs.get(digest) == b"content"


async def test_putting_again_makes_a_blob_young(tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path)
    digest = await blobs.put(b"content")
    path = await blobs.open_path(digest)
    assert path is not None
    os.utime(path, (0, 0))
    await blobs.put(b"content")
    assert (await blobs.stat(digest)).stored_at > 1_000_000


def test_a_location_chooses_the_store(tmp_path: Path) -> None:
    assert isinstance(open_blob_store(tmp_path), LocalBlobStore)
    assert isinstance(open_blob_store(str(tmp_path)), LocalBlobStore)
    assert isinstance(open_blob_store("s3://bucket/prefix"), ObjectBlobStore)
    with pytest.raises(ConfigError, match="ftp://"):
        open_blob_store("ftp://host/x")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=8), st.data())
def test_a_tail_torn_by_a_crash_is_ignored_and_written_over(pieces: list[bytes], data: st.DataObject) -> None:
    async def run(directory: Path) -> None:
        logs = LocalLogStore(directory)
        ends = []
        for piece in pieces:
            await logs.append([append(piece)])
            ends.append(log_file(directory).stat().st_size)
        await logs.close()
        file = log_file(directory)
        size = data.draw(st.integers(0, ends[-1]))
        garbage = data.draw(st.sampled_from([b"", b"\0" * 20, b"\xff" * 20]))
        with file.open("r+b") as writable:
            writable.truncate(size)
            writable.seek(size)
            writable.write(garbage)
        whole = b"".join(piece for piece, end in zip(pieces, ends, strict=True) if end <= size)
        again = LocalLogStore(directory)
        assert await text(again) == (whole, False)
        await again.append([append(b"more", ended=True)])
        assert await text(again) == (whole + b"more", True)
        await again.close()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(Path(directory)))


@pytest.mark.parametrize(
    "size", [MAX_RECORD_BYTES - 1, MAX_RECORD_BYTES, MAX_RECORD_BYTES + 1, 5 * MAX_RECORD_BYTES + 7]
)
async def test_a_long_piece_of_output_is_kept_whole(tmp_path: Path, size: int) -> None:
    logs = LocalLogStore(tmp_path)
    content = os.urandom(size)
    await logs.append([append(content, ended=True)])
    assert await text(logs) == (content, True)
    smallest = await logs.read("default", "job", 1, 0, 1)
    assert len(smallest.entries) >= 1
    await logs.close()


async def test_a_long_log_is_taken_up_again_where_it_ended(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    first = LocalLogStore(tmp_path)
    await first.append([append(content)])
    await first.close()
    second = LocalLogStore(tmp_path)
    await second.append([append(content[2_999_000:] + b"tail", offset=2_999_000, ended=True)])
    got, ended = await text(second)
    assert hashlib.sha256(got).digest() == hashlib.sha256(content + b"tail").digest()
    assert ended
    await second.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_open_files_are_bounded_and_interleaved_appends_stay_whole(tmp_path: Path) -> None:
    logs = LocalLogStore(tmp_path)
    jobs = [f"job{number}" for number in range(MAX_OPEN_LOGS * 2)]
    before = open_files()
    for part in (b"a", b"b", b"c"):
        await logs.append([append(part, job=job) for job in jobs])
    assert open_files() <= before + MAX_OPEN_LOGS + 5
    for job in jobs:
        assert await text(logs, job) == (b"abc", False)
    await logs.close()


async def test_a_follower_in_another_process_hears_by_looking(tmp_path: Path) -> None:
    """Two stores on one directory stand for two processes: they share nothing but the files."""
    writer, reader = LocalLogStore(tmp_path), LocalLogStore(tmp_path)

    async def follow() -> bytes:
        pages = [page async for page in reader.watch("default", "job", 1)]
        return b"".join(entry.data for page in pages for entry in page.entries)

    following = asyncio.ensure_future(follow())
    for number in range(5):
        await writer.append([append(b"%d" % number, ended=number == 4)])
    assert await asyncio.wait_for(following, PATIENCE) == b"01234"
    await writer.close()
    await reader.close()

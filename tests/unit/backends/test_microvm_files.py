"""Files on their way into a machine and back: what the guest says is not believed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blixard.backends.microvm import files
from blixard.backends.microvm.files import FilesRefused, ReturnedFiles, Source, gather
from blixard.vm.guest.protocol import Entry, EntryKind, EntryReader, Malformed


def entry(kind: int, path: str, body: bytes = b"", mode: int = 0o644) -> bytes:
    return Entry(kind, path, mode, len(body)).encode() + body


def taken(granted: Path, *stream: bytes) -> ReturnedFiles:
    returned = ReturnedFiles({"0": str(granted)})
    try:
        for piece in stream:
            returned.feed(piece)
    finally:
        returned.close()
    return returned


@pytest.fixture
def granted(tmp_path: Path) -> Path:
    place = tmp_path / "granted"
    place.mkdir()
    return place


def test_what_is_gathered_arrives_as_it_was(tmp_path: Path, granted: Path) -> None:
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "deep/er/file").write_bytes(os.urandom(700_000))
    (source / "empty").touch(mode=0o600)
    (source / "link").symlink_to("deep/er/file")
    os.mkfifo(source / "pipe")
    parcel = gather([Source("binds/0", str(source))])
    taken(granted, *parcel.stream())
    assert (granted / "deep/er/file").read_bytes() == (source / "deep/er/file").read_bytes()
    assert (granted / "empty").stat().st_mode & 0o777 == 0o600
    assert (granted / "link").readlink() == Path("deep/er/file")
    assert not (granted / "pipe").exists()


def test_inputs_bring_their_directories_once(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    sources = [Source(f"work/a/b/{name}", str(tmp_path / "f")) for name in ("1", "2")]
    names = [item.name for item in gather(sources).items]
    assert names == ["work/a", "work/a/b", "work/a/b/1", "work/a/b/2"]


def test_a_file_that_shrinks_meanwhile_keeps_its_announced_size(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 1000)
    parcel = gather([Source("work/f", str(tmp_path / "f"))])
    (tmp_path / "f").write_bytes(b"y")
    reader = EntryReader(10_000)
    content = [item for piece in parcel.stream() for item in reader.feed(piece) if isinstance(item, bytes)]
    assert len(b"".join(content)) == 1000
    assert reader.is_between_entries


def test_more_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_SENT_BYTES", 10)
    (tmp_path / "f").write_bytes(b"x" * 10)
    assert gather([Source("work/f", str(tmp_path / "f"))]).size == 10
    (tmp_path / "f").write_bytes(b"x" * 11)
    with pytest.raises(FilesRefused, match="too much"):
        gather([Source("work/f", str(tmp_path / "f"))])


def test_a_device_is_refused() -> None:
    with pytest.raises(FilesRefused, match="neither a file nor a directory"):
        gather([Source("binds/0", "/dev/null")])


@pytest.mark.parametrize("path", ["code/x", "binds/1/x", "binds", "elsewhere/0/x"])
def test_what_was_not_granted_is_not_written(granted: Path, path: str) -> None:
    with pytest.raises(Malformed):
        taken(granted, entry(EntryKind.FILE, path, b"x"))


def test_a_link_in_the_way_is_not_followed(tmp_path: Path, granted: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("safe")
    taken(granted, entry(EntryKind.LINK, "binds/0/way", str(outside).encode()))
    with pytest.raises(OSError):
        taken(granted, entry(EntryKind.FILE, "binds/0/way/file", b"evil"))
    taken(granted, entry(EntryKind.LINK, "binds/0/file", str(outside / "file").encode()))
    taken(granted, entry(EntryKind.FILE, "binds/0/file", b"mine"))
    assert (outside / "file").read_text() == "safe"
    assert (granted / "file").read_bytes() == b"mine"
    assert not (granted / "file").is_symlink()
    taken(granted, entry(EntryKind.LINK, "binds/0/gone", str(outside / "file").encode()))
    taken(granted, entry(EntryKind.REMOVED, "binds/0/gone"))
    assert (outside / "file").exists()


def test_a_pipe_in_the_way_does_not_hang(granted: Path) -> None:
    os.mkfifo(granted / "pipe")
    with pytest.raises(OSError):
        taken(granted, entry(EntryKind.FILE, "binds/0/pipe", b"x"))


def test_no_bit_that_gives_rights_is_kept(granted: Path) -> None:
    taken(
        granted, entry(EntryKind.FILE, "binds/0/f", b"x", 0o7777), entry(EntryKind.DIRECTORY, "binds/0/d", mode=0o7777)
    )
    assert (granted / "f").stat().st_mode & 0o7000 == 0
    assert (granted / "d").stat().st_mode & 0o7000 == 0


def test_what_was_removed_goes_and_what_was_not_there_is_no_error(granted: Path) -> None:
    (granted / "d").mkdir()
    (granted / "d/f").touch()
    taken(granted, entry(EntryKind.REMOVED, "binds/0/d/f"), entry(EntryKind.REMOVED, "binds/0/d"))
    taken(granted, entry(EntryKind.REMOVED, "binds/0/d"))
    assert list(granted.iterdir()) == []


def test_a_granted_file_is_written_in_place(tmp_path: Path) -> None:
    file = tmp_path / "single"
    file.write_text("longer than before")
    inode = file.stat().st_ino
    taken(file, entry(EntryKind.FILE, "binds/0", b"new"))
    assert file.read_bytes() == b"new"
    assert file.stat().st_ino == inode

"""What goes into an archive comes out of it, and nothing else gets anywhere."""

from __future__ import annotations

import io
import posixpath
import tarfile
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blixard.bundling import archive as archive_module
from blixard.bundling.archive import MAX_BUNDLE_FILES, archive_digest, pack, unpack
from blixard.domain.limits import MAX_BUNDLE_BYTES
from blixard.errors import InvalidRequest, LimitExceeded

_part = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda part: part not in {".", ".."} and len(part.encode()) < 200
)
_path = st.lists(_part, min_size=1, max_size=4).map("/".join)


def _is_tree(paths: list[str]) -> bool:
    return not any(posixpath.commonpath(["/" + a, "/" + b]) == "/" + a for a in paths for b in paths if a != b)


_contents = st.dictionaries(_path, st.binary(max_size=300), max_size=8).filter(lambda files: _is_tree(list(files)))


def _names(directory: str) -> list[str]:
    return [path.name for path in Path(directory).iterdir()]


def _read(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@given(_contents)
@settings(deadline=None)
def test_what_is_packed_is_unpacked(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        into = Path(scratch, "code")
        unpack(pack(files), into)
        assert _read(into) == files
        assert _names(scratch) == ["code"]


@given(_contents, st.randoms())
@settings(deadline=None)
def test_the_order_of_files_does_not_change_the_digest(files: dict[str, bytes], random: object) -> None:
    shuffled = dict(sorted(files.items(), key=lambda item: hash((item[0], str(random)))))
    assert pack(shuffled) == pack(files)


@given(_contents, _contents)
@settings(deadline=None)
def test_different_files_differ_in_digest(files: dict[str, bytes], others: dict[str, bytes]) -> None:
    assert (archive_digest(pack(files)) == archive_digest(pack(others))) == (files == others)


@given(st.binary(max_size=3_000))
@settings(deadline=None)
def test_noise_is_refused_or_gives_plain_files(noise: bytes) -> None:
    _unpack_or_refuse(noise)


@given(_contents, st.data())
@settings(deadline=None)
def test_a_damaged_archive_is_refused_or_gives_plain_files(files: dict[str, bytes], data: st.DataObject) -> None:
    archive = bytearray(pack(files))
    for _ in range(data.draw(st.integers(1, 5))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    _unpack_or_refuse(bytes(archive))


def _unpack_or_refuse(archive: bytes) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        into = Path(scratch, "code")
        try:
            unpack(archive, into)
        except InvalidRequest:
            assert _names(scratch) == []
            return
        assert _names(scratch) == ["code"]
        assert all(path.is_dir() or (path.is_file() and not path.is_symlink()) for path in into.rglob("*"))


def _tar(*members: tarfile.TarInfo, content: bytes = b"x") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def _member(name: str, *, type_: bytes = tarfile.REGTYPE, link: str = "", size: int = 1) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = type_
    member.linkname = link
    member.size = size if type_ == tarfile.REGTYPE else 0
    return member


@pytest.mark.parametrize(
    "members",
    [
        [_member("../evil")],
        [_member("a/../../evil")],
        [_member("/tmp/evil")],
        [_member("a//b")],
        [_member("./a")],
        [_member("link", type_=tarfile.SYMTYPE, link="/etc")],
        [_member("link", type_=tarfile.LNKTYPE, link="a")],
        [_member("pipe", type_=tarfile.FIFOTYPE)],
        [_member("device", type_=tarfile.CHRTYPE)],
        [_member("directory", type_=tarfile.DIRTYPE)],
        [_member("a"), _member("a")],
        [_member("a"), _member("a/b")],
        [_member("a/b"), _member("a")],
    ],
    ids=lambda members: "+".join(f"{m.name}:{m.type.decode()}" for m in members),
)
def test_an_archive_with_anything_but_plain_files_inside_is_refused(
    tmp_path: Path, members: list[tarfile.TarInfo]
) -> None:
    with pytest.raises(InvalidRequest):
        unpack(_tar(*members), tmp_path / "code")
    assert list(tmp_path.iterdir()) == []


def test_unpacked_files_are_read_only(tmp_path: Path) -> None:
    unpack(pack({"pkg/a.py": b"x = 1\n"}), tmp_path / "code")
    assert (tmp_path / "code/pkg/a.py").stat().st_mode & 0o777 == 0o444


def test_unpacking_takes_a_file_as_well_and_twice_is_once(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(pack({"a.py": b"1"}))
    unpack(tmp_path / "blob", tmp_path / "code")
    unpack(pack({"b.py": b"2"}), tmp_path / "code")
    assert _read(tmp_path / "code") == {"a.py": b"1"}


def test_many_unpack_at_once_and_all_find_it_complete(tmp_path: Path) -> None:
    archive = pack({f"m{i}.py": b"x" * 1000 for i in range(50)})
    errors: list[BaseException] = []

    def work() -> None:
        try:
            unpack(archive, tmp_path / "code")
            assert len(_read(tmp_path / "code")) == 50
        except BaseException as error:  # the test's own edge: reported below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_the_size_limit_is_exact_and_names_the_largest_file(tmp_path: Path) -> None:
    half = MAX_BUNDLE_BYTES // 2
    archive = pack({"big.py": bytes(half), "data.bin": bytes(MAX_BUNDLE_BYTES - half)})
    unpack(archive, tmp_path / "code")
    with pytest.raises(LimitExceeded, match=r"MAX_BUNDLE_BYTES.*Largest: data.bin \(6"):
        pack({"big.py": bytes(half), "data.bin": bytes(MAX_BUNDLE_BYTES - half + MAX_BUNDLE_BYTES // 10)})
    with pytest.raises(LimitExceeded):
        pack({"big.py": bytes(half), "data.bin": bytes(MAX_BUNDLE_BYTES - half + 1)})


def test_an_archive_that_unpacks_to_more_than_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack({"a": bytes(600), "b": bytes(600)})
    monkeypatch.setattr(archive_module, "MAX_BUNDLE_BYTES", 1_000)
    with pytest.raises(LimitExceeded):
        unpack(archive, tmp_path / "code")
    assert list(tmp_path.iterdir()) == []


def test_a_sparse_file_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    member = _member("hole")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member.size = 512
        tar.addfile(member, io.BytesIO(b"0\n".ljust(512, b"\0")))
    with pytest.raises(InvalidRequest):
        unpack(out.getvalue(), tmp_path / "code")


def test_the_number_of_files_is_limited() -> None:
    pack({f"{i}.py": b"" for i in range(MAX_BUNDLE_FILES)})
    with pytest.raises(LimitExceeded, match="MAX_BUNDLE_FILES"):
        pack({f"{i}.py": b"" for i in range(MAX_BUNDLE_FILES + 1)})


@pytest.mark.parametrize("path", ["", ".", "..", "../a", "/a", "a/../b", "a//b", "a/", "a\0b", "\udc80"])
def test_a_path_that_leads_elsewhere_cannot_be_packed(path: str) -> None:
    with pytest.raises(InvalidRequest):
        pack({path: b""})


def test_a_file_cannot_be_a_directory_too() -> None:
    with pytest.raises(InvalidRequest, match="a file and a directory"):
        pack({"a": b"", "a/b": b""})

"""The archives that the kernel unpacks, read back by a reader of their own."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from blixard.vm.image.cpio import Entry, write_archive

parts = st.from_regex(r"[a-z]{1,6}", fullmatch=True)
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)
contents = st.dictionaries(paths, st.binary(max_size=40), max_size=6)


def read_archive(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Return mode and content of each entry of a "newc" archive."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, length = fields[6], fields[11]
        name = data[at + 110 : at + 110 + length - 1].decode()
        start = (at + 110 + length + 3) // 4 * 4
        at = (start + size + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert set(data[at:]) <= {0}
            return found
        assert name not in found
        found[name] = (fields[1], data[start : start + size])


def no_file_in_a_file(files: dict[str, bytes]) -> bool:
    return not any(other.startswith(f"{path}/") for path in files for other in files)


@given(contents.filter(no_file_in_a_file), st.sampled_from([0o644, 0o755]))
def test_what_is_written_is_read_back_in_order_with_its_directories(files: dict[str, bytes], mode: int) -> None:
    data = write_archive([Entry(path, content, mode) for path, content in files.items()])
    found = read_archive(data)
    assert {path: content for path, (kind, content) in found.items() if kind == 0o100000 | mode} == files
    directories = {parent for path in files for parent in map(str, Path(path).parents)} - {"."}
    assert {path for path, (kind, _) in found.items() if kind == 0o40755} == directories
    assert list(found) == sorted(found)
    assert len(data) % 512 == 0


@given(contents.filter(no_file_in_a_file))
def test_the_order_of_entries_does_not_matter(files: dict[str, bytes]) -> None:
    entries = [Entry(path, content) for path, content in files.items()]
    assert write_archive(entries) == write_archive(reversed(entries))

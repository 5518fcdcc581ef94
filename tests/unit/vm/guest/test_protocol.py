"""The frames between host and guest, fed in every possible way."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blixard.vm.guest.protocol import (
    CHUNK_BYTES,
    ENTRY,
    HEAD,
    MAX_ENTRIES,
    MAX_PATH_BYTES,
    MAX_PORT_WRITE,
    PACKET_HEAD,
    Entry,
    EntryKind,
    EntryReader,
    FrameReader,
    Kind,
    Malformed,
    PacketJoiner,
    frame,
    packed,
)

LIMIT = 1000
kinds = st.sampled_from([int(kind) for kind in Kind])
frames = st.lists(st.tuples(kinds, st.integers(0, 2**32 - 1), st.binary(max_size=LIMIT)), max_size=8)
names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name not in {".", ".."}
)
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
files = st.lists(st.tuples(paths, st.integers(0, 0o777), st.binary(max_size=500)), max_size=8)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Return the bytes in pieces of these sizes, the last one as long as is left."""
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


@given(frames, st.lists(st.integers(0, 50), max_size=40))
def test_frames_come_out_as_they_went_in_whatever_the_pieces(
    sent: list[tuple[int, int, bytes]], sizes: list[int]
) -> None:
    data = b"".join(frame(*item) for item in sent)
    reader = FrameReader(LIMIT)
    assert [item for piece in cut(data, sizes) for item in reader.feed(piece)] == sent
    assert reader.is_between_frames


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_any_bytes_give_frames_or_one_error_and_keep_no_more_than_a_frame(pieces: list[bytes]) -> None:
    reader = FrameReader(LIMIT)
    with contextlib.suppress(Malformed):
        for piece in pieces:
            for kind, _, body in reader.feed(piece):
                assert kind in {int(known) for known in Kind}
                assert len(body) <= LIMIT
            assert len(reader._buffer) <= LIMIT + HEAD.size + len(piece)


def test_a_body_of_the_limit_is_taken_and_one_byte_more_is_not() -> None:
    assert [body for _, _, body in FrameReader(LIMIT).feed(frame(Kind.DATA, 1, bytes(LIMIT)))] == [bytes(LIMIT)]
    with pytest.raises(Malformed, match=f"{LIMIT + 1} bytes"):
        list(FrameReader(LIMIT).feed(frame(Kind.DATA, 1, bytes(LIMIT + 1))))


def test_an_unknown_kind_is_refused_before_its_body_has_come() -> None:
    with pytest.raises(Malformed, match="kind 99"):
        list(FrameReader(LIMIT).feed(HEAD.pack(LIMIT, 99, 1)))


def test_a_frame_of_data_fits_into_one_write_to_the_port() -> None:
    assert len(frame(Kind.DATA, 1, bytes(1 + CHUNK_BYTES))) == MAX_PORT_WRITE


@given(st.lists(st.binary(max_size=200), max_size=8), st.lists(st.integers(0, 30), max_size=30))
def test_packets_are_joined(sent: list[bytes], sizes: list[int]) -> None:
    joiner = PacketJoiner(LIMIT)
    data = b"".join(map(packed, sent))
    assert [packet for piece in cut(data, sizes) for packet in joiner.feed(piece)] == sent


def test_a_packet_over_the_limit_is_refused_by_its_head() -> None:
    assert list(PacketJoiner(LIMIT).feed(packed(bytes(LIMIT)))) == [bytes(LIMIT)]
    with pytest.raises(Malformed, match="packet"):
        list(PacketJoiner(LIMIT).feed(PACKET_HEAD.pack(LIMIT + 1)))


@given(files, st.lists(st.integers(0, 60), max_size=40))
def test_files_come_out_as_they_went_in(sent: list[tuple[str, int, bytes]], sizes: list[int]) -> None:
    data = b"".join(Entry(EntryKind.FILE, path, mode, len(body)).encode() + body for path, mode, body in sent)
    reader = EntryReader(10_000)
    got: list[tuple[str, int, bytearray]] = []
    for piece in cut(data, sizes):
        for item in reader.feed(piece):
            if isinstance(item, Entry):
                got.append((item.path, item.mode, bytearray()))
            else:
                got[-1][2].extend(item)
    assert [(path, mode, bytes(body)) for path, mode, body in got] == sent
    assert reader.is_between_entries


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_any_bytes_give_entries_that_lead_nowhere_but_down(pieces: list[bytes]) -> None:
    reader = EntryReader(10_000)
    with contextlib.suppress(Malformed):
        for piece in pieces:
            for item in reader.feed(piece):
                if isinstance(item, Entry):
                    assert ".." not in item.path.split("/")
                    assert not item.path.startswith("/")


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../b", "a//b", "a/", ".", "..", "a/./b", "nul\0"])
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(Malformed, match="path"):
        list(EntryReader(100).feed(Entry(EntryKind.FILE, path, 0o644).encode()))


@pytest.mark.parametrize(
    "head",
    [
        ENTRY.pack(99, 0, 0, 1) + b"a",
        ENTRY.pack(EntryKind.FILE, 0, 0, 0),
        ENTRY.pack(EntryKind.FILE, 0, 0, MAX_PATH_BYTES + 1),
        ENTRY.pack(EntryKind.DIRECTORY, 0, 5, 1) + b"a",
        ENTRY.pack(EntryKind.REMOVED, 0, 5, 1) + b"a",
        ENTRY.pack(EntryKind.LINK, 0, 0, 1) + b"a",
        ENTRY.pack(EntryKind.LINK, 0, MAX_PATH_BYTES + 1, 1) + b"a",
        ENTRY.pack(EntryKind.FILE, 0, 101, 1) + b"a",
        ENTRY.pack(EntryKind.FILE, 0, 2**64 - 1, 1) + b"a",
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(head: bytes) -> None:
    with pytest.raises(Malformed):
        list(EntryReader(100).feed(head))


def test_no_more_entries_than_the_limit() -> None:
    reader = EntryReader(100)
    one = Entry(EntryKind.DIRECTORY, "a").encode()
    assert sum(1 for _ in reader.feed(one * MAX_ENTRIES)) == MAX_ENTRIES
    with pytest.raises(Malformed, match=str(MAX_ENTRIES)):
        list(reader.feed(one))

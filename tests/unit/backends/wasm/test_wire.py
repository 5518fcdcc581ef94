from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blixard.backends.wasm.wire import (
    MAX_FRAME_BYTES,
    BrokenFrame,
    Ending,
    FrameReader,
    RunReport,
    Tag,
    decode_report,
    encode,
    frame,
    receive_frame,
)

frames = st.lists(st.tuples(st.sampled_from(list(Tag)), st.binary(max_size=300)), max_size=8)


@given(frames, st.lists(st.integers(1, 50), min_size=1))
def test_frames_survive_any_cut(sent: list[tuple[Tag, bytes]], cuts: list[int]) -> None:
    stream = b"".join(frame(tag, body) for tag, body in sent)
    reader, heard, position, turn = FrameReader(), [], 0, 0
    while position < len(stream):
        step = cuts[turn % len(cuts)]
        heard += list(reader.feed(stream[position : position + step]))
        position, turn = position + step, turn + 1
    assert heard == sent


def test_a_frame_of_the_largest_size_passes_and_one_byte_more_does_not() -> None:
    head = MAX_FRAME_BYTES.to_bytes(4, "little") + b"\x01"
    assert list(FrameReader().feed(head)) == []
    with pytest.raises(BrokenFrame):
        list(FrameReader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little") + b"\x01"))


@pytest.mark.parametrize("tag", [0, 6, 255])
def test_an_unknown_tag_is_refused(tag: int) -> None:
    with pytest.raises(BrokenFrame):
        list(FrameReader().feed(bytes([0, 0, 0, 0, tag])))


def test_a_frame_is_received_whole_or_not_at_all() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(frame(Tag.REPORT, b"body") + b"\x05\0\0\0")
        theirs.shutdown(socket.SHUT_WR)
        assert receive_frame(ours) == (Tag.REPORT, b"body")
        assert receive_frame(ours) is None


def test_reports_travel_whole() -> None:
    report = RunReport(ending=Ending.RETURNED, values=(1, 2.5, -(2**63)), output_bytes=3)
    assert decode_report(encode(report)) == report

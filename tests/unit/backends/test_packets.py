from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blixard.backends.packets import (
    MAX_INLINE_BYTES,
    MAX_PACKET_BYTES,
    InvalidPacket,
    PacketReader,
    close_all,
    packet_pair,
    send_packet,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = packet_pair()
    with ours, theirs:
        yield ours, theirs


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=20))
def test_packets_arrive_whole_and_in_order(packets: list[bytes]) -> None:
    ours, theirs = packet_pair()
    with ours, theirs:
        for packet in packets:
            send_packet(ours, packet)
        reader = PacketReader(theirs, is_hasty=True)
        received = [bytes(found[0]) for _ in packets if (found := reader.receive()) is not None]
        with pytest.raises(BlockingIOError):
            reader.receive()
    assert received == packets


@pytest.mark.parametrize("size", [1, MAX_INLINE_BYTES, MAX_INLINE_BYTES + 1, MAX_PACKET_BYTES])
@pytest.mark.parametrize("count", [0, 2])
def test_packets_of_every_size_carry_descriptors(
    pair: tuple[socket.socket, socket.socket], size: int, count: int
) -> None:
    data = b"x" * size
    send_packet(pair[0], data, (0,) * count)
    received = PacketReader(pair[1]).receive()
    assert received is not None
    close_all(received[1])
    assert len(received[1]) == count
    assert bytes(received[0]) == data


def test_a_packet_over_the_limit_is_refused_and_nothing_stays_open(pair: tuple[socket.socket, socket.socket]) -> None:
    before = len(list(os.scandir("/proc/self/fd")))
    send_packet(pair[0], bytes(MAX_PACKET_BYTES + 1), (0,))
    with pytest.raises(InvalidPacket, match="MAX_PACKET_BYTES"):
        PacketReader(pair[1]).receive()
    assert len(list(os.scandir("/proc/self/fd"))) == before


def test_a_file_that_is_no_memory_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    reading, writing = os.pipe()
    socket.send_fds(pair[0], [b"M"], [reading])
    close_all([reading, writing])
    with pytest.raises(InvalidPacket):
        PacketReader(pair[1]).receive()


def test_the_end_of_the_other_side_is_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    assert PacketReader(pair[1]).receive() is None


def test_a_hasty_reader_leaves_the_socket_blocking(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(BlockingIOError):
        PacketReader(pair[1], is_hasty=True).receive()
    assert pair[1].getblocking()

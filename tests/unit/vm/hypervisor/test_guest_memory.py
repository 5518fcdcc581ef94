from __future__ import annotations

import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blixard.vm.hypervisor.guest_memory import (
    CHUNK,
    Descriptors,
    chunks_of,
    copy_memory,
    create_memory,
    read_all,
    reopen,
    seal_memory,
    write_all,
)

SIZE = 8 * CHUNK
PIECES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.binary(min_size=1, max_size=5000)), max_size=12)


def written(pieces: list[tuple[int, bytes]]) -> int:
    memory = create_memory("test", SIZE)
    for offset, data in pieces:
        write_all(memory, offset, data[: SIZE - offset])
    return memory


@given(PIECES)
def test_chunks_are_all_that_is_not_zero_once_and_in_order(pieces: list[tuple[int, bytes]]) -> None:
    with Descriptors() as owned:
        memory = owned.own(written(pieces))
        rebuilt = bytearray(SIZE)
        offsets = []
        for offset, chunk in chunks_of(memory):
            rebuilt[offset : offset + len(chunk)] = chunk
            offsets.append(offset)
        assert rebuilt == read_all(memory, 0, SIZE)
    assert offsets == sorted(set(offsets))
    assert all(offset % CHUNK == 0 for offset in offsets)


@given(PIECES)
def test_a_copy_is_equal_and_shares_nothing(pieces: list[tuple[int, bytes]]) -> None:
    with Descriptors() as owned:
        memory = owned.own(written(pieces))
        seal_memory(memory)
        before = read_all(memory, 0, SIZE)
        copy = owned.own(copy_memory(memory, "copy"))
        assert read_all(copy, 0, SIZE) == before
        write_all(copy, 0, b"changed")
        assert read_all(memory, 0, SIZE) == before


def test_a_copy_takes_no_space_for_what_is_empty() -> None:
    with Descriptors() as owned:
        memory = owned.own(written([(SIZE - 10, b"x")]))
        copy = owned.own(copy_memory(memory, "copy"))
        assert os.fstat(copy).st_size == SIZE
        assert os.fstat(copy).st_blocks * 512 <= CHUNK


def test_sealed_memory_cannot_be_changed_by_whoever_opens_it_and_still_be_mapped_privately() -> None:
    with Descriptors() as owned:
        memory = owned.own(written([(0, b"before")]))
        seal_memory(memory)
        again = owned.own(os.open(f"/proc/self/fd/{memory}", os.O_RDWR))
        for forbidden in (
            lambda: os.pwrite(again, b"after", 0),
            lambda: os.ftruncate(again, 0),
            lambda: mmap.mmap(again, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        ):
            with pytest.raises(PermissionError):
                forbidden()
        with mmap.mmap(again, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
            private[:5] = b"after"
        assert read_all(memory, 0, 6) == b"before"


def test_each_reader_has_an_offset_of_its_own() -> None:
    with Descriptors() as owned:
        memory = owned.own(written([(0, b"state")]))
        first, second = owned.own(reopen(memory)), owned.own(reopen(memory))
        assert os.read(first, 5) == os.read(second, 5) == b"state"

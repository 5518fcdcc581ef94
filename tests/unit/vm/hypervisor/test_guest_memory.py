from __future__ import annotations

import mmap
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blixard.vm.hypervisor.guest_memory import (
    CHUNK,
    Descriptors,
    copy_and_hash,
    copy_memory,
    create_memory,
    read_all,
    reopen,
    seal_memory,
    write_all,
)

SIZE = 4 * CHUNK
PIECES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.binary(min_size=1, max_size=5000)), max_size=12)


def written(pieces: list[tuple[int, bytes]]) -> int:
    memory = create_memory("test", SIZE)
    for offset, data in pieces:
        write_all(memory, offset, data[: SIZE - offset])
    return memory


@settings(deadline=None, max_examples=50)  # a loaded machine copies slowly
@given(PIECES)
def test_the_checksum_is_of_the_content_however_it_came_to_be(pieces: list[tuple[int, bytes]]) -> None:
    with Descriptors() as owned:
        memory, copy, again = (
            owned.own(descriptor) for descriptor in (written(pieces), *(create_memory("x", SIZE) for _ in "ab"))
        )
        content = read_all(memory, 0, SIZE)
        write_all(again, 0, content)
        checksum = copy_and_hash(memory, copy)
        assert read_all(copy, 0, SIZE) == content
        assert copy_and_hash(again, copy) == checksum, "zeros that were written are as good as none"
        write_all(again, SIZE // 2, bytes([content[SIZE // 2] ^ 1]))
        assert copy_and_hash(again, owned.own(create_memory("x", SIZE))) != checksum


def test_content_at_another_place_has_another_checksum() -> None:
    with Descriptors() as owned:
        first, second = owned.own(written([(0, b"x")])), owned.own(written([(CHUNK, b"x")]))
        copies = [owned.own(create_memory("x", SIZE)) for _ in range(2)]
        assert copy_and_hash(first, copies[0]) != copy_and_hash(second, copies[1])


@settings(deadline=None, max_examples=50)  # a loaded machine copies slowly
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

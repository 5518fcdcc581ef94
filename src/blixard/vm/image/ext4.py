"""Dates in an ext4 file system. mke2fs copies when a file was made and read on this machine, which no other build would repeat."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

import msgspec

from blixard.errors import InternalError

_SUPERBLOCK_AT, _MAGIC = 1024, 0xEF53
_CHECKSUMS, _WIDE = 0x400, 0x80
_ATIME, _CTIME, _MTIME, _EXTRA_SIZE = 0x08, 0x0C, 0x10, 0x80
_EXTRA_CTIME, _EXTRA_MTIME, _EXTRA_ATIME = 0x84, 0x88, 0x8C
_FIRST_SIZE = 128
"""Of an inode, before there was room for parts of a second."""


class _Layout(msgspec.Struct, frozen=True):
    block_size: int
    inode_size: int
    inodes_per_group: int
    groups: int
    descriptor_size: int
    first_block: int


def settle_dates(path: Path) -> None:
    """Let each file in the file system at ``path`` be changed and read last when it was written last. Written in place."""
    with path.open("r+b") as file:
        layout = _read_layout(file)
        for table in _inode_tables(file, layout):
            _settle_table(file, table * layout.block_size, layout)


def _read_layout(file: IO[bytes]) -> _Layout:
    file.seek(_SUPERBLOCK_AT)
    block = file.read(1024)

    def number(at: int, form: str = "<I") -> int:
        return int(struct.unpack_from(form, block, at)[0])

    if number(0x38, "<H") != _MAGIC or number(0x64) & _CHECKSUMS:
        raise InternalError("mke2fs made another kind of file system than it was asked for")
    inodes, per_group = number(0x00), number(0x28)
    wide = number(0x60) & _WIDE
    return _Layout(
        block_size=1024 << number(0x18),
        inode_size=number(0x58, "<H"),
        inodes_per_group=per_group,
        groups=-(-inodes // per_group),
        descriptor_size=number(0xFE, "<H") if wide else 32,
        first_block=number(0x14),
    )


def _inode_tables(file: IO[bytes], layout: _Layout) -> list[int]:
    """Return the first block of each group's inodes."""
    file.seek((layout.first_block + 1) * layout.block_size)
    descriptors = file.read(layout.groups * layout.descriptor_size)
    found = []
    for group in range(layout.groups):
        at = group * layout.descriptor_size
        low = struct.unpack_from("<I", descriptors, at + 0x08)[0]
        high = struct.unpack_from("<I", descriptors, at + 0x28)[0] if layout.descriptor_size > 32 else 0
        found.append(low | high << 32)
    return found


def _settle_table(file: IO[bytes], at: int, layout: _Layout) -> None:
    file.seek(at)
    before = file.read(layout.inodes_per_group * layout.inode_size)
    table = bytearray(before)
    for start in range(0, len(table), layout.inode_size):
        _settle_inode(table, start, layout.inode_size)
    if table != before:
        file.seek(at)
        file.write(table)


def _settle_inode(table: bytearray, start: int, size: int) -> None:
    for field in (_ATIME, _CTIME):
        table[start + field : start + field + 4] = table[start + _MTIME : start + _MTIME + 4]
    if size > _FIRST_SIZE and int.from_bytes(table[start + _EXTRA_SIZE : start + _EXTRA_SIZE + 2], "little") >= 16:
        for field in (_EXTRA_ATIME, _EXTRA_CTIME):
            table[start + field : start + field + 4] = table[start + _EXTRA_MTIME : start + _EXTRA_MTIME + 4]

"""Archives that the kernel unpacks as its first root file system: "newc" cpio, one after the other in one file."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import PurePosixPath

import msgspec

ALIGNMENT = 4
BLOCK = 512
"""The kernel wants each archive to start at a multiple of four; a whole block keeps other tools happy as well."""


class Entry(msgspec.Struct, frozen=True):
    """A file or, without data, a directory. Owned by root, of no date."""

    path: str
    data: bytes | None = None
    mode: int = 0o644


def write_archive(entries: Iterable[Entry]) -> bytes:
    """Return an archive of ``entries`` sorted by path, with the directories that they lie in. Equal entries give equal bytes."""
    by_path = {entry.path: entry for entry in entries}
    for path in list(by_path):
        for parent in PurePosixPath(path).parents:
            by_path.setdefault(str(parent), Entry(str(parent)))
    by_path.pop(".", None)
    records = [_record(number, by_path[path]) for number, path in enumerate(sorted(by_path), 1)]
    return _pad(b"".join([*records, _trailer()]), BLOCK)


def _record(number: int, entry: Entry) -> bytes:
    data = entry.data or b""
    mode = stat.S_IFDIR | 0o755 if entry.data is None else stat.S_IFREG | entry.mode
    return _header(number, mode, len(data), entry.path) + _pad(data, ALIGNMENT)


def _trailer() -> bytes:
    return _header(0, 0, 0, "TRAILER!!!")


def _header(number: int, mode: int, size: int, path: str) -> bytes:
    name = path.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device (2), device of a device file (2), length of the name, checksum
    fields = (number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name), 0)
    return _pad(b"070701" + b"".join(b"%08X" % field for field in fields) + name, ALIGNMENT)


def _pad(data: bytes, multiple: int) -> bytes:
    return data + b"\0" * (-len(data) % multiple)

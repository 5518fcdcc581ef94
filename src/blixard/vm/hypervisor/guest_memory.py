"""A guest's memory as an anonymous file, which lives as long as somebody has it open. Linux only."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

CHUNK = 1 << 20
"""Memory is copied and checked in pieces of this size; pieces of zeros are left out."""
COPY_THREADS = min(4, os.cpu_count() or 1)
"""The checksum takes longer than the copy."""
_ZEROS = bytes(CHUNK)
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create_memory(name: str, size: int) -> int:
    """Return the descriptor of an empty anonymous file. It may be written until ``seal_memory``."""
    descriptor = os.memfd_create(f"blixard-{name}", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


def seal_memory(descriptor: int) -> None:
    """From now on nobody can change it, whoever opens it how: the machines that share it are strangers to each other.

    Raises ``OSError`` while a process still has it mapped for writing.
    """
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)


def reopen(descriptor: int) -> int:
    """Return a descriptor of the same file with an offset of its own."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def copy_and_hash(source: int, target: int) -> str:
    """Copy all that is not zero, and return a checksum of it: SHA-256 of each piece's offset and SHA-256, in order. On several threads."""

    def copy(piece: tuple[int, int]) -> bytes:
        offset, length = piece
        chunk = read_all(source, offset, length)
        if chunk == _ZEROS[: len(chunk)]:
            return b""
        write_all(target, offset, chunk)
        return offset.to_bytes(8, "little") + hashlib.sha256(chunk).digest()

    digest = hashlib.sha256()
    with ThreadPoolExecutor(COPY_THREADS, "copy guest memory") as threads:
        for part in threads.map(copy, _pieces_of(source)):
            digest.update(part)
    return digest.hexdigest()


def _pieces_of(descriptor: int) -> Iterator[tuple[int, int]]:
    for start, end in _extents_of(descriptor):
        for offset in range(start, end, CHUNK):
            yield offset, min(CHUNK, end - offset)


def _extents_of(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges that hold data, widened to whole pieces and never twice."""
    size, done = os.fstat(descriptor).st_size, 0
    while done < size:
        try:
            start = os.lseek(descriptor, done, os.SEEK_DATA) // CHUNK * CHUNK
        except OSError:  # ENXIO: no data from here on
            return
        start = max(start, done)
        end = os.lseek(descriptor, max(done, start), os.SEEK_HOLE)
        end = min(-(-max(end, start + 1) // CHUNK) * CHUNK, size)
        yield start, end
        done = end


def read_all(descriptor: int, offset: int, length: int) -> bytes:
    """Return exactly ``length`` bytes, fewer only at the end of the file."""
    parts, left = [], length
    while left and (part := os.pread(descriptor, left, offset)):
        parts.append(part)
        offset, left = offset + len(part), left - len(part)
    return b"".join(parts)


def write_all(descriptor: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def copy_memory(descriptor: int, name: str) -> int:
    """Return a copy that may be written and shares nothing with the original."""
    copy = create_memory(name, os.fstat(descriptor).st_size)
    try:
        copy_and_hash(descriptor, copy)
    except BaseException:
        os.close(copy)
        raise
    return copy


class Descriptors(contextlib.ExitStack):
    """Closes what it was given, unless ``pop_all`` took it over."""

    def own(self, descriptor: int) -> int:
        self.callback(os.close, descriptor)
        return descriptor

"""What jobs wrote: one append-only file for each attempt that wrote anything.

A file is a row of frames: length and CRC-32 of the body (4 bytes each, big endian), then the body in MessagePack: a
``LogRecord``, or at the end one ``_EndMark``. A frame that is cut off or damaged ends what a reader sees; the next append
cuts it away.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from blixard.domain.ids import check_id
from blixard.domain.limits import KIB, MAX_WAIT_SECONDS, MIB
from blixard.domain.log import LogRecord
from blixard.domain.spec import MAX_OUTPUT_BYTES
from blixard.errors import StoreFull, StoreUnavailable
from blixard.storage.filesystem import make_private_directory

MAX_OPEN_LOGS = 128
"""Files that are kept open for further appends; the longest unused is closed first."""
MAX_RECORD_BYTES = 64 * KIB
"""Longer pieces of output are kept as several records."""
DEFAULT_PAGE_BYTES = 1 * MIB
MIN_POLL_SECONDS = 0.02
MAX_POLL_SECONDS = 0.25
"""How often a follower looks for what another process appends."""
_HEAD = struct.Struct(">II")
_MAX_FRAME = MAX_RECORD_BYTES + 1 * KIB
_MAX_PLAIN_NAME = 200

T = TypeVar("T")
LogKey = tuple[str, str, int]
"""Namespace, job id, attempt."""


class LogAppend(msgspec.Struct, frozen=True, kw_only=True):
    """Output of one attempt, behind what was appended before.

    ``offset``: bytes of output before these records as their sender counts them, so that a repetition is recognised; None:
    they are new. ``ended``: nothing more will come. ``dropped``: bytes that were left out because of a limit.
    """

    namespace: str
    job_id: str
    attempt: int
    records: Sequence[LogRecord] = ()
    offset: int | None = None
    ended: bool = False
    dropped: int = 0


class LogPage(msgspec.Struct, frozen=True, kw_only=True):
    """``next_offset`` continues. ``ended``: the end mark was reached; ``dropped`` bytes were left out, which the last entry says too."""

    entries: tuple[LogRecord, ...]
    next_offset: int
    ended: bool = False
    dropped: int = 0


class LogStore(Protocol):
    """Output of attempts. What was appended survives the death of this process; a power cut may take the last seconds."""

    async def append(self, appends: Sequence[LogAppend]) -> None:
        """Append all of it, each behind what its attempt has. Records that were appended before are left out.

        An attempt's output above the limit of the store is dropped and counted. Raises ``StoreUnavailable``, ``StoreFull``;
        then some may have been appended, and repeating it with the same offsets is safe.
        """

    async def read(
        self, namespace: str, job_id: str, attempt: int, after_offset: int = 0, limit_bytes: int = DEFAULT_PAGE_BYTES
    ) -> LogPage:
        """Return what follows ``after_offset`` (0, or a page's ``next_offset``), about ``limit_bytes`` of it at most.

        An attempt that wrote nothing has an empty page that is not ``ended``: its job's state tells whether it is over.
        """

    async def wait(self, namespace: str, job_id: str, attempt: int, after_offset: int, seconds: float) -> bool:
        """Wait until something stands behind ``after_offset``; False when nothing does after ``seconds``."""

    def watch(self, namespace: str, job_id: str, attempt: int, after_offset: int = 0) -> AsyncIterator[LogPage]:
        """Yield pages as they come until the end mark. Without one it waits for ever: wrap it in a timeout."""

    async def delete(self, keys: Sequence[LogKey]) -> None:
        """Remove the output of these attempts; what is not there is no error."""

    async def close(self) -> None:
        """Close all files. Allowed twice; appending again opens them again."""


def truncation_mark(dropped: int) -> bytes:
    return f"\n[output truncated: {dropped} bytes dropped]\n".encode()


class _EndMark(msgspec.Struct, frozen=True, array_like=True, tag=True):
    at: int
    dropped: int


class _Scan(msgspec.Struct, frozen=True):
    """What a file holds: bytes up to the last whole frame, bytes of output, whether it has ended."""

    size: int = 0
    output: int = 0
    ended: bool = False


class _OpenLog:
    """A file open for appending, and what it holds."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        found = os.fstat(self._descriptor).st_size
        scan = _scan(self._descriptor)
        if scan.size < found:
            os.ftruncate(self._descriptor, scan.size)
        self._size = scan.size
        self.output = scan.output
        self.ended = scan.ended
        self.dropped = 0

    def write(self, data: bytes) -> None:
        """Append all of it or nothing."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        os.close(self._descriptor)


class LocalLogStore:
    """Files ``<namespace>/<two digits>/<job>.<attempt>.log`` in a directory. Bound to one event loop; one thread writes."""

    def __init__(self, directory: Path, *, max_output_bytes: int = MAX_OUTPUT_BYTES) -> None:
        self._directory = directory
        self._max_output = max_output_bytes
        self._open: OrderedDict[LogKey, _OpenLog] = OrderedDict()
        self._bells: dict[LogKey, set[asyncio.Event]] = {}
        self._writer: ThreadPoolExecutor | None = None

    async def append(self, appends: Sequence[LogAppend]) -> None:
        try:
            await self._on_writer(lambda: self._append_all(appends))
        finally:
            for append in appends:
                for bell in self._bells.get(_key(append), ()):
                    bell.set()

    async def read(
        self, namespace: str, job_id: str, attempt: int, after_offset: int = 0, limit_bytes: int = DEFAULT_PAGE_BYTES
    ) -> LogPage:
        path = self._path((namespace, job_id, attempt))
        return await asyncio.to_thread(_read_page, path, after_offset, max(limit_bytes, _MAX_FRAME))

    async def wait(self, namespace: str, job_id: str, attempt: int, after_offset: int, seconds: float) -> bool:
        key = (namespace, job_id, attempt)
        path = self._path(key)
        bell = asyncio.Event()
        self._bells.setdefault(key, set()).add(bell)
        try:
            return await self._wait(path, bell, after_offset, asyncio.get_running_loop().time() + seconds)
        finally:
            self._bells[key].discard(bell)
            if not self._bells[key]:
                del self._bells[key]

    async def watch(self, namespace: str, job_id: str, attempt: int, after_offset: int = 0) -> AsyncIterator[LogPage]:
        ended = False
        stuck = False
        while not ended:
            page = await self.read(namespace, job_id, attempt, after_offset)
            if page.next_offset > after_offset:
                after_offset, ended, stuck = page.next_offset, page.ended, False
                yield page
            elif stuck:  # half a frame: its writer is at it, or has died over it
                await asyncio.sleep(MAX_POLL_SECONDS)
                stuck = False
            else:
                stuck = await self.wait(namespace, job_id, attempt, after_offset, MAX_WAIT_SECONDS)

    async def delete(self, keys: Sequence[LogKey]) -> None:
        await self._on_writer(lambda: self._delete_all(keys))

    async def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.submit(self._close_all)
            await asyncio.to_thread(writer.shutdown)

    async def _on_writer(self, call: Callable[[], T]) -> T:
        if self._writer is None:
            self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blixard-logs")
        return await asyncio.get_running_loop().run_in_executor(self._writer, call)

    async def _wait(self, path: Path, bell: asyncio.Event, after_offset: int, deadline: float) -> bool:
        loop = asyncio.get_running_loop()
        interval = MIN_POLL_SECONDS
        while _size(path) <= after_offset:
            left = deadline - loop.time()
            if left <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(bell.wait(), min(interval, left))
            bell.clear()
            interval = min(interval * 1.5, MAX_POLL_SECONDS)
        return True

    def _path(self, key: LogKey) -> Path:
        namespace, job_id, attempt = key
        shard = f"{zlib.crc32(job_id.encode()) & 0xFF:02x}"
        name = check_id(job_id, field="job_id")
        if len(name) > _MAX_PLAIN_NAME:  # a file's name has 255 bytes at most
            name = f"{name[:100]}~{hashlib.sha256(name.encode()).hexdigest()}"
        # One string, not a chain of joins: this runs for every append.
        return Path(f"{self._directory}/{check_id(namespace, field='namespace')}/{shard}/{name}.{attempt:d}.log")

    # What follows runs on the writer's thread.

    def _append_all(self, appends: Sequence[LogAppend]) -> None:
        with _explained(self._directory):
            for append in appends:
                self._append(append)

    def _append(self, append: LogAppend) -> None:
        key = _key(append)
        path = self._path(key)
        if key not in self._open and not append.records and not append.dropped and not path.exists():
            return
        log = self._use(key, path)
        if not log.ended:
            self._write(log, append)
        if log.ended:
            self._open.pop(key).close()

    def _write(self, log: _OpenLog, append: LogAppend) -> None:
        records = _skip(append.records, 0 if append.offset is None else log.output + log.dropped - append.offset)
        kept, output, dropped = _cap(records, self._max_output - log.output)
        frames = [_frame(record) for record in kept]
        dropped += log.dropped
        if append.ended:
            total = dropped + append.dropped
            at = append.records[-1].at if append.records else 0
            if total:
                frames.append(_frame(LogRecord(at, "stderr", truncation_mark(total))))
            frames.append(_frame(_EndMark(at, total)))
        if frames:
            log.write(b"".join(frames))
        log.output += output
        log.dropped = dropped
        log.ended = append.ended

    def _use(self, key: LogKey, path: Path) -> _OpenLog:
        log = self._open.get(key)
        if log is None:
            log = self._open[key] = _open_log(path)
            if len(self._open) > MAX_OPEN_LOGS:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(key)
        return log

    def _delete_all(self, keys: Sequence[LogKey]) -> None:
        with _explained(self._directory):
            for key in keys:
                log = self._open.pop(key, None)
                if log is not None:
                    log.close()
                self._path(key).unlink(missing_ok=True)

    def _close_all(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def _key(append: LogAppend) -> LogKey:
    return (append.namespace, append.job_id, append.attempt)


def _open_log(path: Path) -> _OpenLog:
    try:
        return _OpenLog(path)
    except FileNotFoundError:
        make_private_directory(path.parent)
        return _OpenLog(path)


def _skip(records: Sequence[LogRecord], size: int) -> list[LogRecord]:
    """Return the records without their first ``size`` bytes of output."""
    left: list[LogRecord] = []
    for record in records:
        if size <= 0:
            left.append(record)
        elif size < len(record.data):
            left.append(LogRecord(record.at, record.stream, record.data[size:]))
        size -= len(record.data)
    return left


def _cap(records: Sequence[LogRecord], room: int) -> tuple[list[LogRecord], int, int]:
    """Return the records that fit, split where they are too long for a frame; their bytes; the bytes that do not fit."""
    kept: list[LogRecord] = []
    output = dropped = 0
    for record in records:
        data = record.data[: max(0, room - output)]
        output += len(data)
        dropped += len(record.data) - len(data)
        kept += [
            LogRecord(record.at, record.stream, data[start : start + MAX_RECORD_BYTES])
            for start in range(0, len(data), MAX_RECORD_BYTES)
        ]
    return kept, output, dropped


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(LogRecord)
_end_decoder = msgspec.msgpack.Decoder(_EndMark)


def _frame(body: LogRecord | _EndMark) -> bytes:
    encoded = _encoder.encode(body)
    return _HEAD.pack(len(encoded), zlib.crc32(encoded)) + encoded


def _frames(data: bytes) -> Iterator[tuple[int, LogRecord | _EndMark]]:
    """Yield each whole frame with the offset behind it; stop at the first that is cut off or damaged."""
    offset = 0
    while offset + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, offset)
        start, end = offset + _HEAD.size, offset + _HEAD.size + length
        body = data[start:end]
        if not 0 < length <= _MAX_FRAME or len(body) < length or zlib.crc32(body) != checksum:
            return
        offset = end
        yield offset, _decode(body)


def _decode(body: bytes) -> LogRecord | _EndMark:
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError:
        return _end_decoder.decode(body)


def _scan(descriptor: int) -> _Scan:
    """Walk through the whole file, a page at a time."""
    size = output = 0
    while True:
        before = size
        for end, frame in _frames(os.pread(descriptor, DEFAULT_PAGE_BYTES, before)):
            size = before + end
            if isinstance(frame, _EndMark):
                return _Scan(size, output, ended=True)
            output += len(frame.data)
        if size == before:
            return _Scan(size, output)


def _read_page(path: Path, after_offset: int, limit_bytes: int) -> LogPage:
    data = _read_range(path, after_offset, limit_bytes)
    entries: list[LogRecord] = []
    offset = after_offset
    for end, frame in _frames(data):
        offset = after_offset + end
        if isinstance(frame, _EndMark):
            return LogPage(entries=tuple(entries), next_offset=offset, ended=True, dropped=frame.dropped)
        entries.append(frame)
    return LogPage(entries=tuple(entries), next_offset=offset)


def _read_range(path: Path, start: int, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)
    except FileNotFoundError:
        return b""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"the disk is full: {directory} could not be written", hint="free some space") from error
        raise StoreUnavailable(
            f"the logs in {directory} cannot be used: {error}", hint="check the disk and the permissions"
        ) from error

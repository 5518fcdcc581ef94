"""The list of a map: read once, kept in a temporary file, so that 100,000 lines cost no memory and cannot change meanwhile."""

from __future__ import annotations

import array
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from blixard.domain.grants import InputFile, check_input_path
from blixard.domain.limits import MAX_ARGUMENTS_BYTES, MAX_BLOB_BYTES, MIB
from blixard.domain.requirements import Isolation
from blixard.errors import InvalidRequest, LimitExceeded

HASH_BLOCK = 1 * MIB


class MapInput(msgspec.Struct, frozen=True, array_like=True):
    """One line of the list; ``file`` is the digest of the file that it names, with ``--files``."""

    line: str
    file: str | None = None

    @property
    def arguments(self) -> bytes:
        return msgspec.json.encode([[self.line], {}])

    @property
    def place(self) -> str:
        """Return where the file appears: where the function will look for it."""
        return os.path.normpath(self.line)

    @property
    def input_file(self) -> InputFile | None:
        return InputFile(path=self.place, digest=self.file) if self.file else None


class MapInputs:
    """The spooled lines, read back by their number. Close it to remove the file."""

    def __init__(self) -> None:
        self._spool = tempfile.TemporaryFile(prefix="blixard-map-")  # noqa: SIM115  closed by close()
        self._starts = array.array("Q", [0])
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(MapInput)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> MapInput:
        start, end = self._starts[index], self._starts[index + 1]
        return self._decoder.decode(os.pread(self._spool.fileno(), end - start, start))

    def fill(self, lines: BinaryIO, *, with_files: bool, isolation: Isolation) -> Iterator[bytes]:
        """Read every line once; yield what makes each input itself, for the identity of the map.

        Raises ``InvalidRequest`` or ``LimitExceeded`` with the number of the line.
        """
        number = 0
        while line := lines.readline(MAX_ARGUMENTS_BYTES + 2):
            number += 1
            item = _read_line(line, number, with_files=with_files, isolation=isolation)
            record = self._encoder.encode(item)
            self._spool.write(record)
            self._starts.append(self._starts[-1] + len(record))
            yield record
        self._spool.flush()

    def close(self) -> None:
        self._spool.close()


def _read_line(line: bytes, number: int, *, with_files: bool, isolation: Isolation) -> MapInput:
    try:
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"line {number} of the list is not UTF-8 text: {line[:80]!r}",
            field="list",
            hint="convert the list to UTF-8",
        ) from error
    if len(line) > MAX_ARGUMENTS_BYTES or len(MapInput(text).arguments) > MAX_ARGUMENTS_BYTES:
        raise LimitExceeded(
            f"line {number} of the list has over {MAX_ARGUMENTS_BYTES // MIB} MiB as JSON (MAX_ARGUMENTS_BYTES)",
            field="list",
            hint="put the data into a file, its name into the list, and use --files",
        )
    if not with_files or not text or "\0" in text or not Path(text).is_file():
        return MapInput(text)
    _check_place(text, number, isolation)
    return MapInput(text, hash_file(Path(text)))


def _check_place(text: str, number: int, isolation: Isolation) -> None:
    place = os.path.normpath(text)
    if place.startswith("/") and isolation is Isolation.MINIMAL:
        raise InvalidRequest(
            f"line {number}: {text} is an absolute path, which --files can only place in a sandbox",
            field="list",
            hint="use --isolation standard, or relative paths",
        )
    try:
        check_input_path(place)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"line {number}: {text} lies outside of the current directory",
            field="list",
            hint="change to the directory that holds the files, or use absolute paths",
        ) from error


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, reading it in blocks. Raises ``InvalidRequest``, ``LimitExceeded``."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", field="list") from error
    if size > MAX_BLOB_BYTES:
        raise LimitExceeded(f"{path} has {size} bytes; {MAX_BLOB_BYTES} are allowed (MAX_BLOB_BYTES)", field="list")
    return digest.hexdigest()


def open_list(name: str) -> BinaryIO:
    """Open the list, ``-`` for standard input. Raises ``InvalidRequest``."""
    if name == "-":
        import sys

        return sys.stdin.buffer
    path = Path(name)
    if path.is_dir():
        raise InvalidRequest(f"{name} is a directory; a list has one input a line", field="list")
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise InvalidRequest(
            f"there is no list {name}", field="list", hint="name a file with one input a line, or - for standard input"
        ) from error
    except OSError as error:
        raise InvalidRequest(f"cannot read {name}: {error.strerror}", field="list") from error

"""What stands beside the files of an image: what they were made of, and their checksums."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from blixard.errors import Unavailable
from blixard.vm.image.guest_image import MANIFEST
from blixard.vm.image.spec import ImageSpec

FORMAT = 1
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
READ_ONLY, ENTER_ONLY = 0o444, 0o755
Stamp = tuple[int, int, int]
"""Inode, size and time of change of a file: as long as they stay, so does its content."""


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    sha256: str
    size: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``files`` are all files of the directory but the manifest itself."""

    format: int = FORMAT
    digest: str
    spec: ImageSpec
    inputs: dict[str, str]
    """Everything that the digest is of, by name."""
    contents: dict[str, tuple[str, ...]]
    """What is inside, for people: "boot", "debian" and "python" packages as "name version"."""
    created: str
    files: dict[str, FileRecord]


class CorruptImage(Exception):
    """A file is missing, or not what the manifest says."""


def hash_file(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(sha256=digest.hexdigest(), size=file.tell())


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of ``directory``, whose name has to be its digest. Raises ``CorruptImage``."""
    try:
        with (directory / MANIFEST).open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
        manifest = msgspec.json.decode(text, type=Manifest)
    except FileNotFoundError as error:
        raise CorruptImage("it has no manifest") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptImage(f"its manifest cannot be read: {error}") from error
    if manifest.format != FORMAT or manifest.digest != directory.name:
        raise CorruptImage(f"its manifest is one of {manifest.digest}, format {manifest.format}")
    return manifest


def check_files(directory: Path, manifest: Manifest, known: dict[Path, Stamp]) -> None:
    """Compare each file with the manifest and remember its stamp in ``known``; a file whose stamp is known is not read again.

    Raises ``CorruptImage``, and ``Unavailable`` when a file cannot be read, which says nothing about the image.
    """
    for name, record in manifest.files.items():
        path = directory / name
        try:
            stamp = _stamp(path)
            if known.get(path) == stamp:
                continue
            if stamp[1] != record.size or hash_file(path) != record:
                raise CorruptImage(f"{name} is not what was built: its checksum is wrong")
        except FileNotFoundError as error:
            raise CorruptImage(f"{name} is missing") from error
        except OSError as error:
            raise Unavailable(f"the guest image cannot be read: {error}") from error
        known[path] = stamp


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def seal(directory: Path, manifest: Manifest, target: Path) -> None:
    """Write the manifest, let everything reach the disk, and give ``directory`` its name. Before that it does not exist for anybody."""
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    for path in directory.iterdir():
        path.chmod(READ_ONLY)
        sync(path)
    directory.chmod(ENTER_ONLY)
    sync(directory)
    directory.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Return when what was written to a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

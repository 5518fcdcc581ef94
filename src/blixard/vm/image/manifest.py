"""What stands beside the files of an image: what they were made of, and their checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from blixard.vm.image.guest_image import MANIFEST
from blixard.vm.image.spec import ImageSpec

FORMAT = 1
MAX_MANIFEST_BYTES = 4 * 1024 * 1024


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    sha256: str
    size: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``files`` are all files of the directory but the manifest itself."""

    format: int = FORMAT
    digest: str
    spec: ImageSpec
    inputs: dict[str, str]
    """Everything that went into the digest, by name."""
    contents: dict[str, tuple[str, ...]]
    """What is inside, for people: kernel, Debian packages, Python packages, as "name version"."""
    created: str
    files: dict[str, FileRecord]


class CorruptImage(Exception):
    """A file is missing, or not what the manifest says."""


def hash_file(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(sha256=digest.hexdigest(), size=file.tell())


def read_manifest(directory: Path) -> Manifest:
    """Raises ``CorruptImage``."""
    try:
        with (directory / MANIFEST).open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
        manifest = msgspec.json.decode(text, type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptImage(f"its manifest cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise CorruptImage(f"its manifest has format {manifest.format}, not {FORMAT}")
    return manifest

"""The archive of a bundle: an uncompressed tar that depends on nothing but the names and contents of its files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import posixpath
import secrets
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from blixard.domain.limits import MAX_BUNDLE_BYTES, MIB
from blixard.errors import InvalidRequest, LimitExceeded

MAX_BUNDLE_FILES = 4_096
MAX_ARCHIVE_BYTES = MAX_BUNDLE_BYTES + MAX_BUNDLE_FILES * 2_048 + MIB
"""Content at its limit plus tar's headers and padding, so that no archive of ours is ever refused."""
LARGEST_SHOWN = 5


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """``digest`` is the SHA-256 of ``archive`` and the bundle's name as a blob. ``files`` are relative to ``root``, sorted."""

    archive: bytes
    digest: str
    root: Path
    files: tuple[str, ...]


def pack(contents: Mapping[str, bytes]) -> bytes:
    """Return the archive of these files: equal contents give equal bytes, whatever their order, owner or times.

    Raises ``InvalidRequest`` for a path that is not a clean relative one, ``LimitExceeded`` over ``MAX_BUNDLE_BYTES``
    or ``MAX_BUNDLE_FILES``.
    """
    check_sizes({path: len(content) for path, content in contents.items()})
    for path in contents:
        _check_path(path)
    _check_tree(contents)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(contents):
            member = tarfile.TarInfo(path)
            member.size = len(contents[path])
            member.mode = 0o444
            tar.addfile(member, io.BytesIO(contents[path]))
    return out.getvalue()


def archive_digest(archive: bytes) -> str:
    return hashlib.sha256(archive).hexdigest()


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raise ``LimitExceeded`` naming the largest files if these are too much for one bundle."""
    if len(sizes) > MAX_BUNDLE_FILES:
        raise LimitExceeded(
            f"the code bundle would have {len(sizes)} files; {MAX_BUNDLE_FILES} are allowed (MAX_BUNDLE_FILES)",
            field="bundle",
            hint="install large packages in the worker's environment instead of keeping them beside the script",
        )
    total = sum(sizes.values())
    if total <= MAX_BUNDLE_BYTES:
        return
    largest = sorted(sizes, key=lambda path: (-sizes[path], path))[:LARGEST_SHOWN]
    listed = ", ".join(f"{path} ({sizes[path] / MIB:.1f} MiB)" for path in largest)
    raise LimitExceeded(
        f"the code bundle would have {total / MIB:.1f} MiB; {MAX_BUNDLE_BYTES // MIB} MiB are allowed "
        f"(MAX_BUNDLE_BYTES). Largest: {listed}",
        field="bundle",
        hint="send data as inputs (--input) or grant the directory (--allow-read) instead of bundling it",
    )


def unpack(archive: bytes | Path, into: Path) -> None:
    """Make ``into`` the directory of the archive's files, read-only, complete or not there at all.

    Does nothing if ``into`` exists; several processes may unpack the same archive at once. Nothing outside of ``into``
    is written whatever the archive says: links, devices, absolute paths, ``..`` and paths twice are refused, as is more
    than ``MAX_BUNDLE_BYTES``. Raises ``InvalidRequest`` (``LimitExceeded``) and leaves nothing behind. Not synced to disk.
    """
    if into.is_dir():
        return
    into.parent.mkdir(parents=True, exist_ok=True)
    partial = into.parent / f".{into.name}.{secrets.token_hex(8)}"
    partial.mkdir(mode=0o755)
    try:
        _extract(archive, partial)
        _rename(partial, into)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: Path, into: Path) -> None:
    try:
        partial.rename(into)
    except OSError:
        # Somebody else completed it first, and theirs is as good as ours.
        if not into.is_dir():
            raise


def _extract(archive: bytes | Path, into: Path) -> None:
    seen: dict[str, int] = {}
    try:
        for path, content in _members(archive):
            if path in seen:
                raise InvalidRequest(f"the code bundle has {path!r} twice", field="bundle")
            seen[path] = len(content)
            check_sizes(seen)
            _write(into, path, content)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise InvalidRequest(f"this is not a code bundle: {error}", field="bundle") from error


def _write(into: Path, path: str, content: bytes) -> None:
    target = into / path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            file.write(content)
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidRequest(f"the code bundle has {path!r} as a file and as a directory", field="bundle") from error
    target.chmod(0o444)


def _members(archive: bytes | Path) -> Iterator[tuple[str, bytes]]:
    size = len(archive) if isinstance(archive, bytes) else archive.stat().st_size
    if size > MAX_ARCHIVE_BYTES:
        raise LimitExceeded(f"the code bundle is {size} bytes; {MAX_ARCHIVE_BYTES} are allowed", field="bundle")
    with (
        contextlib.closing(io.BytesIO(archive)) if isinstance(archive, bytes) else archive.open("rb") as source,
        tarfile.open(fileobj=source, mode="r:") as tar,
    ):
        for member in tar:
            yield _read_member(tar, member)


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[str, bytes]:
    _check_path(member.name)
    # A sparse member claims a size that the archive does not have: it is how a small archive fills a disk.
    if member.type not in {tarfile.REGTYPE, tarfile.AREGTYPE} or member.issparse():
        raise InvalidRequest(f"{member.name!r} in the code bundle is not a plain file", field="bundle")
    if member.size > MAX_BUNDLE_BYTES:
        check_sizes({member.name: member.size})
    file = tar.extractfile(member)
    content = file.read() if file else b""
    if len(content) != member.size:
        raise InvalidRequest(f"the code bundle is cut off within {member.name!r}", field="bundle")
    return member.name, content


def _check_path(path: str) -> None:
    clean = posixpath.normpath(path)
    if not path or clean != path or path.startswith(("/", "../")) or path in {".", ".."} or "\0" in path:
        raise InvalidRequest(f"{path!r} cannot be a path in a code bundle", field="bundle")
    try:
        os.fsencode(path.encode("utf-8").decode("utf-8"))
    except UnicodeError as error:
        raise InvalidRequest(f"{path!r} has characters that are not Unicode", field="bundle") from error


def _check_tree(paths: Mapping[str, bytes]) -> None:
    for path in paths:
        parent = posixpath.dirname(path)
        while parent:
            if parent in paths:
                raise InvalidRequest(f"{parent!r} is a file and a directory in the code bundle", field="bundle")
            parent = posixpath.dirname(parent)

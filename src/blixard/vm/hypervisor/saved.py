"""Templates on disk: written whole or not at all, checked before use.

``<template>/memory`` (sparse), ``state``, ``manifest.json``. They are written into a hidden directory beside and renamed; a lock
beside it is held while its writer lives. A crash leaves at most such a directory, which the next writer removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import threading
import uuid
from pathlib import Path
from typing import NoReturn

import msgspec

from blixard.errors import StoreFull, StoreUnavailable
from blixard.storage.locks import FileLock, is_free
from blixard.vm.hypervisor.guest_memory import (
    Descriptors,
    copy_and_hash,
    create_memory,
    reopen,
    seal_memory,
    write_all,
)
from blixard.vm.image.manifest import sync

FORMAT = 2
MEMORY, STATE, MANIFEST = "memory", "state", "manifest.json"
MAX_OPEN_TEMPLATES = 8
"""Templates whose memory is kept at hand: about 120 MB each for the default image. The least recently used goes first."""
MAX_SAVED_TEMPLATES = 16
"""On disk, 2 GB with the default image: images, sizes and versions come and go, and a template is made anew in seconds."""
MAX_STATE_BYTES = 64 * 1024 * 1024
"""Device state without memory is 0.4 MB."""
MAX_MANIFEST_BYTES = 1024 * 1024
_HIDDEN, _LOCK = ".new-", ".lock"


_KEY = re.compile(r"[0-9a-f]{32}")


class CorruptTemplate(Exception):
    """A file is missing, or not what the manifest says."""


class SavedManifest(msgspec.Struct, frozen=True, kw_only=True):
    format: int = FORMAT
    memory_mb: int
    memory_sha256: str
    """As ``copy_and_hash`` tells it."""
    state_sha256: str


class OpenTemplate:
    """A template's content in memory, sealed against change: what was checked is what machines are made of."""

    def __init__(self, memory: int, state: int) -> None:
        """Both descriptors are taken over."""
        self._memory = memory
        self._state = state

    def open_memory(self) -> int:
        """Return a descriptor of the caller's own."""
        return os.dup(self._memory)

    def open_state(self) -> int:
        """Return a descriptor of the caller's own, at the beginning."""
        return reopen(self._state)

    def close(self) -> None:
        if self._memory >= 0:
            os.close(self._memory)
            os.close(self._state)
        self._memory = self._state = -1


class OpenTemplates:
    """Those that this process has read, so that each is read and checked once. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: dict[Path, OpenTemplate] = {}

    def attach(self, directory: Path) -> tuple[int, int] | None:
        """Return descriptors of memory and state, the caller's own; None if it was not opened or is no longer at hand."""
        with self._lock:
            opened = self._opened.pop(directory, None)
            if opened is None:
                return None
            self._opened[directory] = opened
            return opened.open_memory(), opened.open_state()

    def keep(self, directory: Path, opened: OpenTemplate) -> tuple[int, int]:
        """Take it over, in place of an older one; return descriptors as ``attach`` does."""
        with self._lock:
            if (old := self._opened.pop(directory, None)) is not None:
                old.close()
            self._opened[directory] = opened
            while len(self._opened) > MAX_OPEN_TEMPLATES:
                self._opened.pop(next(iter(self._opened))).close()
            return opened.open_memory(), opened.open_state()

    def close(self) -> None:
        with self._lock:
            for opened in self._opened.values():
                opened.close()
            self._opened.clear()


def open_saved(directory: Path, memory_mb: int) -> OpenTemplate:
    """Read a template into memory and check it. Raises ``FileNotFoundError`` if there is none, ``CorruptTemplate``."""
    manifest = _read_manifest(directory)
    if manifest.memory_mb != memory_mb:
        raise CorruptTemplate(f"it has {manifest.memory_mb} MB of memory, not {memory_mb}")
    with Descriptors() as owned:
        try:
            memory = owned.own(_load_memory(directory / MEMORY, manifest))
            state = owned.own(_load_state(directory / STATE, manifest))
        except OSError as error:
            raise CorruptTemplate(str(error)) from error
        owned.pop_all()
    return OpenTemplate(memory, state)


def _read_manifest(directory: Path) -> SavedManifest:
    with (directory / MANIFEST).open("rb") as file:
        text = file.read(MAX_MANIFEST_BYTES)
    try:
        manifest = msgspec.json.decode(text, type=SavedManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptTemplate(f"its manifest cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise CorruptTemplate(f"its manifest has format {manifest.format}, not {FORMAT}")
    return manifest


def _load_memory(path: Path, manifest: SavedManifest) -> int:
    size = manifest.memory_mb << 20
    with Descriptors() as owned:
        source = owned.own(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        if os.fstat(source).st_size != size:
            raise CorruptTemplate(f"its memory has {os.fstat(source).st_size} bytes, not {size}")
        with Descriptors() as made:
            memory = made.own(create_memory(MEMORY, size))
            if copy_and_hash(source, memory) != manifest.memory_sha256:
                raise CorruptTemplate("its memory is not what was saved")
            seal_memory(memory)
            made.pop_all()
    return memory


def _load_state(path: Path, manifest: SavedManifest) -> int:
    with path.open("rb") as file:
        data = file.read(MAX_STATE_BYTES + 1)
    if hashlib.sha256(data).hexdigest() != manifest.state_sha256:
        raise CorruptTemplate("its state is not what was saved")
    return keep_state(data)


def keep_state(data: bytes) -> int:
    with Descriptors() as owned:
        state = owned.own(create_memory(STATE, len(data)))
        write_all(state, 0, data)
        seal_memory(state)
        owned.pop_all()
    return state


def write_saved(directory: Path, memory: int, state: bytes) -> None:
    """Write a template, replacing what stands there; durable when this returns.

    ``memory`` is left as it is. Raises ``StoreFull`` or ``StoreUnavailable``; then nothing has changed.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory.parent)
        _write_beside(directory, memory, state)
    except OSError as error:
        _refuse(directory, error)


def _write_beside(directory: Path, memory: int, state: bytes) -> None:
    hidden = directory.with_name(f"{_HIDDEN}{directory.name}-{uuid.uuid4().hex[:8]}")
    lock = FileLock.create(_lock_of(hidden))
    try:
        hidden.mkdir(mode=0o700)
        _write_files(hidden, memory, state)
        _put_in_place(hidden, directory)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        lock.release(remove=True)


def _lock_of(hidden: Path) -> Path:
    return hidden.with_name(hidden.name + _LOCK)


def _write_files(directory: Path, memory: int, state: bytes) -> None:
    size = os.fstat(memory).st_size
    with (directory / MEMORY).open("wb") as file:
        os.ftruncate(file.fileno(), size)
        checksum = copy_and_hash(memory, file.fileno())
        os.fsync(file.fileno())
    manifest = SavedManifest(
        memory_mb=size >> 20, memory_sha256=checksum, state_sha256=hashlib.sha256(state).hexdigest()
    )
    for name, data in ((STATE, state), (MANIFEST, msgspec.json.encode(manifest))):
        with (directory / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    sync(directory)


def _put_in_place(hidden: Path, directory: Path) -> None:
    if directory.exists():
        old = hidden.with_name(f"{hidden.name}-old")
        directory.rename(old)
        hidden.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    else:
        hidden.rename(directory)
    sync(directory.parent)


def _refuse(directory: Path, error: OSError) -> NoReturn:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        raise StoreFull(
            f"the disk is full: the machine's template cannot be saved in {directory.parent}",
            hint="free some space, or let vm.directory be on another disk",
        ) from error
    raise StoreUnavailable(f"the machine's template cannot be saved in {directory.parent}: {error}") from error


def remove_leftovers(templates: Path) -> int:
    """Remove what dead processes left half-written; return how many there were."""
    hidden = [path for path in templates.glob(f"{_HIDDEN}*") if not path.name.endswith(_LOCK)]
    leftovers = [path for path in hidden if is_free(_lock_of(path))]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    for lock in templates.glob(f"{_HIDDEN}*{_LOCK}"):
        if is_free(lock):
            lock.unlink(missing_ok=True)
    return len(leftovers)


def note_use(directory: Path) -> None:
    """Let ``prune_saved`` know that a template is in use. A place that cannot be written keeps its order."""
    with contextlib.suppress(OSError):
        os.utime(directory / MANIFEST)


def prune_saved(templates: Path, most: int = MAX_SAVED_TEMPLATES) -> int:
    """Remove the templates that were not used for longest, all but ``most``; return how many. Other directories are left alone."""
    used = []
    for path in templates.iterdir():
        with contextlib.suppress(OSError):  # another process is removing it
            if _KEY.fullmatch(path.name):
                used.append(((path / MANIFEST).stat().st_mtime_ns, path))
    oldest = [path for _, path in sorted(used)[: max(0, len(used) - most)]]
    for path in oldest:
        shutil.rmtree(path, ignore_errors=True)
    return len(oldest)

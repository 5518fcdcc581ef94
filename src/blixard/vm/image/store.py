"""Guest images on this machine, by content and by name."""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import shutil
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec

from blixard.errors import ImageNotFound
from blixard.vm.image.guest_image import GuestImage
from blixard.vm.image.manifest import CorruptImage, Manifest, Stamp, check_files, read_manifest, seal, sync
from blixard.vm.image.spec import ImageSpec, check_name, digest_of, is_digest
from blixard.vm.image.tools import BuildStopped

NAMES, PARTS, LOCK = "names.json", "parts", ".lock"
UNFINISHED, DAMAGED = ".building-", ".damaged-"
_TURN_SECONDS = 0.2


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One image in the list. ``damage`` is empty when its files are what was built."""

    digest: str
    names: tuple[str, ...] = ()
    created: str = ""
    size_bytes: int = 0
    spec: ImageSpec | None = None
    contents: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    damage: str = ""


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What ``prune`` removed: images by digest, names, and bytes of the disk."""

    images: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    freed_bytes: int = 0


class ImageStore:
    """Images in ``directory`` (``<vm.directory>/images``), which is made when something is written to it. For any thread.

    An image is whole or not there: what was half built when a process died or the disk was full has no name, and the next
    build or ``prune`` removes it. Nothing here needs a network.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[Path, Stamp] = {}

    def find(self, wanted: str) -> GuestImage:
        """Return the image of this name or digest, its files compared with their checksums.

        The whole files are read the first time, and again when one was changed since. What is damaged is removed and never returned.
        Raises ``ImageNotFound`` that says so, ``Unavailable`` when files cannot be read.
        """
        digest = self.names().get(wanted, wanted)
        if not is_digest(digest):
            raise ImageNotFound(wanted)
        try:
            self._check(self.directory / digest)
        except CorruptImage as damage:
            raise ImageNotFound(wanted, reason=self._discard(self.directory / digest, damage)) from damage
        return GuestImage(name=wanted, digest=digest, directory=self.directory / digest)

    def find_part(self, key: str) -> bool:
        """Return whether what images have in common is there, checked as in ``find``; False if it has to be built."""
        try:
            self._check(self.part_directory(key))
        except CorruptImage as damage:
            self._discard(self.part_directory(key), damage)
            return False
        return True

    def manifest(self, digest: str) -> Manifest | None:
        """Return what an image was made of; None if there is none or its manifest is damaged. Its other files are not looked at."""
        try:
            return read_manifest(self.directory / digest)
        except CorruptImage:
            return None

    def names(self) -> dict[str, str]:
        """Return the digest of each name. A damaged file of names is made again from what the images say of themselves."""
        try:
            return msgspec.json.decode((self.directory / NAMES).read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return {}
        except (msgspec.MsgspecError, UnicodeDecodeError):
            found = sorted(self._manifests(), key=lambda manifest: manifest.created)
            return {manifest.spec.name: manifest.digest for manifest in found}

    def records(self) -> tuple[ImageRecord, ...]:
        """Return every image, newest first, each compared with its checksums; nothing is removed."""
        names = self.names()
        records = (
            self._record(digest, tuple(sorted(n for n, d in names.items() if d == digest)))
            for digest in self._digests()
        )
        return tuple(sorted(records, key=lambda record: (record.created, record.digest), reverse=True))

    def add_name(self, name: str, digest: str) -> None:
        """Let ``name`` mean this image from now on. The caller holds ``lock``."""
        self._write_names({**self.names(), check_name(name): digest})

    def publish(self, made: Path, manifest: Manifest, target: Path) -> None:
        """Give a directory that was made in ``building`` its final name, whole and on the disk. The caller holds ``lock``."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)  # damaged, or it would not have been built again
        seal(made, manifest, target)

    def part_contents(self, key: str) -> dict[str, tuple[str, ...]]:
        """Return what is in a part that ``find_part`` has found. Raises ``CorruptImage``."""
        return read_manifest(self.part_directory(key)).contents

    def part_directory(self, key: str) -> Path:
        return self.directory / PARTS / key

    def prune(self, forget: Collection[str] = (), *, keep: Collection[str] = ()) -> Pruned:
        """Remove images that have no name, parts that no image has, and what interrupted builds left.

        ``forget``: names to remove first. ``keep``: digests that stay, because something still starts machines from them. Running machines
        are not disturbed: they hold their files open. Waits for a running build. Raises ``ImageNotFound`` for an unknown name.
        """
        if not self.directory.is_dir():
            if forget:
                raise ImageNotFound(next(iter(forget)))
            return Pruned()
        with self.lock(threading.Event()):
            names = self.names()
            for name in forget:
                if names.pop(name, None) is None:
                    raise ImageNotFound(name)
            if forget:
                self._write_names(names)
            before = _usage(self.directory)
            gone = tuple(digest for digest in self._digests() if digest not in {*names.values(), *keep})
            for digest in gone:
                self._remove(self.directory / digest)
            self._remove_unused_parts()
            self.remove_leftovers()
            return Pruned(images=gone, names=tuple(forget), freed_bytes=max(0, before - _usage(self.directory)))

    @contextlib.contextmanager
    def lock(self, stop: threading.Event) -> Iterator[None]:
        """Hold the right to build and to remove; one process at a time. Ends by itself with the process. Raises ``BuildStopped``."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / LOCK).open("wb") as file:
            while not _try_lock(file.fileno()):
                if stop.wait(_TURN_SECONDS):
                    raise BuildStopped("the build was stopped while it waited for another one")
            yield

    @contextlib.contextmanager
    def building(self) -> Iterator[Path]:
        """Give an empty directory beside the images; what is still in it at the end is removed. The caller holds ``lock``."""
        made = self.directory / f"{UNFINISHED}{os.urandom(8).hex()}"
        made.mkdir()
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove what interrupted builds and damaged images left. The caller holds ``lock``, so nobody builds."""
        for pattern in (UNFINISHED, DAMAGED):
            for path in self.directory.glob(f"{pattern}*"):
                self._remove(path)

    def _check(self, directory: Path) -> Manifest:
        manifest = read_manifest(directory)
        if digest_of(manifest.inputs) != manifest.digest:
            raise CorruptImage("its manifest does not belong to its digest")
        check_files(directory, manifest, self._known)
        return manifest

    def _discard(self, directory: Path, damage: CorruptImage) -> str:
        """Take a damaged directory out of everybody's way and return why, "" if it never was there."""
        hidden = self.directory / f"{DAMAGED}{os.urandom(8).hex()}"
        try:
            directory.rename(hidden)
        except FileNotFoundError:
            return ""
        shutil.rmtree(hidden)
        return f"it was damaged ({damage}) and has been removed"

    def _record(self, digest: str, names: tuple[str, ...]) -> ImageRecord:
        directory = self.directory / digest
        try:
            manifest = self._check(directory)
        except CorruptImage as damage:
            return ImageRecord(digest=digest, names=names, damage=str(damage), size_bytes=_usage(directory))
        return ImageRecord(
            digest=digest,
            names=names,
            created=manifest.created,
            size_bytes=sum(record.size for record in manifest.files.values()),
            spec=manifest.spec,
            contents=manifest.contents,
        )

    def _digests(self) -> list[str]:
        if not self.directory.is_dir():
            return []
        return sorted(path.name for path in self.directory.iterdir() if is_digest(path.name))

    def _manifests(self) -> list[Manifest]:
        return [manifest for digest in self._digests() if (manifest := self.manifest(digest))]

    def _write_names(self, names: dict[str, str]) -> None:
        fresh = self.directory / f"{UNFINISHED}{NAMES}"
        fresh.write_bytes(msgspec.json.encode(names, order="sorted"))
        sync(fresh)
        fresh.rename(self.directory / NAMES)
        sync(self.directory)

    def _remove_unused_parts(self) -> None:
        used = {key for manifest in self._manifests() for key in manifest.inputs.values()}
        for path in (self.directory / PARTS).glob("*"):
            if path.name not in used:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Remove a file or directory; nobody finds it by its name from the first moment on."""
        hidden = self.directory / f"{DAMAGED}{os.urandom(8).hex()}"
        path.rename(hidden)
        if hidden.is_dir():
            shutil.rmtree(hidden)
        else:
            hidden.unlink()


def now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="microseconds")


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _usage(directory: Path) -> int:
    """Return the bytes of the disk that a tree occupies; a file with two names counts once."""
    files = (path.lstat() for path in directory.rglob("*"))
    return sum({found.st_ino: found.st_blocks * 512 for found in files}.values())

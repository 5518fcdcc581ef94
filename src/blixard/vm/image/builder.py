"""Builds guest images."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from blixard.vm.image.cpio import Entry, write_archive
from blixard.vm.image.debian import fetch_kernel
from blixard.vm.image.guest_code import find_guest_code, init_script
from blixard.vm.image.guest_image import INITRD, KERNEL, MANIFEST, ROOT, GuestImage
from blixard.vm.image.manifest import Manifest, hash_file
from blixard.vm.image.root import build_root
from blixard.vm.image.spec import ImageSpec, hash_parts
from blixard.vm.image.store import ImageStore

VERSION = "1"


class BuildStep(msgspec.Struct, frozen=True):
    """``done`` is a share of the whole, 0 to 1."""

    text: str
    done: float


Progress = Callable[[BuildStep], None]


def ensure_default_image(store: ImageStore, progress: Progress) -> GuestImage:
    """Return the default image of this version of Blixard, built if it is not there."""
    return ImageBuilder(store).build(ImageSpec(), progress)


class ImageBuilder:
    def __init__(self, store: ImageStore) -> None:
        self._store = store

    def build(self, spec: ImageSpec, progress: Progress) -> GuestImage:
        code = find_guest_code()
        digest = hash_parts(VERSION.encode(), spec.inputs(), init_script(), *(part for e in code for part in (e.path.encode(), e.data or b"")))
        found = self._store.open(digest, spec.name)
        if found:
            self._store.name(spec.name, digest)
            return found
        parts = self._store.directory / "parts"
        parts.mkdir(parents=True, exist_ok=True)
        key = hash_parts(VERSION.encode(), spec.inputs())
        part = parts / key
        if not part.exists():
            progress(BuildStep("building the root file system", 0.1))
            self._build_part(spec, part)
        made = Path(tempfile.mkdtemp(prefix=".building-", dir=self._store.directory))
        shutil.copy(part / KERNEL, made / KERNEL)
        os.link(part / ROOT, made / ROOT)
        busybox = Path("/bin/busybox").read_bytes()
        base = write_archive([Entry("bin/busybox", busybox, 0o755), Entry("init", init_script(), 0o755)])
        (made / INITRD).write_bytes(base + (part / "modules.cpio").read_bytes() + write_archive(code))
        manifest = Manifest(digest=digest, spec=spec, inputs={}, contents=msgspec.json.decode((part / "contents.json").read_bytes(), type=dict[str, tuple[str, ...]]), created=dt.datetime.now(dt.UTC).isoformat(), files={name: hash_file(made / name) for name in (KERNEL, INITRD, ROOT)})
        (made / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        made.chmod(0o755)
        made.rename(self._store.directory / digest)
        self._store.name(spec.name, digest)
        image = self._store.open(digest, spec.name)
        assert image
        return image

    def _build_part(self, spec: ImageSpec, part: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=self._store.directory) as name:
            work = Path(name)
            work.chmod(0o755)
            for sub in ("kernel-work", "root-work", "out"):
                (work / sub).mkdir()
            kernel, modules, package = fetch_kernel(spec, work / "kernel-work")
            (work / "out" / KERNEL).write_bytes(kernel)
            (work / "out/modules.cpio").write_bytes(write_archive(modules))
            import blixard
            pins = Path(blixard.__file__).parents[2] / "scripts/constraints.txt"
            contents = build_root(spec, work / "root-work", work / "out" / ROOT, pins)
            (work / "out/contents.json").write_bytes(msgspec.json.encode({**contents, "kernel": (package,)}))
            (work / "out").rename(part)

"""Builds guest images."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from blixard.errors import ImageNotFound
from blixard.vm.image.complaints import disk_full
from blixard.vm.image.guest_image import INITRD, KERNEL, ROOT, GuestImage
from blixard.vm.image.parts import BUSYBOX, MODULES, PartBuilder, publish
from blixard.vm.image.recipe import Recipe
from blixard.vm.image.spec import DEFAULT_NAME, ImageSpec, check_spec
from blixard.vm.image.store import ImageStore

USUAL_STEPS = 12
"""How many steps a build tells of: for the share that is done, which is a guess."""


class BuildStep(msgspec.Struct, frozen=True):
    """``done`` is a guess at the share of the whole, 0 to 1; it never goes back."""

    text: str
    done: float


Progress = Callable[[BuildStep], None]


def ensure_default_image(store: ImageStore, progress: Progress) -> GuestImage:
    """Return the image that every job without a wish gets, built by ``ImageBuilder.build`` if it is not there or out of date."""
    return ensure_image(store, DEFAULT_NAME, progress)


def ensure_image(store: ImageStore, name: str, progress: Progress) -> GuestImage:
    """Return the image of this name with this version's guest code: after an upgrade it is put in, which takes a second or two.

    A digest gives exactly that image. Raises ``ImageNotFound`` and what ``ImageBuilder.build`` raises.
    """
    try:
        image = store.find(name)
    except ImageNotFound:
        if name != DEFAULT_NAME:
            raise
        return ImageBuilder(store).build(ImageSpec(), progress)
    manifest = store.manifest(image.digest)
    if name == image.digest or manifest is None:
        return image
    return ImageBuilder(store).build(msgspec.structs.replace(manifest.spec, name=name), progress)


class ImageBuilder:
    """Builds images into ``store``. ``stop``, when set from another thread, ends a build within seconds.

    ``scratch`` is where a build has its intermediate files, about three times the image; by default memory, if there is plenty, else TMPDIR.
    """

    def __init__(self, store: ImageStore, *, stop: threading.Event | None = None, scratch: Path | None = None) -> None:
        self._store = store
        self._stop = stop or threading.Event()
        self._scratch = scratch

    def build(self, spec: ImageSpec, progress: Progress) -> GuestImage:
        """Return the image of ``spec`` and let its name mean it; build only what is not there. Blocks, for a minute or so.

        ``progress`` is called on other threads, too, one call at a time. When the build fails, is stopped, or its process is killed, no image
        is there that was not whole before, and the name means what it meant. Raises ``InvalidRequest`` (a package or requirement that
        cannot be had), ``NotSupportedHere`` (a program is missing), ``Unavailable`` (no network, disk full), ``BuildStopped``.
        """
        recipe = Recipe(check_spec(spec))
        try:
            return self._find(recipe) or self._build_and_name(recipe, _Meter(progress))
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise disk_full("building the image") from error
            raise

    def _find(self, recipe: Recipe) -> GuestImage | None:
        """Return the image if the name means it already, without a lock and without writing anything."""
        if self._store.names().get(recipe.spec.name) != recipe.digest:
            return None
        try:
            return self._store.find(recipe.spec.name)
        except ImageNotFound:
            return None

    def _build_and_name(self, recipe: Recipe, meter: _Meter) -> GuestImage:
        with self._store.lock(self._stop):
            self._store.remove_leftovers()
            try:
                self._store.find(recipe.digest)
            except ImageNotFound:
                self._build(recipe, meter)
            self._store.add_name(recipe.spec.name, recipe.digest)
            image = self._store.find(recipe.spec.name)
        meter.finish()
        return image

    def _build(self, recipe: Recipe, meter: _Meter) -> None:
        PartBuilder(self._store, recipe, stop=self._stop, scratch=self._scratch, step=meter.step).build()
        meter.step("writing the image")
        boot, root = (self._store.part_directory(key) for key in (recipe.boot_key, recipe.root_key))
        with self._store.building() as made:
            os.link(boot / KERNEL, made / KERNEL)
            os.link(root / ROOT, made / ROOT)
            (made / INITRD).write_bytes(recipe.initrd((boot / MODULES).read_bytes(), (boot / BUSYBOX).read_bytes()))
            contents = self._store.part_contents(recipe.boot_key) | self._store.part_contents(recipe.root_key)
            publish(self._store, made, self._store.directory / recipe.digest, recipe, recipe.inputs, contents)


class _Meter:
    """Counts the steps of a build, whichever thread tells of them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._steps = 0
        self._lock = threading.Lock()

    def step(self, text: str) -> None:
        with self._lock:
            self._progress(BuildStep(text, min(self._steps / USUAL_STEPS, 0.95)))
            self._steps += 1

    def finish(self) -> None:
        with self._lock:
            self._progress(BuildStep("the image is built", 1.0))

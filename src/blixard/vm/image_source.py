"""Guest images as the manager needs them: by name, built or brought up to date when they are first wanted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable

from blixard.vm.image.builder import BuildStep, ensure_image
from blixard.vm.image.guest_image import MANIFEST, GuestImage
from blixard.vm.image.store import NAMES, ImageStore

logger = logging.getLogger(__name__)


def log_step(step: BuildStep) -> None:
    logger.info("guest image: %s", step.text)


class GuestImages:
    """An ``ImageSource`` on the images of this machine. The default image is built where there is none, which takes a minute."""

    def __init__(self, store: ImageStore, progress: Callable[[BuildStep], None] = log_step) -> None:
        self._store = store
        self._progress = progress
        self._lock = asyncio.Lock()
        self._known: dict[str, tuple[object, GuestImage]] = {}

    async def open(self, name: str) -> GuestImage:
        """See ``ImageSource``. Raises also what ``ImageBuilder.build`` raises."""
        known = self._known.get(name)
        if known is not None and known[0] == self._stamp(known[1]):
            return known[1]
        async with self._lock:
            known = self._known.get(name)
            if known is not None and known[0] == self._stamp(known[1]):
                return known[1]
            image = await _in_thread(lambda: ensure_image(self._store, name, self._progress))
            self._known[name] = (self._stamp(image), image)
            return image

    def _stamp(self, image: GuestImage) -> object:
        """What changes when a name means another image, or the image is removed or made anew."""
        found: list[tuple[int, ...]] = []
        for path in (self._store.directory / NAMES, image.directory / MANIFEST):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)  # noqa: PTH116  twice for every machine
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)


async def _in_thread(build: Callable[[], GuestImage]) -> GuestImage:
    """Run it in a thread of its own: a build takes long, and the loop's threads are few."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[GuestImage] = loop.create_future()

    def resolve(result: GuestImage | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            assert result is not None
            future.set_result(result)

    def work() -> None:
        result, error = None, None
        try:
            result = build()
        except BaseException as caught:  # whoever waits gets it
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(resolve, result, error)

    threading.Thread(target=work, name="guest image", daemon=True).start()
    return await future

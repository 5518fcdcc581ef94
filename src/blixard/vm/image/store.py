"""Guest images on this machine, by content and by name."""

from __future__ import annotations

from pathlib import Path

import msgspec

from blixard.errors import ImageNotFound
from blixard.vm.image.guest_image import MANIFEST, GuestImage

NAMES = "names.json"


class ImageStore:
    """``directory`` is ``<vm.directory>/images``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def names(self) -> dict[str, str]:
        try:
            return msgspec.json.decode((self.directory / NAMES).read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return {}

    def name(self, name: str, digest: str) -> None:
        (self.directory / NAMES).write_bytes(msgspec.json.encode({**self.names(), name: digest}))

    def open(self, digest: str, name: str) -> GuestImage | None:
        directory = self.directory / digest
        return GuestImage(name=name, digest=digest, directory=directory) if (directory / MANIFEST).exists() else None

    def find(self, wanted: str) -> GuestImage:
        """Return the image of this name or digest. Raises ``ImageNotFound``."""
        image = self.open(self.names().get(wanted, wanted), wanted)
        if image is None:
            raise ImageNotFound(wanted)
        return image

"""One built guest image on this machine."""

from __future__ import annotations

from pathlib import Path

import msgspec

KERNEL, INITRD, ROOT, MANIFEST = "vmlinuz", "initrd", "root.ext4", "manifest.json"


class GuestImage(msgspec.Struct, frozen=True, kw_only=True):
    """Files that a machine boots from; all read-only, checked against the manifest when the store handed it out.

    ``digest`` is the SHA-256 (hex) of the inputs: equal inputs give the same image.
    """

    name: str
    digest: str
    directory: Path

    @property
    def kernel(self) -> Path:
        return self.directory / KERNEL

    @property
    def initrd(self) -> Path:
        return self.directory / INITRD

    @property
    def root(self) -> Path:
        """An ext4 file system, attached read-only."""
        return self.directory / ROOT

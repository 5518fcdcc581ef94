"""From the inputs of an image to its digest and to its initrd."""

from __future__ import annotations

from functools import cached_property

from blixard.vm.image.cpio import Entry, write_archive
from blixard.vm.image.guest_code import find_guest_code, init_script
from blixard.vm.image.python_packages import our_pins
from blixard.vm.image.spec import ImageSpec, digest_of, digest_of_bytes

VERSION = "3"
"""Of what the builder does with its inputs: a new one makes new images."""


class Recipe:
    """What is known before anything is built: the digests of an image and of the parts that it shares with others.

    A change of our own code in the guest changes the image's digest, but neither part: it makes a new initrd, which takes a second.
    """

    def __init__(self, spec: ImageSpec) -> None:
        self.spec = spec

    @cached_property
    def boot_inputs(self) -> dict[str, str]:
        spec = self.spec
        return {"part": "boot", "version": VERSION, "suite": spec.suite, "mirror": spec.mirror, "as_of": spec.as_of}

    @cached_property
    def root_inputs(self) -> dict[str, str]:
        spec = digest_of_bytes(self.spec.inputs())
        return {"part": "root", "version": VERSION, "spec": spec, "packages": " ".join(our_pins())}

    @cached_property
    def inputs(self) -> dict[str, str]:
        return {
            "version": VERSION,
            "boot": self.boot_key,
            "root": self.root_key,
            "code": digest_of_bytes(self._code),
        }

    @property
    def digest(self) -> str:
        return digest_of(self.inputs)

    @property
    def boot_key(self) -> str:
        return digest_of(self.boot_inputs)

    @property
    def root_key(self) -> str:
        return digest_of(self.root_inputs)

    def initrd(self, modules: bytes, busybox: bytes) -> bytes:
        """Return the guest's first file system: archives one after the other, ours at the end."""
        return write_archive([Entry("bin/busybox", busybox, 0o755)]) + modules + self._code

    @cached_property
    def _code(self) -> bytes:
        return write_archive([Entry("init", init_script(), 0o755), *find_guest_code()])

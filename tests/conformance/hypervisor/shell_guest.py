"""A guest whose agent is a shell: it carries out one line after the other and says ``end STATUS`` after each.

It has the kernel and drivers of the default image, boots in seconds, and knows nothing of Blixard.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from pathlib import Path
from typing import Self

from blixard.vm.hypervisor.contract import Machine
from blixard.vm.image.builder import ensure_default_image
from blixard.vm.image.cpio import Entry, write_archive
from blixard.vm.image.guest_image import INITRD, KERNEL, ROOT, GuestImage
from blixard.vm.image.store import ImageStore

SECONDS = 100.0
"""For anything that a guest does; a loaded machine without KVM is slow."""
INIT = b"""#!/bin/busybox sh
B=/bin/busybox
$B mkdir -p /proc /sys /dev
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs devtmpfs /dev
$B --install -s /bin
export PATH=/bin
while read -r module; do insmod "/modules/$module"; done </modules/order
until port=$(ls /dev/vport* 2>/dev/null); do usleep 10000; done
exec 3<>"$port"
echo ready >&3
while read -r line <&3; do
    eval "$line" >&3 2>&1
    echo "end $?" >&3
done
"""


def cache() -> Path:
    return Path(os.environ.get("BLIXARD_CACHE", Path.home() / ".cache" / "blixard"))


def make_image(directory: Path) -> GuestImage:
    """Put the image's files into ``directory``."""
    default = ensure_default_image(ImageStore(cache() / "vm" / "images"), lambda step: None)
    initrd = default.initrd.read_bytes() + write_archive([Entry("init", INIT, 0o755)])
    (directory / INITRD).write_bytes(initrd)
    for name in (KERNEL, ROOT):
        (directory / name).symlink_to(default.directory / name)
    return GuestImage(name="shell", digest=hashlib.sha256(initrd).hexdigest(), directory=directory)


class Shell:
    """The host's end. ``async with`` it around one conversation."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await self._machine.open_agent()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def read_line(self) -> str:
        async with asyncio.timeout(SECONDS):
            line = await self._reader.readline()
        if not line:
            raise EOFError(f"the port was closed; the console says {self._machine.console!r}")
        return line.decode().rstrip("\n")

    async def send(self, line: str) -> None:
        self._writer.write(line.encode() + b"\n")
        await self._writer.drain()

    async def run(self, line: str) -> str:
        """Return what the line printed."""
        await self.send(line)
        said: list[str] = []
        while not (word := await self.read_line()).startswith("end "):
            said.append(word)
        return "\n".join(said)


async def ready(machine: Machine) -> None:
    async with Shell(machine) as shell:
        said = await shell.read_line()
    assert said == "ready", f"{said!r}: {machine.console}"


async def run(machine: Machine, line: str) -> str:
    async with Shell(machine) as shell:
        return await shell.run(line)

"""Debian packages: where they come from, and the kernel out of them."""

from __future__ import annotations

import lzma
import re
import shutil
from pathlib import Path

from blixard.errors import Unavailable
from blixard.vm.image.cpio import Entry
from blixard.vm.image.spec import ImageSpec
from blixard.vm.image.tools import run_tool

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
MIRROR = "http://deb.debian.org/debian"
SECURITY = "http://deb.debian.org/debian-security"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "overlay", "virtio-rng", "virtio_net")
"""Drivers that the guest loads, beside those that they need themselves."""


def list_sources(spec: ImageSpec) -> list[str]:
    """Return lines for a sources.list."""
    mirror = spec.mirror or MIRROR
    security = spec.mirror.replace("/debian", "/debian-security") if spec.mirror else SECURITY
    return [
        f"deb {mirror} {spec.suite} main",
        f"deb {mirror} {spec.suite}-updates main",
        f"deb {security} {spec.suite}-security main",
    ]


def fetch_kernel(spec: ImageSpec, work: Path) -> tuple[bytes, list[Entry], str]:
    """Download the suite's kernel and return its image, the entries of its modules, and its version."""
    options = _private_apt(spec, work)
    run_tool(["apt-get", *options, "update"])
    shown = run_tool(["apt-cache", *options, "depends", KERNEL_PACKAGE])
    found = re.search(r"Depends: (linux-image-\S+-cloud-amd64)", shown)
    if not found:
        raise Unavailable(f"Debian {spec.suite} has no kernel {KERNEL_PACKAGE}")
    run_tool(["apt-get", *options, "download", found[1]], directory=work)
    package = next(work.glob("linux-image-*.deb"))
    run_tool(["dpkg-deb", "--extract", str(package), str(work / "kernel")])
    version = found[1].removeprefix("linux-image-")
    kernel = (work / f"kernel/boot/vmlinuz-{version}").read_bytes()
    modules = _gather_modules(work / "kernel/lib/modules" / version)
    shutil.rmtree(work / "kernel")
    return kernel, modules, package.name


def _private_apt(spec: ImageSpec, work: Path) -> list[str]:
    """Return options that make apt leave the host's own state alone."""
    for name in ("lists/partial", "archives/partial", "etc/apt.conf.d", "etc/preferences.d", "etc/sources.list.d"):
        (work / name).mkdir(parents=True)
    (work / "status").touch()
    (work / "sources.list").write_text("".join(line.replace("deb ", f"deb [signed-by={KEYRING}] ", 1) + "\n" for line in list_sources(spec)))
    settings = {
        "Dir::Etc::SourceList": work / "sources.list",
        "Dir::Etc::SourceParts": work / "etc/sources.list.d",
        "Dir::State::Lists": work / "lists",
        "Dir::State::Status": work / "status",
        "Dir::Cache": work,
        "Dir::Cache::Archives": work / "archives",
        "APT::Architecture": "amd64",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "",
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def _gather_modules(tree: Path) -> list[Entry]:
    """Return the modules of ``MODULES`` with all they need, and ``modules/order``: in which to load them."""
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in tree.rglob("*.ko*")}
    order: list[str] = []
    contents: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in contents or name not in files:
            return  # what is not a file is built into the kernel
        contents[name] = _read_module(files[name])
        for needed in _needs(contents[name]):
            add(needed)
        order.append(name)

    for name in MODULES:
        add(name.replace("-", "_"))
    entries = [Entry(f"modules/{name}.ko", data) for name, data in contents.items()]
    return [*entries, Entry("modules/order", "".join(f"{name}.ko\n" for name in order).encode())]


def _read_module(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _needs(module: bytes) -> list[str]:
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []

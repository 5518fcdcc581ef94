"""Debian packages: where they come from, and the kernel and busybox out of them."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from blixard.errors import Unavailable
from blixard.vm.image.complaints import explain
from blixard.vm.image.cpio import Entry
from blixard.vm.image.spec import ImageSpec
from blixard.vm.image.tools import ToolFailed, Tools

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR, SECURITY = "http://deb.debian.org/debian", "http://deb.debian.org/debian-security"
KERNEL_PACKAGE, BUSYBOX_PACKAGE = "linux-image-cloud-amd64", "busybox-static"
MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "overlay", "virtio_rng", "virtio_net")
"""Drivers that the guest loads, beside those that they need themselves."""
_SETTINGS = re.compile(
    r'^(Acquire::(?:https?::(?:Proxy|CaInfo|Verify)|Check-)[^ ]*) "(.*)";$', re.MULTILINE | re.IGNORECASE
)
_ENTRY = re.compile(r"^deb(?:\s+\[[^\]]*\])?\s+(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.+)$")


class BootFiles(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest starts with; ``packages`` says where it is from, as "name version"."""

    kernel: bytes
    modules: tuple[Entry, ...]
    """And ``modules/order``: the names in the order in which to load them."""
    busybox: bytes
    packages: tuple[str, ...]


def list_sources(spec: ImageSpec, etc: Path = Path("/etc/apt")) -> list[str]:
    """Return lines for a sources.list: the image's mirror, else what this host uses for the suite, else deb.debian.org."""
    suites = (spec.suite, f"{spec.suite}-updates", f"{spec.suite}-security")
    own = {} if spec.mirror else dict(_host_sources(etc))
    mirror = spec.mirror or own.get(spec.suite, MIRROR)
    security = re.sub(r"/debian/?$", "/debian-security", spec.mirror) if spec.mirror else SECURITY
    uris = (mirror, own.get(suites[1], mirror), own.get(suites[2], security))
    return [f"deb [signed-by={KEYRING}] {uri} {suite} main" for uri, suite in zip(uris, suites, strict=True)]


def _host_sources(etc: Path) -> Iterator[tuple[str, str]]:
    """Yield suite and address of the host's sources that have the component main, the first ones last: they count."""
    for path in reversed([etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]):
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue  # not there, or not for us to read
        yield from reversed(list(_read_stanzas(text) if path.suffix == ".sources" else _read_lines(text)))


def _read_lines(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        found = _ENTRY.match(line.strip())
        if found and "main" in found["components"].split():
            yield found["suite"], found["uri"]


def _read_stanzas(text: str) -> Iterator[tuple[str, str]]:
    for stanza in re.split(r"\n\s*\n", text):
        lines = [line for line in stanza.splitlines() if not line.startswith("#")]
        fields = {name.strip().lower(): value.split() for name, _, value in (line.partition(":") for line in lines)}
        if (
            "deb" in fields.get("types", [])
            and "main" in fields.get("components", [])
            and fields.get("enabled") != ["no"]
        ):
            for suite in fields.get("suites", []):
                yield suite, fields.get("uris", [MIRROR])[0]


def list_settings(tools: Tools) -> list[str]:
    """Return the host's settings of apt that decide how to reach a mirror, as "name value" lines of a configuration."""
    shown = tools.run(["apt-config", "dump", "Acquire"])
    return [f'{name} "{value}";' for name, value in _SETTINGS.findall(shown)]


def fetch_boot_files(spec: ImageSpec, work: Path, tools: Tools) -> BootFiles:
    """Download the suite's kernel and busybox into ``work``, an empty directory. Raises ``Unavailable``, ``NotSupportedHere``."""
    try:
        options = _private_apt(spec, work, tools)
        tools.run(["apt-get", *options, "update", "--error-on=any"])
        shown = tools.run(["apt-cache", *options, "depends", KERNEL_PACKAGE])
        found = re.search(r"Depends: (linux-image-\S+-cloud-amd64)", shown)
        if not found:
            raise Unavailable(f"Debian {spec.suite} has no kernel {KERNEL_PACKAGE}")
        tools.run(["apt-get", *options, "download", found[1], BUSYBOX_PACKAGE], directory=work)
        for package in work.glob("*.deb"):
            tools.run(["dpkg-deb", "--extract", str(package), str(work / "tree")])
    except ToolFailed as failed:
        raise explain(failed, what="fetching the guest's kernel") from failed
    return _read_boot_files(work, found[1].removeprefix("linux-image-"))


def _read_boot_files(work: Path, version: str) -> BootFiles:
    tree = work / "tree"
    modules = next(path for path in (tree / "lib/modules", tree / "usr/lib/modules") if path.is_dir())
    busybox = next(path for path in (tree / "bin/busybox", tree / "usr/bin/busybox") if path.is_file())
    return BootFiles(
        kernel=(tree / f"boot/vmlinuz-{version}").read_bytes(),
        modules=tuple(_gather_modules(modules / version)),
        busybox=busybox.read_bytes(),
        packages=tuple(sorted(" ".join(path.name.split("_")[:2]).replace("%3a", ":") for path in work.glob("*.deb"))),
    )


def _private_apt(spec: ImageSpec, work: Path, tools: Tools) -> list[str]:
    """Return options that make apt leave the host's own state alone."""
    for name in ("lists/partial", "archives/partial", "parts"):
        (work / name).mkdir(parents=True)
    (work / "status").touch()
    (work / "sources.list").write_text("\n".join(list_sources(spec)) + "\n")
    (work / "apt.conf").write_text("\n".join(list_settings(tools)) + "\n")
    settings = {
        "Dir::Etc::SourceList": work / "sources.list",
        "Dir::Etc::SourceParts": work / "parts",
        "Dir::Etc::PreferencesParts": work / "parts",
        "Dir::State": work,
        "Dir::State::Lists": work / "lists",
        "Dir::State::Status": work / "status",
        "Dir::Cache": work,
        "Dir::Cache::Archives": work / "archives",
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def _gather_modules(tree: Path) -> Iterator[Entry]:
    """Yield the modules of ``MODULES`` with all that they need, each after what it needs, and last the file with their order."""
    files = {_module_name(path): path for path in tree.rglob("*.ko*")}
    order: list[str] = []
    for name in MODULES:
        for module in _with_needed(name, files):
            if module not in order:
                order.append(module)
    for name in order:
        yield Entry(f"modules/{name}.ko", _read_module(files[name]))
    yield Entry("modules/order", "".join(f"{name}.ko\n" for name in order).encode())


def _with_needed(name: str, files: dict[str, Path]) -> list[str]:
    if name not in files:
        return []  # what is not a file is built into the kernel
    found = re.search(rb"\0depends=([^\0]*)\0", _read_module(files[name]))
    needed = [need.replace("-", "_") for need in found[1].decode().split(",") if need] if found else []
    return [*(module for need in needed for module in _with_needed(need, files)), name]


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _read_module(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data

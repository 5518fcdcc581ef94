"""Where Debian packages come from, and which drivers the guest gets."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from blixard.vm.image.debian import KEYRING, MODULES, _gather_modules, list_sources
from blixard.vm.image.spec import ImageSpec

STANZAS = """\
Types: deb deb-src
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main
"""
LINES = """\
# deb http://old.example/debian bookworm main
deb [arch=amd64 signed-by=/k.gpg] http://line.example/debian bookworm main non-free
deb http://packages.example/apt cloud-sdk-bookworm main
deb-src http://line.example/debian bookworm main
"""


def uris(sources: list[str]) -> list[str]:
    assert all(source.startswith(f"deb [signed-by={KEYRING}] ") and source.endswith(" main") for source in sources)
    return [source.split()[2] for source in sources]


def write(etc: Path, name: str, text: str) -> None:
    path = etc / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_anything_debian_itself_is_asked(tmp_path: Path) -> None:
    debian, security = "http://deb.debian.org/debian", "http://deb.debian.org/debian-security"
    assert uris(list_sources(ImageSpec(), tmp_path)) == [debian, debian, security]


def test_the_mirrors_of_this_host_are_used(tmp_path: Path) -> None:
    write(tmp_path, "sources.list.d/debian.sources", STANZAS)
    mirror, security = "http://mirror.example/debian", "http://mirror.example/security"
    assert uris(list_sources(ImageSpec(), tmp_path)) == [mirror, mirror, security]


def test_one_line_entries_are_read_and_the_first_file_counts(tmp_path: Path) -> None:
    write(tmp_path, "sources.list", LINES)
    write(tmp_path, "sources.list.d/debian.sources", STANZAS)
    assert uris(list_sources(ImageSpec(), tmp_path)) == [
        "http://line.example/debian",
        "http://mirror.example/debian",
        "http://mirror.example/security",
    ]


def test_sources_of_another_release_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, "sources.list.d/debian.sources", STANZAS)
    assert uris(list_sources(ImageSpec(suite="trixie"), tmp_path))[0] == "http://deb.debian.org/debian"


def test_the_images_own_mirror_comes_first(tmp_path: Path) -> None:
    write(tmp_path, "sources.list.d/debian.sources", STANZAS)
    found = uris(list_sources(ImageSpec(mirror="https://m.example/debian/"), tmp_path))
    assert found == ["https://m.example/debian/", "https://m.example/debian/", "https://m.example/debian-security"]


@pytest.mark.parametrize("packed", [False, True])
def test_modules_come_with_what_they_need_in_the_order_of_loading(tmp_path: Path, packed: bool) -> None:
    needs = {
        "virtio": "virtio_ring",
        "virtio_ring": "",
        "virtio_pci": "virtio_ring,virtio",
        "virtio-rng": "virtio",
        "overlay": "",
        "unused": "",
    }
    for number, (name, needed) in enumerate(needs.items()):
        data = f"\x7fELF\0depends={needed}\0name={name}\0".encode()
        path = tmp_path / f"kernel/{number}/{name}.ko{'.xz' if packed else ''}"
        path.parent.mkdir(parents=True)
        path.write_bytes(lzma.compress(data) if packed else data)
    entries = {entry.path: entry.data or b"" for entry in _gather_modules(tmp_path)}
    order = entries.pop("modules/order").decode().split()
    assert order == ["virtio_ring.ko", "virtio.ko", "virtio_pci.ko", "overlay.ko", "virtio_rng.ko"]
    assert sorted(entries) == sorted(f"modules/{name}" for name in order)
    assert all(data.startswith(b"\x7fELF") for data in entries.values())
    assert "virtio_blk" in MODULES, "what is no file is built into the kernel"

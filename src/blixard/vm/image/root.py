"""The root file system of an image: Debian by mmdebstrap, Python packages by pip, ext4 by mke2fs. Needs no root."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

from blixard.vm.image.cpio import Entry
from blixard.vm.image.debian import list_sources
from blixard.vm.image.spec import GUEST_PYTHON, ImageSpec, canonical_requirements
from blixard.vm.image.tools import run_tool

EPOCH = 1_700_000_000
"""Date of everything that has none of its own."""
BASE_PACKAGES = ("python3", "ca-certificates")
AGENT_PACKAGES = ("msgspec", "wasmtime")
SITE = "opt/blixard/site-packages"
JOB_ID = 1000
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (36, 35, 34, 31, 28, 27, 24, 17, 12, 5)) + (
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "any",
)
BLOCK = 4096
NOT_NEEDED = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/lintian/*", "/var/cache/debconf/*-old")
FEATURES = "^has_journal,^resize_inode,^metadata_csum,^huge_file,sparse_super2"


def build_root(spec: ImageSpec, work: Path, target: Path, pins: Path) -> dict[str, tuple[str, ...]]:
    """Write the root file system to ``target`` and return what is in it. ``work`` is an empty directory for what lies between."""
    python = _install_wheels(spec, work, pins)
    _write_extra(work)
    debian = _run_mmdebstrap(spec, work)
    _make_file_system(spec, work, target)
    return {"debian": debian, "python": python}


def _install_wheels(spec: ImageSpec, work: Path, pins: Path) -> tuple[str, ...]:
    site, user = work / "site", work / "user"
    _pip(spec, site, ["--constraint", str(pins), *AGENT_PACKAGES])
    user.mkdir()
    lines = canonical_requirements(spec.requirements)
    if lines:
        (work / "requirements.txt").write_text("\n".join(lines) + "\n")
        _pip(spec, user, ["--requirement", str(work / "requirements.txt")])
    return tuple(sorted(path.name.removesuffix(".dist-info").replace("-", " ", 1) for path in user.glob("*.dist-info")))


def _pip(spec: ImageSpec, target: Path, what: list[str]) -> None:
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    run_tool(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--only-binary", ":all:",
         "--implementation", "cp", "--python-version", GUEST_PYTHON[spec.suite], *platforms, "--target", str(target), *what]
    )


def _write_extra(work: Path) -> None:
    site = "usr/local/lib/python3/dist-packages"
    files = [
        Entry("etc/hostname", b"guest\n"),
        Entry("etc/hosts", b"127.0.0.1 localhost\n::1 localhost\n"),
        Entry("etc/resolv.conf", b"nameserver 10.0.2.3\n"),
        Entry("etc/machine-id", b""),
    ]
    with tarfile.open(work / "extra.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for entry in files:
            tar.addfile(_member(entry.path, len(entry.data or b"")), io.BytesIO(entry.data or b""))
        _add_tree(tar, work / "site", SITE)
        _add_tree(tar, work / "user", "opt/blixard/user-packages")
        home = _member("home/job", 0)
        home.type, home.mode, home.uid, home.gid = tarfile.DIRTYPE, 0o700, JOB_ID, JOB_ID
        tar.addfile(home)


def _add_tree(tar: tarfile.TarFile, source: Path, target: str) -> None:
    for path in sorted([source, *source.rglob("*")]):
        if path.is_symlink() or not (path.is_file() or path.is_dir()) or path.name == "__pycache__":
            continue
        member = _member(f"{target}/{path.relative_to(source)}".removesuffix("/."), 0)
        if path.is_dir():
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
            continue
        member.size, member.mode = path.stat().st_size, 0o755 if os.access(path, os.X_OK) else 0o644
        with path.open("rb") as file:
            tar.addfile(member, file)


def _member(path: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.size, member.mode, member.mtime = size, 0o644, EPOCH
    return member


def _run_mmdebstrap(spec: ImageSpec, work: Path) -> tuple[str, ...]:
    hooks = [
        f'tar-in "{work}/extra.tar" /',
        f'echo "job:x:{JOB_ID}:{JOB_ID}::/home/job:/bin/bash" >>"$1/etc/passwd"',
        f'echo "job:x:{JOB_ID}:" >>"$1/etc/group"',
        f'echo "job:!:19000::::::" >>"$1/etc/shadow"',
        f'chroot "$1" python3 -m compileall -q --invalidation-mode unchecked-hash /{SITE} /opt/blixard/user-packages >/dev/null || true',
        'rm -rf "$1/var/cache/apt" "$1/var/lib/apt/lists" "$1/var/log/"*',
        f'chroot "$1" dpkg-query -W >"{work}/packages"' if os.geteuid() == 0 else f'chroot "$1" dpkg-query -W >"$1/packages" && copy-out /packages "{work}"',
    ]
    include = ",".join(sorted({*BASE_PACKAGES, *spec.packages}))
    run_tool(
        ["mmdebstrap", "--variant=essential", "--format=tar", f"--include={include}",
         *(f"--dpkgopt=path-exclude={pattern}" for pattern in NOT_NEEDED),
         '--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"',
         *(f"--customize-hook={hook}" for hook in hooks),
         spec.suite, str(work / "root.tar"), *list_sources(spec)],
        env={"SOURCE_DATE_EPOCH": str(EPOCH), "TMPDIR": str(work)},
    )
    return tuple(line.replace("\t", " ") for line in (work / "packages").read_text().splitlines())


def _make_file_system(spec: ImageSpec, work: Path, target: Path) -> None:
    blocks, inodes = _measure(work / "root.tar")
    size = max(blocks * BLOCK * 104 // 100 + inodes * 256 + 8 * 1024 * 1024, spec.size_mb * 1024 * 1024)
    tree = work / "tree"
    tree.mkdir()
    script = f'''tar --extract --preserve-permissions --numeric-owner --exclude="./dev/*" --file root.tar --directory tree
mke2fs -q -F -t ext4 -b {BLOCK} -m 0 -O {FEATURES} -N {inodes + 64} -U 6b1f7f4c-0000-4000-8000-000000000000 \\
-E hash_seed=6b1f7f4c-0000-4000-8000-000000000001,root_owner=0:0,lazy_itable_init=0 -d tree "{target}" {size // BLOCK}'''
    argv = ["sh", "-e", "-c", script]
    run_tool(argv if os.geteuid() == 0 else ["fakeroot", *argv], directory=work, env={"E2FSPROGS_FAKE_TIME": str(EPOCH)})


def _measure(archive: Path) -> tuple[int, int]:
    """Return how many blocks and inodes the contents of an archive need."""
    blocks = inodes = 0
    with tarfile.open(archive) as tar:
        for member in _members(tar):
            inodes += 1
            blocks += 1 if member.isdir() else -(-member.size // BLOCK)
    return blocks, inodes


def _members(tar: tarfile.TarFile) -> Iterable[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
        yield member

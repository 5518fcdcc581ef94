"""The root file system of an image: Debian by mmdebstrap, packages from PyPI, ext4 by mke2fs. Nothing of it needs root."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from blixard.vm.image.complaints import explain
from blixard.vm.image.cpio import Entry
from blixard.vm.image.debian import list_settings, list_sources
from blixard.vm.image.ext4 import settle_dates
from blixard.vm.image.python_packages import install_ours, install_required
from blixard.vm.image.spec import GUEST_PYTHON, ImageSpec
from blixard.vm.image.tools import ToolFailed, Tools

EPOCH = 1_700_000_000
"""Date of everything that has none of its own, and of what is newer: the same in every build."""
BASE_PACKAGES = ("ca-certificates", "iproute2", "mount", "procps", "python3", "usr-is-merged")
JOB_USER, JOB_ID = "job", 1000
OUR_SITE = "opt/blixard/site-packages"
UUID, HASH_SEED = "6b1f7f4c-0000-4000-8000-000000000000", "6b1f7f4c-0000-4000-8000-000000000001"
FEATURES = "^has_journal,^resize_inode,^metadata_csum,^huge_file,sparse_super2"
"""Of a file system that is only read: nothing to recover, to grow or to check at each access."""
BLOCK = 4096
SPARE_BYTES = 8 * 1024 * 1024
MODES = ("root", "unshare", "fakechroot")
_STEP_NAMES = {
    "running apt-get update": "reading the list of packages",
    "downloading": "downloading packages",
    "extracting": "unpacking packages",
    "installing": "setting packages up",
    "running special hook: tar-in": "adding what is ours",
    "creating tarball": "packing",
}
_STEPS = re.compile(f"I: ({'|'.join(_STEP_NAMES)})")
_CLEAN = """
rm -rf "$1"/usr/share/doc "$1"/usr/share/man "$1"/usr/share/info "$1"/usr/share/locale "$1"/usr/share/lintian
rm -rf "$1"/var/cache/ldconfig/* "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/*-old
find "$1"/var/log -type f -delete
"""
_COMPILE = """
import compileall, pathlib, py_compile, sys
mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
for path in sys.argv[1:]:
    compileall.compile_dir(path, quiet=2, force=path.startswith("/usr/share"), invalidation_mode=mode)
for path in pathlib.Path("/usr/lib").glob("python3*"):
    for file in path.rglob("*.pyc"):
        with file.open("r+b") as code:
            head = code.read(8)
            if head[4] == 3:
                code.seek(4)
                code.write(b"\\1")
"""
"""Debian's Python marks what it compiles as to be compared with its source at each import. Nothing in an image ever changes.
What Debian's own tools have in /usr/share is compiled by whichever of them comes first, each in its own way."""


def build_root(
    spec: ImageSpec, work: Path, target: Path, tools: Tools, step: Callable[[str], None]
) -> dict[str, tuple[str, ...]]:
    """Write the root file system to ``target`` and return the names and versions of what is in it.

    ``work``: an empty directory for what lies between, about three times as large; other users must be able to enter it. ``step`` is told
    each step that begins. Raises ``InvalidRequest`` for packages that do not exist, ``Unavailable``, ``NotSupportedHere``.
    """
    step("fetching Python packages")
    install_ours(spec, work / "ours", tools)
    python = install_required(spec, work / "required", tools)
    _write_extra(spec, work)
    debian = _install_debian(spec, work, tools, step)
    step("making the file system")
    _make_file_system(spec, work, target, tools)
    return {"debian": debian, "python": python}


def choose_mode(tools: Tools) -> str:
    """Return the way in which mmdebstrap gets a root directory here: as root, in a user namespace, or by pretending."""
    if os.geteuid() == 0:
        return "root" if _works(tools, ["unshare", "--mount", "--propagation", "unchanged", "true"]) else "fakechroot"
    return "unshare" if _works(tools, ["unshare", "--user", "--map-auto", "--map-root-user", "true"]) else "fakechroot"


def _works(tools: Tools, argv: list[str]) -> bool:
    try:
        tools.run(argv)
    except ToolFailed:
        return False
    return True


def _write_extra(spec: ImageSpec, work: Path) -> None:
    """Write the archive of what is put on top of Debian."""
    files = [
        Entry("etc/hostname", b"guest\n"),
        Entry("etc/hosts", b"127.0.0.1 localhost guest\n::1 localhost\n"),
        Entry("etc/resolv.conf", b"nameserver 10.0.2.3\n"),  # of QEMU's user-mode network
        Entry("etc/machine-id", b""),
        Entry("opt/blixard/compile.py", _COMPILE.encode()),
    ]
    with tarfile.open(work / "extra.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for entry in files:
            tar.addfile(_member(entry.path, len(entry.data or b"")), io.BytesIO(entry.data or b""))
        _add_tree(tar, work / "ours", OUR_SITE)
        _add_tree(tar, work / "required/bin", "usr/local/bin")
        _add_tree(tar, work / "required", _site_packages(spec), without="bin")
        home = _member(f"home/{JOB_USER}", 0)
        home.type, home.mode, home.uid, home.gid = tarfile.DIRTYPE, 0o700, JOB_ID, JOB_ID
        tar.addfile(home)


def _site_packages(spec: ImageSpec) -> str:
    return f"usr/local/lib/python{GUEST_PYTHON[spec.suite]}/dist-packages"


def _add_tree(tar: tarfile.TarFile, source: Path, target: str, *, without: str = "") -> None:
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        if path.is_symlink() or "__pycache__" in inner.parts or inner.parts[0] == without:
            continue
        member = _member(f"{target}/{inner}", 0)
        if path.is_dir():
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        elif path.is_file():
            member.size = path.stat().st_size
            member.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            with path.open("rb") as file:
                tar.addfile(member, file)


def _member(path: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.size, member.mode, member.mtime = size, 0o644, EPOCH
    return member


def _install_debian(spec: ImageSpec, work: Path, tools: Tools, step: Callable[[str], None]) -> tuple[str, ...]:
    def watch(line: str) -> None:
        if found := _STEPS.match(line):
            step(f"Debian: {_STEP_NAMES[found[1]]}")

    settings = [*list_settings(tools), 'Acquire::Languages "none";', 'APT::Install-Recommends "false";']
    (work / "apt.conf").write_text("\n".join(settings) + "\n")
    try:
        tools.run(
            [
                *(
                    "mmdebstrap",
                    f"--mode={choose_mode(tools)}",
                    "--variant=custom",
                    "--format=tar",
                    "--architectures=amd64",
                ),
                *("--include=?essential", f"--include={','.join(sorted({*BASE_PACKAGES, *spec.packages}))}"),
                # Merged from the start, else a package comes along that brings all of Perl to merge it later.
                "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
                f"--aptopt={work / 'apt.conf'}",
                *(f"--customize-hook={hook}" for hook in _list_hooks(spec, work)),
                *(spec.suite, str(work / "root.tar"), *list_sources(spec)),
            ],
            env={"SOURCE_DATE_EPOCH": str(EPOCH), "TMPDIR": str(work)},
            watch=watch,
        )
    except ToolFailed as failed:
        raise explain(failed, what="installing Debian packages") from failed
    return tuple(line.replace("\t", " ") for line in (work / "packages").read_text().splitlines())


def _list_hooks(spec: ImageSpec, work: Path) -> list[str]:
    """Return what mmdebstrap does at the end: in words of its own, or of a shell whose $1 is the new root directory."""
    compiled = f"/{OUR_SITE} /{_site_packages(spec)} /usr/lib/python3/dist-packages /usr/share/python3"
    return [
        f"tar-in {work}/extra.tar /",
        f'echo "{JOB_USER}:x:{JOB_ID}:{JOB_ID}::/home/{JOB_USER}:/bin/bash" >>"$1/etc/passwd"',
        f'echo "{JOB_USER}:x:{JOB_ID}:" >>"$1/etc/group"',
        f'echo "{JOB_USER}:!:19000::::::" >>"$1/etc/shadow"',
        f'chroot "$1" python3 /opt/blixard/compile.py {compiled}',
        'rm "$1/opt/blixard/compile.py"',
        'chroot "$1" dpkg-query --show >"$1/packages"',
        f"download /packages {work}/packages",
        'rm "$1/packages"',
        _CLEAN,
    ]


def _make_file_system(spec: ImageSpec, work: Path, target: Path, tools: Tools) -> None:
    blocks, inodes = _measure(work / "root.tar")
    contents = blocks * BLOCK * 103 // 100 + inodes * 256 + SPARE_BYTES
    size = max(contents, spec.size_mb * 1024 * 1024) // BLOCK
    (work / "tree").mkdir()
    # Unpacked and read under one fakeroot, which knows whose each file is where this process may not say so.
    script = (
        'tar --extract --preserve-permissions --numeric-owner --exclude="./dev/*" --file=root.tar --directory=tree && '
        f"mke2fs -q -F -t ext4 -b {BLOCK} -m 0 -O {FEATURES} -N {inodes + 64} -U {UUID} "
        f'-E hash_seed={HASH_SEED},root_owner=0:0,lazy_itable_init=0 -d tree "$1" {size}'
    )
    command = ["sh", "-e", "-c", script, "sh", str(target)]
    try:
        tools.run(
            command if os.geteuid() == 0 else ["fakeroot", *command],
            directory=work,
            env={"E2FSPROGS_FAKE_TIME": str(EPOCH)},
        )
    except ToolFailed as failed:
        raise explain(failed, what="making the root file system") from failed
    settle_dates(target)


def _measure(archive: Path) -> tuple[int, int]:
    """Return how many blocks and inodes the contents of an archive need."""
    blocks = inodes = 0
    with tarfile.open(archive) as tar:
        for member in _members(tar):
            inodes += 1
            blocks += -(-member.size // BLOCK) or int(member.isdir())
    return blocks, inodes


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        yield member

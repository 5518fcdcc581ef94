"""The same files make the same file system, whenever and wherever they were written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from blixard.errors import InternalError
from blixard.vm.image.ext4 import settle_dates
from blixard.vm.image.root import BLOCK, EPOCH, FEATURES, HASH_SEED, UUID
from blixard.vm.image.tools import find_program


def make(tree: Path, target: Path, features: str = FEATURES) -> None:
    words = [
        *(find_program("mke2fs"), "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-O", features, "-U", UUID),
        *("-E", f"hash_seed={HASH_SEED},root_owner=0:0", "-d", str(tree), str(target), "4096"),
    ]
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, "E2FSPROGS_FAKE_TIME": str(EPOCH)})


def fill(tree: Path, names: list[str], read_at: int) -> None:
    for name in names:
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        os.utime(path, (read_at, EPOCH + 7))
    for directory in [tree, *(path for path in tree.rglob("*") if path.is_dir())]:
        os.utime(directory, (EPOCH, EPOCH))


def test_equal_trees_are_equal_file_systems(tmp_path: Path) -> None:
    names = [f"d{n % 3}/file{n}" for n in range(50)]
    for read_at, (name, order) in enumerate((("one", names), ("two", names[::-1])), EPOCH):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, order, read_at)
        make(tmp_path / name, tmp_path / f"{name}.ext4")
    one, two = tmp_path / "one.ext4", tmp_path / "two.ext4"
    assert one.read_bytes() != two.read_bytes(), "else there is nothing to settle"
    settle_dates(one)
    settle_dates(two)
    assert one.read_bytes() == two.read_bytes()
    subprocess.run([find_program("e2fsck"), "-fn", str(one)], check=True, capture_output=True)
    shown = subprocess.run(
        [find_program("debugfs"), "-R", "stat d1/file1", str(one)], check=True, capture_output=True, text=True
    )
    dates = {
        line.split("0x")[1][:8]
        for line in shown.stdout.splitlines()
        if line.strip().startswith(("ctime", "atime", "mtime"))
    }
    assert dates == {f"{EPOCH + 7:08x}"}


def test_a_file_system_with_checksums_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    make(tmp_path / "tree", tmp_path / "image", "metadata_csum")
    before = (tmp_path / "image").read_bytes()
    with pytest.raises(InternalError):
        settle_dates(tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == before


def test_what_is_no_file_system_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\0" * 10_000)
    with pytest.raises(InternalError):
        settle_dates(tmp_path / "image")

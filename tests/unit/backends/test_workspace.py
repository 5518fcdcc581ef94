from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from blixard.backends.executor.traces import CLOCK_NANOSECONDS, Directories
from blixard.backends.workspace import empty_directory, make_directory, place_inputs, remove_tree
from blixard.backends.zygote.messages import InputPlace


def test_a_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    make_directory(str(tmp_path / "d"), ("work", "home"))
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["home", "work"]
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o700


def test_inputs_are_read_only_copies(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"data")
    place_inputs(str(tmp_path), [InputPlace(str(tmp_path / "blob"), "a/b/c.txt")])
    placed = tmp_path / "a" / "b" / "c.txt"
    assert placed.read_bytes() == b"data"
    assert placed.stat().st_mode & 0o777 == 0o444
    assert placed.stat().st_ino != (tmp_path / "blob").stat().st_ino
    with pytest.raises(ValueError, match="/etc/passwd"):
        place_inputs(str(tmp_path), [InputPlace(str(tmp_path / "blob"), "/etc/passwd")])


def test_emptying_follows_no_link_and_minds_no_mode(tmp_path: Path) -> None:
    kept, work = tmp_path / "kept", tmp_path / "work"
    for path in (kept, work, work / "locked", work / "locked" / "deep"):
        path.mkdir()
    (kept / "file").touch()
    (work / "link").symlink_to(kept)
    (work / "locked" / "link").symlink_to(kept)
    (work / "locked" / "deep").chmod(0)
    (work / "locked").chmod(0)
    empty_directory(str(work))
    assert list(work.iterdir()) == []
    assert (kept / "file").exists()
    remove_tree(str(work))
    remove_tree(str(work))
    assert not work.exists()


def test_directories_are_emptied_whenever_something_was_put_into_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("work", "home")]
    for path in paths:
        path.mkdir()
    monkeypatch.chdir(paths[0])
    directories = Directories(tuple(map(str, paths)))
    for wait in (0, 0, 2 * CLOCK_NANOSECONDS, 2 * CLOCK_NANOSECONDS):
        started = time.time_ns() + wait  # as if so much time had passed since they were last emptied
        (paths[1] / "left").touch()
        os.chdir("/")
        directories.restore(started)
        assert [list(path.iterdir()) for path in paths] == [[], []]
        assert Path.cwd() == paths[0]


def test_a_directory_that_was_replaced_is_entered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    directories = Directories((str(work),))
    directories.restore(time.time_ns())
    work.rmdir()
    work.mkdir()
    directories.restore(time.time_ns())
    assert Path.cwd().stat().st_ino == work.stat().st_ino
    work.rmdir()
    with pytest.raises(FileNotFoundError):
        directories.restore(time.time_ns())

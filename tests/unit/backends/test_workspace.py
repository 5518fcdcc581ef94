from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from blixard.backends.executor.traces import Directories
from blixard.backends.workspace import empty_directory, make_directory, place_inputs, remove_tree
from blixard.backends.zygote.kernel import Watch
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


def refuse_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(paths: tuple[str, ...]) -> Watch:
        raise OSError(errno.EMFILE, f"no more of these for {paths}")

    monkeypatch.setattr("blixard.backends.executor.traces.Watch", refuse)


@pytest.mark.parametrize("has_watch", [True, False])
def test_directories_are_emptied_whenever_something_was_put_into_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_watch: bool
) -> None:
    if not has_watch:
        refuse_watches(monkeypatch)
    paths = [tmp_path / "private" / name for name in ("work", "home")]
    for path in paths:
        path.mkdir(parents=True)
    (paths[0] / "an input").touch()
    (tmp_path / "moved").touch()
    monkeypatch.chdir(paths[0])
    directories = Directories(tuple(map(str, paths)))
    puts: list[Callable[[Path], object]] = [
        lambda path: None,
        lambda path: path.touch(),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("/etc"),
        (tmp_path / "moved").rename,
        os.mkfifo,
        lambda path: path.touch(),
    ]
    for put in puts:
        put(paths[1] / "left")
        os.chdir("/")
        directories.restore()
        assert [list(path.iterdir()) for path in paths] == [[], []]
        assert Path.cwd() == paths[0]
    directories.close()


@pytest.mark.parametrize("has_watch", [True, False])
def test_a_directory_that_was_replaced_is_entered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_watch: bool
) -> None:
    if not has_watch:
        refuse_watches(monkeypatch)
    work = tmp_path / "private" / "work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    directories = Directories((str(work),))
    for replace in (os.rmdir, lambda path: Path(path).rename(tmp_path / "elsewhere")):
        directories.restore()
        replace(work)
        work.mkdir()
        directories.restore()
        assert Path.cwd().stat().st_ino == work.stat().st_ino
        (work / "left").touch()
        directories.restore()
        assert list(work.iterdir()) == []
    work.rmdir()
    with pytest.raises(FileNotFoundError):
        directories.restore()
    directories.close()


def test_a_watch_costs_one_descriptor_however_often_it_begins_again(tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    watch = Watch([str(tmp_path)])
    for number in range(100):
        assert not watch.has_seen_something()
        (tmp_path / str(number)).touch()
        assert watch.has_seen_something()
        watch.begin_again()
    assert psutil.Process().num_fds() == before + 1
    watch.close()
    with pytest.raises(FileNotFoundError):
        Watch([str(tmp_path / "nothing")])
    assert psutil.Process().num_fds() == before

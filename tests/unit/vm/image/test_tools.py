"""Programs of a build: their words are kept, and none outlives it."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from blixard.errors import NotSupportedHere, Unavailable
from blixard.vm.image.tools import MAX_TAIL_BYTES, BuildStopped, ToolFailed, Tools


@pytest.fixture
def tools() -> Tools:
    return Tools(threading.Event())


def is_running(path: Path) -> bool:
    """Say whether the process whose id is in the file is still there; whoever ended waits for its parent as a zombie at most."""
    shown = subprocess.run(
        ["ps", "-o", "stat=", "-p", path.read_text().strip()], capture_output=True, text=True, check=False
    )
    return bool(shown.stdout.strip()) and not shown.stdout.startswith("Z")


def test_what_a_program_says_is_returned_and_told_line_by_line(tools: Tools) -> None:
    lines: list[str] = []
    assert tools.run(["sh", "-c", "echo one; echo two >&2"], watch=lines.append) == "one\ntwo\n"
    assert lines == ["one", "two"]


def test_a_failure_keeps_the_last_words(tools: Tools) -> None:
    with pytest.raises(ToolFailed) as caught:
        tools.run(["sh", "-c", "yes x | head -c 200000; echo; echo the end; exit 3"])
    assert (caught.value.program, caught.value.code) == ("sh", 3)
    assert caught.value.output.endswith("the end\n")
    assert len(caught.value.output) == MAX_TAIL_BYTES


def test_a_program_that_is_not_there_is_named(tools: Tools) -> None:
    with pytest.raises(NotSupportedHere, match="no-such-program"):
        tools.run(["no-such-program"])


def test_what_takes_too_long_is_ended_with_its_children(tools: Tools, tmp_path: Path) -> None:
    child = tmp_path / "child"
    with pytest.raises(Unavailable, match="did not end within"):
        tools.run(["sh", "-c", f"sleep 1000 & echo $! >{child}; wait"], seconds=1)
    assert not is_running(child)


def test_a_stopped_build_starts_nothing_that_stays(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    child = tmp_path / "child"
    with pytest.raises(BuildStopped):
        Tools(threading.Event(), stop).run(["sh", "-c", f"echo $$ >{child}; sleep 1000"])
    assert not child.exists() or not is_running(child)


def test_programs_speak_english_and_read_nothing(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    said = tools.run(["sh", "-c", 'echo "$LC_ALL $GIVEN"; cat'], env={"GIVEN": "x"})
    assert said == "C.UTF-8 x\n"
    assert os.environ["LC_ALL"] == "de_DE.UTF-8"

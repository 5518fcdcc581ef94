from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blixard.errors import StoreFull, StoreUnavailable
from blixard.storage.locks import FileLock
from blixard.vm.hypervisor.guest_memory import CHUNK, Descriptors, create_memory, read_all, write_all
from blixard.vm.hypervisor.saved import (
    FORMAT,
    MANIFEST,
    MAX_OPEN_TEMPLATES,
    MAX_SAVED_TEMPLATES,
    MEMORY,
    STATE,
    CorruptTemplate,
    OpenTemplate,
    OpenTemplates,
    keep_state,
    note_use,
    open_saved,
    prune_saved,
    remove_leftovers,
    write_saved,
)

MB = 8
CONTENT = b"what the guest remembers"
DEVICES = b"what its devices are"


@pytest.fixture
def memory() -> Iterator[int]:
    with Descriptors() as owned:
        descriptor = owned.own(create_memory("test", MB * CHUNK))
        write_all(descriptor, 3 * CHUNK + 17, CONTENT)
        yield descriptor


@pytest.fixture
def saved(memory: int, tmp_path: Path) -> Path:
    write_saved(tmp_path / "template", memory, DEVICES)
    return tmp_path / "template"


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def content_of(opened: OpenTemplate) -> tuple[bytes, bytes]:
    with Descriptors() as owned:
        memory, state = owned.own(opened.open_memory()), owned.own(opened.open_state())
        return read_all(memory, 3 * CHUNK + 17, len(CONTENT)), os.read(state, 1000)


def test_what_was_saved_is_opened(saved: Path) -> None:
    opened = open_saved(saved, MB)
    assert content_of(opened) == (CONTENT, DEVICES)
    assert content_of(opened) == (CONTENT, DEVICES), "the state is read from its beginning each time"
    opened.close()
    opened.close()


def test_only_what_is_not_empty_takes_space(saved: Path) -> None:
    assert (saved / MEMORY).stat().st_size == MB * CHUNK
    assert (saved / MEMORY).stat().st_blocks * 512 <= 2 * CHUNK


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of memory": lambda path: flip(path / MEMORY, 3 * CHUNK + 20),
    "a bit of empty memory": lambda path: flip(path / MEMORY, 7 * CHUNK),
    "a bit of state": lambda path: flip(path / STATE, 2),
    "memory cut off": lambda path: os.truncate(path / MEMORY, 3 * CHUNK),
    "memory grown": lambda path: os.truncate(path / MEMORY, 2 * MB * CHUNK),
    "memory gone": lambda path: (path / MEMORY).unlink(),
    "state gone": lambda path: (path / STATE).unlink(),
    "state empty": lambda path: (path / STATE).write_bytes(b""),
    "manifest empty": lambda path: (path / MANIFEST).write_bytes(b""),
    "manifest of another kind": lambda path: (path / MANIFEST).write_bytes(b"[1]"),
    "manifest of another format": lambda path: (path / MANIFEST).write_bytes(
        (path / MANIFEST).read_bytes().replace(f'"format":{FORMAT}'.encode(), b'"format":0')
    ),
    "manifest of no text": lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_template_is_not_used(damage: str, saved: Path) -> None:
    DAMAGES[damage](saved)
    with pytest.raises(CorruptTemplate):
        open_saved(saved, MB)


def test_a_template_of_another_size_is_not_used(saved: Path) -> None:
    with pytest.raises(CorruptTemplate, match="8 MB"):
        open_saved(saved, 2 * MB)


def test_what_was_opened_does_not_change_with_the_files(saved: Path) -> None:
    opened = open_saved(saved, MB)
    flip(saved / MEMORY, 3 * CHUNK + 20)
    assert content_of(opened) == (CONTENT, DEVICES)
    opened.close()


def test_saving_again_replaces_the_template(saved: Path, memory: int) -> None:
    write_saved(saved, memory, b"newer")
    assert content_of(open_saved(saved, MB)) == (CONTENT, b"newer")
    assert names_in(saved.parent) == [saved.name]


def test_a_place_that_cannot_be_written_is_told(memory: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="cannot be saved"):
        write_saved(tmp_path / "file" / "template", memory, DEVICES)


def test_a_half_written_template_is_removed_and_a_living_writers_is_not(saved: Path) -> None:
    dead, living = saved.parent / ".new-dead-1", saved.parent / ".new-living-2"
    for path in (dead, living):
        path.mkdir()
        (path / MEMORY).write_bytes(b"half")
    lock = FileLock.create(living.with_name(living.name + ".lock"))
    assert remove_leftovers(saved.parent) == 1
    assert not dead.exists()
    assert living.exists()
    lock.release()
    assert remove_leftovers(saved.parent) == 1
    assert names_in(saved.parent) == [saved.name]


PROGRAM = """
import os, sys
from pathlib import Path
from blixard.vm.hypervisor import saved
from blixard.vm.hypervisor.guest_memory import create_memory, write_all
memory = create_memory("test", 8 << 20)
write_all(memory, 0, b"x")
if sys.argv[2] == "hang":
    saved.sync = lambda path: (print("writing", flush=True), sys.stdin.read())
try:
    saved.write_saved(Path(sys.argv[1]), memory, b"x" * 4_000_000)
except saved.StoreFull as error:
    print("full:", error)
"""


def test_a_killed_writer_leaves_no_template(tmp_path: Path) -> None:
    target = tmp_path / "template"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(target), "hang"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        assert not target.exists()
        assert remove_leftovers(tmp_path) == 0, "its writer lives"
        writer.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert remove_leftovers(tmp_path) == 1
    assert names_in(tmp_path) == []


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=1m none "$1" && "$2" -c "$3" "$1/template" write && ls -A "$1"'
    words = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", str(tmp_path), sys.executable, PROGRAM]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.startswith("full: the disk is full")
    assert len(done.stdout.splitlines()) == 1


def test_a_full_disk_is_an_error_of_its_own() -> None:
    assert issubclass(StoreFull, StoreUnavailable)


def test_opened_templates_are_few_and_the_least_used_goes_first(tmp_path: Path) -> None:
    opened = OpenTemplates()

    def keep(number: int) -> None:
        for descriptor in opened.keep(tmp_path / str(number), OpenTemplate(create_memory("x", 1), keep_state(b"x"))):
            os.close(descriptor)

    def has(number: int) -> bool:
        attached = opened.attach(tmp_path / str(number))
        for descriptor in attached or ():
            os.close(descriptor)
        return attached is not None

    before = len(names_in(Path("/proc/self/fd")))
    for number in range(MAX_OPEN_TEMPLATES):
        keep(number)
    assert has(0)
    keep(MAX_OPEN_TEMPLATES)
    assert has(0)
    assert not has(1)
    opened.close()
    opened.close()
    assert not has(0)
    assert len(names_in(Path("/proc/self/fd"))) == before


def test_a_template_that_was_never_there_is_told_apart_from_a_corrupt_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_saved(tmp_path / "none", MB)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        open_saved(tmp_path / "empty", MB)
    shutil.rmtree(tmp_path / "empty")


def test_templates_on_disk_are_few_and_the_least_used_goes_first(tmp_path: Path) -> None:
    names = [f"{number:032x}" for number in range(MAX_SAVED_TEMPLATES + 2)]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).touch()
        os.utime(tmp_path / name / MANIFEST, (number, number))
    for other in ("snapshot-vm-1", ".new-x", "a" * 32):
        (tmp_path / other).mkdir()
    assert prune_saved(tmp_path, MAX_SAVED_TEMPLATES + 2) == 0
    note_use(tmp_path / names[0])
    note_use(tmp_path / "nowhere")
    assert prune_saved(tmp_path) == 2
    assert sorted(names_in(tmp_path)) == sorted([names[0], *names[3:], "snapshot-vm-1", ".new-x", "a" * 32])

"""Causes, tails, orphans, host memory, the memory of a probe."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blixard.errors import NotEnoughMemory, NotSupportedHere
from blixard.storage.locks import FileLock, is_free
from blixard.vm.hypervisor.accelerator import ANSWER, Answer, describe_host, recall, refuse_device, remember
from blixard.vm.hypervisor.causes import explain_end
from blixard.vm.hypervisor.confinement import read_version
from blixard.vm.hypervisor.host_memory import (
    MACHINE_OVERHEAD_MB,
    UNLIMITED,
    available_mb,
    free_in_cgroups,
    require_memory,
)
from blixard.vm.hypervisor.orphans import LOCK, end_orphans
from blixard.vm.hypervisor.tail import MAX_TAIL_BYTES, Tail


@pytest.mark.parametrize(
    ("status", "console", "complaint", "oom_kills", "cause"),
    [
        (0, "", "", 0, "guest shut down"),
        (0, "[ 1.0] Kernel panic - not syncing: sysrq\n", "", 0, "kernel panic: sysrq"),
        (137, "", "", 0, "killed by signal 9"),
        (-9, "", "", 0, "killed by signal 9"),
        (137, "", "", 1, "killed by signal 9: the host ran out of memory"),
        (139, "", "", 1, "killed by signal 11"),
        (159, "", "", 0, "killed by signal 31: QEMU made a forbidden system call"),
        (1, "", "qemu: warning: slow\nqemu: no such disk\n", 0, "QEMU failed: qemu: no such disk"),
        (1, "", "", 0, "QEMU failed: exit code 1"),
    ],
)
def test_an_end_is_explained(status: int, console: str, complaint: str, oom_kills: int, cause: str) -> None:
    assert explain_end(status, console=console, complaint=complaint, oom_kills=oom_kills) == cause


async def test_a_tail_keeps_the_last_words_only() -> None:
    ended = asyncio.Event()
    reading, writing = os.pipe()
    tail = Tail(reading, ended.set)
    flood = b"x" * (10 * MAX_TAIL_BYTES) + b"last\r\n\x1b[2Jwords"
    await asyncio.to_thread(_write_and_close, writing, flood)
    async with asyncio.timeout(60):
        await ended.wait()
    assert tail.closed
    assert tail.text.endswith("last\n[2Jwords"), "no control characters of the guest's reach a terminal"
    assert len(tail.text) <= MAX_TAIL_BYTES


def _write_and_close(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def test_an_orphan_is_known_by_its_lock_and_others_are_left_alone(tmp_path: Path) -> None:
    lock = FileLock.create(tmp_path / "vm-1" / LOCK)
    free = FileLock.create(tmp_path / "vm-2" / LOCK)
    manager_lock = FileLock.create(tmp_path / LOCK)
    sleeper = [sys.executable, "-c", "import signal; signal.pause()"]
    with (
        subprocess.Popen(sleeper, pass_fds=[lock.fd]) as orphan,
        subprocess.Popen(sleeper) as stranger,
        subprocess.Popen(sleeper, pass_fds=[manager_lock.fd]) as manager,
    ):
        lock.release()
        manager_lock.release()
        free.release()
        assert not is_free(lock.path)
        assert end_orphans(tmp_path) == 1
        assert orphan.wait(60) == -signal.SIGKILL
        assert stranger.poll() is None
        assert manager.poll() is None
        stranger.kill()
        manager.kill()
    assert is_free(lock.path)
    assert end_orphans(tmp_path) == 0
    assert end_orphans(tmp_path / "nothing here") == 0


def test_memory_is_refused_with_figures() -> None:
    require_memory(100, 100 + MACHINE_OVERHEAD_MB)
    with pytest.raises(
        NotEnoughMemory, match=f"needs {100 + MACHINE_OVERHEAD_MB} MB .* has {99 + MACHINE_OVERHEAD_MB} MB"
    ):
        require_memory(100, 99 + MACHINE_OVERHEAD_MB)


def test_this_host_has_some_memory() -> None:
    assert 0 < available_mb() < UNLIMITED


def group(place: Path, **files: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name.replace("__", ".")).write_text(text)


def test_the_tightest_cgroup_counts(tmp_path: Path) -> None:
    group(tmp_path, memory__max="max\n", memory__current="1\n", memory__stat="inactive_file 0\n")
    assert free_in_cgroups("0::/a/b\n", tmp_path) == UNLIMITED
    group(
        tmp_path / "a", memory__max=f"{500 << 20}", memory__current=f"{300 << 20}", memory__stat="inactive_file 1048576"
    )
    assert free_in_cgroups("0::/a/b\n", tmp_path) == 201
    group(tmp_path / "a" / "b", memory__max=f"{400 << 20}", memory__current=f"{500 << 20}", memory__stat="x 1\n")
    assert free_in_cgroups("0::/a/b\n", tmp_path) == 0
    assert free_in_cgroups("0::/not/seen/in/a/container\n", tmp_path) == UNLIMITED


def test_the_older_cgroups_count_too(tmp_path: Path) -> None:
    files = {"memory__limit_in_bytes": f"{64 << 20}", "memory__usage_in_bytes": f"{32 << 20}", "memory__stat": ""}
    group(tmp_path / "memory" / "a", **files)
    assert free_in_cgroups("3:cpu,memory:/a\n2:pids:/\n0::/\n", tmp_path) == 32


@pytest.mark.parametrize(
    ("said", "version"), [("QEMU emulator version 7.2.22 (Debian)\n", "7.2.22"), ("version 10.0", "10.0")]
)
def test_qemu_tells_its_version(said: str, version: str) -> None:
    assert read_version(said, "qemu") == version


@pytest.mark.parametrize(
    ("said", "complaint"), [("QEMU emulator version 6.2.0", "is version 6.2, 7.2 is needed"), ("?", "does not tell")]
)
def test_an_older_qemu_is_refused(said: str, complaint: str) -> None:
    with pytest.raises(NotSupportedHere, match=complaint):
        read_version(said, "qemu")


def test_an_answer_holds_for_the_very_host_only(tmp_path: Path) -> None:
    host = describe_host("7.2", "/dev/null")
    assert recall(tmp_path, host) is None
    remember(tmp_path, Answer(host=host, works=False, reason="it hangs"))
    assert recall(tmp_path, host) == Answer(host=host, works=False, reason="it hangs")
    assert recall(tmp_path, describe_host("8.0", "/dev/null")) is None
    assert recall(tmp_path, describe_host("7.2", "/dev/zero")) is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff"])
def test_an_answer_that_cannot_be_read_is_asked_for_anew(damage: bytes, tmp_path: Path) -> None:
    host = describe_host("7.2", "/dev/null")
    (tmp_path / ANSWER).write_bytes(damage)
    assert recall(tmp_path, host) is None


def test_what_is_no_device_is_not_tried(tmp_path: Path) -> None:
    assert refuse_device(str(tmp_path / "kvm")) == f"there is no {tmp_path / 'kvm'}"
    assert refuse_device(str(tmp_path)) == f"{tmp_path} is no device"
    assert refuse_device("/dev/null") is None

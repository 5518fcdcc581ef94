"""The place of one job in the guest: its private directories, its cgroup, and the process that waits there for the order."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Sequence

from blixard.backends.sandbox import kernel
from blixard.vm.guest.runner import PRIVATE, USER_ID, Bind, become_runner

BASE = "/run/blixard"
GROUPS = "/sys/fs/cgroup"
CONTROLLERS = ("memory", "pids", "cpu")
MAX_FILES = 65_536
DEFAULT_DISK_BYTES = 1 << 30
CPU_PERIOD_MICROSECONDS = 100_000
RESERVED_BYTES = 24 << 20
"""Of the guest's memory, kept from a job that names no limit: for the kernel and the agent."""
_MOUNT_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV


class RoomFailed(Exception):
    """The room cannot be made, or not be cleared."""


class Group:
    """A cgroup of this guest. Nothing leaves it, so killing it kills all of a job or program."""

    def __init__(self, name: str) -> None:
        self.directory = f"{GROUPS}/{name}"
        os.mkdir(self.directory, 0o755)

    def write(self, name: str, value: str) -> None:
        with open(f"{self.directory}/{name}", "w", encoding="ascii") as file:
            file.write(value)

    def read(self, name: str) -> str:
        with open(f"{self.directory}/{name}", encoding="ascii") as file:
            return file.read()

    def is_empty(self) -> bool:
        return "populated 0" in self.read("cgroup.events")

    def kill(self) -> None:
        self.write("cgroup.kill", "1")

    def was_out_of_memory(self) -> bool:
        """Say whether the kernel has ended a process of it because the group had too much."""
        words = self.read("memory.events").split()
        return words[words.index("oom_kill") + 1] != "0"

    def remove(self) -> None:
        """Remove the empty group with all that was made in it."""
        for parent, names, _ in os.walk(self.directory, topdown=False):
            for name in names:
                os.rmdir(os.path.join(parent, name))
        os.rmdir(self.directory)


class Room:
    """Make, ``spawn`` once, ``clear``. Its runner inherits nothing of the agent but modules."""

    def __init__(self, number: int) -> None:
        self.directory = f"{BASE}/{number}"
        self.pid = 0
        self.status: int | None = None
        self.descriptors: dict[str, int] = {}
        self.channel: socket.socket | None = None
        self._made: list[str] = []
        os.makedirs(self.directory, exist_ok=True)
        kernel.mount("job", self.directory, "tmpfs", _MOUNT_FLAGS, _options(DEFAULT_DISK_BYTES))
        for name in PRIVATE:
            os.mkdir(f"{self.directory}/{name}", 0o700)
            os.chown(f"{self.directory}/{name}", USER_ID, USER_ID)
        os.mkdir(f"{self.directory}/code", 0o755)
        os.mkdir(f"{self.directory}/binds", 0o755)
        self.group = Group(f"job-{number}")
        self.group.write("memory.max", str(_memory_of_guest() - RESERVED_BYTES))
        self.group.write("memory.oom.group", "1")

    def spawn(self, binds: Sequence[Bind] = ()) -> None:
        """Fork the process that waits for the order. Raises ``OSError``."""
        self._make_places(binds)
        stdin, our_stdin = os.pipe2(os.O_CLOEXEC)
        our_stdout, stdout = os.pipe2(os.O_CLOEXEC)
        our_stderr, stderr = os.pipe2(os.O_CLOEXEC)
        self.channel, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs = (stdin, stdout, stderr, channel.detach())
        self.pid = os.fork()
        if self.pid == 0:
            become_runner(self.directory, self.group.directory, theirs, binds)
        for descriptor in theirs:
            os.close(descriptor)
        self.descriptors = {"stdin": our_stdin, "stdout": our_stdout, "stderr": our_stderr}
        for descriptor in self.descriptors.values():
            os.set_blocking(descriptor, False)

    def limit(self, limits: dict[str, float | None], bytes_of_files: int) -> None:
        """Set the limits of the job that is about to run. Raises ``OSError``."""
        if limits["memory"] is not None:
            self.group.write("memory.max", str(int(limits["memory"])))
        self.group.write("pids.max", str(int(limits["processes"] or 1)))
        if limits["cpus"] is not None:
            share = max(1000, int(limits["cpus"] * CPU_PERIOD_MICROSECONDS))
            self.group.write("cpu.max", f"{share} {CPU_PERIOD_MICROSECONDS}")
        disk = int(limits["disk"] or 0) + bytes_of_files
        if disk != DEFAULT_DISK_BYTES:
            kernel.mount(None, self.directory, None, kernel.MS_REMOUNT | _MOUNT_FLAGS, _options(disk))
        count = int(limits["open_files"] or 1)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (count, count))

    def set_status(self, status: int) -> None:
        self.status = status

    def signal(self, number: int) -> None:
        """Send a signal to the process group of the first process, if there still is one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def clear(self) -> None:
        """Leave nothing. Its processes are gone. Raises ``OSError``."""
        self.group.remove()
        kernel.unmount(self.directory)
        os.rmdir(self.directory)
        for path in reversed(self._made):
            with contextlib.suppress(OSError):  # it holds what another job's place is in
                os.rmdir(path) if os.path.isdir(path) else os.unlink(path)

    def _make_places(self, binds: Sequence[Bind]) -> None:
        """Make sure that there is something to mount over at each path, as the runner will see it."""
        for bind in binds:
            inside = self._inside(bind.path)
            self._make_directories(os.path.dirname(inside))
            if os.path.lexists(inside):
                continue
            if os.path.isdir(bind.source):
                os.mkdir(inside, 0o755)
            else:
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            self._made.append(inside)

    def _inside(self, path: str) -> str:
        """Return where a path of the job is for the agent: places of the room lie in it."""
        for name, place in (("work", "/work"), ("home", "/home/job"), ("tmp", "/tmp")):  # noqa: S108 -- the job's own
            if path == place or path.startswith(place + "/"):
                return f"{self.directory}/{name}{path[len(place) :]}"
        return path

    def _make_directories(self, path: str) -> None:
        missing = []
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for directory in reversed(missing):
            os.mkdir(directory, 0o755)
            self._made.append(directory)


def prepare_guest() -> None:
    """Make what all rooms need: places to mount over, controllers, a user's name."""
    for path in ("/work", "/home/job", "/bundle", BASE):
        os.makedirs(path, exist_ok=True)
    with open(f"{GROUPS}/cgroup.subtree_control", "w", encoding="ascii") as file:
        file.write(" ".join(f"+{name}" for name in CONTROLLERS))
    with open("/etc/passwd", encoding="utf-8") as file:
        is_known = any(line.split(":")[2] == str(USER_ID) for line in file if line.count(":") > 2)
    if not is_known:
        with open("/etc/passwd", "a", encoding="utf-8") as passwd, open("/etc/group", "a", encoding="utf-8") as group:
            passwd.write(f"job:x:{USER_ID}:{USER_ID}::/home/job:/bin/sh\n")
            group.write(f"job:x:{USER_ID}:\n")


def _options(disk: int) -> str:
    return f"size={disk},nr_inodes={MAX_FILES},mode=0755"


def _memory_of_guest() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

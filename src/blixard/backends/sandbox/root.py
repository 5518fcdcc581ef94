"""Builds a sandbox's root: empty but for what the plan names. Runs as the new pid 1, in a mount namespace of its own.

The host's tree stays reachable at ``HOST`` until ``close`` takes it away. Everything of the host is opened without following
symbolic links (the worker has resolved them) and every place inside with the sandbox as root, so no link that a job has
planted in a granted directory leads us astray.
"""

from __future__ import annotations

import errno
import os
import stat

from blixard.backends.sandbox import kernel
from blixard.backends.sandbox.identity import OwnerMaps
from blixard.backends.sandbox.plan import HOME, MAX_FILES, TEMPORARY, WORK, Bind, SandboxPlan

HOST = "/host"
ROOT = "/root"
NO_MAPPED_MOUNTS = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
SHARED_MEMORY = "/dev/shm"  # noqa: S108 -- the sandbox's own
PRIVATE = (WORK, HOME, TEMPORARY, SHARED_MEMORY)
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEVICE_LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
)
MASKED_FILES = (
    *("kcore", "keys", "key-users", "kmsg", "kallsyms", "sysrq-trigger", "timer_list", "sched_debug", "kpagecount"),
    *("kpageflags", "kpagecgroup", "vmallocinfo", "slabinfo", "interrupts", "modules", "iomem", "ioports"),
    *("latency_stats", "timer_stats", "partitions", "config.gz"),
)
MASKED_DIRECTORIES = ("acpi", "asound", "scsi", "bus", "irq", "fs", "driver", "dynamic_debug")
READ_ONLY_DIRECTORIES = ("sys",)
_ATTRIBUTES = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV
_PLAIN = kernel.MS_NOSUID | kernel.MS_NODEV


class RootBuilder:
    """``open`` first, ``add`` any number of times, ``close`` last; each once the one before is done."""

    def __init__(self, maps: OwnerMaps | None) -> None:
        self._maps = maps
        self._bound: list[str] = []
        self._host = self._root = -1
        self._job = (0, 0)

    def open(self, disk: int) -> None:
        """Start an empty root on a tmpfs of ``disk`` bytes and move the host's tree to ``HOST``."""
        kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        options = f"size={disk},nr_inodes={MAX_FILES},mode=755"
        kernel.mount("tmpfs", TEMPORARY, "tmpfs", _PLAIN, options)
        os.chdir(TEMPORARY)
        os.mkdir("host")
        os.mkdir("root", 0o755)
        kernel.pivot_root(".", "host")
        os.chdir("/")
        kernel.mount(ROOT, ROOT, None, kernel.MS_BIND)
        self._host = os.open(HOST, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._root = os.open(ROOT, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def add_system(self, uid: int, gid: int) -> None:
        """Add /dev, /proc and the job's private directories, which belong to ``uid`` and ``gid``."""
        self.add_private(uid, gid)
        self._add_devices()
        self._add_proc()

    def add_private(self, uid: int, gid: int) -> None:
        """Add the directories that the job may write to; they share the root's tmpfs and so its size."""
        self._job = (uid, gid)
        for path in PRIVATE:
            os.makedirs(ROOT + path, exist_ok=True)
            os.chmod(ROOT + path, 0o700)
            os.chown(ROOT + path, uid, gid)
            kernel.mount(ROOT + path, ROOT + path, None, kernel.MS_BIND)

    def add_host_proc(self) -> None:
        """Show the host's /proc, for bubblewrap alone: the kernel lets it mount a new one only if it could see a whole one."""
        self._attach(kernel.open_place(self._host, "proc", 0), "/proc", _ATTRIBUTES, None)

    def add_host_devices(self) -> None:
        """Add what bubblewrap makes a job's /dev of."""
        self._attach_devices()

    def add(self, plan: SandboxPlan) -> None:
        """Add the plan's files, links and binds, outer places before inner ones."""
        for file in plan.files:
            self._write(file.target, file.text)
        for link in plan.links:
            os.makedirs(os.path.dirname(ROOT + link.target), exist_ok=True)
            os.symlink(link.points_to, ROOT + link.target)
        for bind in sorted(plan.binds, key=lambda bind: bind.target.count("/")):
            self._bind(bind)

    def close(self) -> None:
        """Make the root read-only, forget the host's tree and work in ``WORK``."""
        os.close(self._host)
        os.close(self._root)
        remount = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | _PLAIN
        kernel.mount(None, ROOT, None, remount)
        kernel.unmount(HOST)
        os.chdir(ROOT)
        # The base becomes the old root at the same place and is taken off it: nothing but the new root is left.
        kernel.pivot_root(".", ".")
        kernel.unmount(".")
        os.chdir(WORK)

    def _write(self, target: str, text: str) -> None:
        os.makedirs(os.path.dirname(ROOT + target), exist_ok=True)
        with open(ROOT + target, "w", encoding="utf-8") as file:
            file.write(text)

    def _attach_devices(self) -> None:
        for name in DEVICES:
            self._attach(
                kernel.open_place(self._host, f"dev/{name}", 0), f"/dev/{name}", kernel.MOUNT_ATTR_NOSUID, None
            )

    def _add_devices(self) -> None:
        self._attach_devices()
        for name, points_to in DEVICE_LINKS:
            os.symlink(points_to, f"{ROOT}/dev/{name}")
        os.mkdir(f"{ROOT}/dev/pts")
        flags = kernel.MS_NOSUID | kernel.MS_NOEXEC
        kernel.mount("devpts", f"{ROOT}/dev/pts", "devpts", flags, "newinstance,ptmxmode=0666,mode=620")

    def _add_proc(self) -> None:
        os.mkdir(f"{ROOT}/proc")
        kernel.mount("proc", f"{ROOT}/proc", "proc", _PLAIN | kernel.MS_NOEXEC)
        hidden = f"{ROOT}/dev/null"
        for name in MASKED_FILES:
            if os.path.exists(f"{ROOT}/proc/{name}"):
                kernel.mount(hidden, f"{ROOT}/proc/{name}", None, kernel.MS_BIND)
        for name in MASKED_DIRECTORIES:
            if os.path.isdir(f"{ROOT}/proc/{name}"):
                kernel.mount(
                    "tmpfs", f"{ROOT}/proc/{name}", "tmpfs", _PLAIN | kernel.MS_RDONLY, "size=4k,nr_inodes=1,mode=555"
                )
        remount = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | _PLAIN | kernel.MS_NOEXEC
        for name in READ_ONLY_DIRECTORIES:
            place = f"{ROOT}/proc/{name}"
            kernel.mount(place, place, None, kernel.MS_BIND)
            kernel.mount(None, place, None, remount)

    def _bind(self, bind: Bind) -> None:
        source = kernel.open_place(self._host, bind.source.lstrip("/"), kernel.RESOLVE_NO_SYMLINKS)
        attributes = _ATTRIBUTES if bind.writable else _ATTRIBUTES | kernel.MOUNT_ATTR_RDONLY
        self._attach(source, bind.target, attributes, bind.owner)
        self._bound.append(bind.target)

    def _attach(self, source: int, target: str, attributes: int, owner: tuple[int, int] | None) -> None:
        """Mount what is opened as ``source`` at ``target`` and close it."""
        is_directory = stat.S_ISDIR(os.fstat(source).st_mode)
        tree = kernel.clone_mount(source)
        kernel.change_mount(tree, attributes)
        if owner is not None:
            self._show_as_own(tree, owner)
        self._make_place(target, directory=is_directory)
        place = kernel.open_place(self._root, target.lstrip("/"), kernel.RESOLVE_IN_ROOT)
        kernel.attach_mount(tree, place)
        for descriptor in (source, tree, place):
            os.close(descriptor)

    def _show_as_own(self, tree: int, owner: tuple[int, int]) -> None:
        """Where the file system knows no mapped mounts, the file's own permissions decide: less is shown, never more."""
        if self._maps is None:
            return
        try:
            attributes = kernel.MOUNT_ATTR_IDMAP
            kernel.change_mount(tree, attributes, user_namespace=self._maps.descriptor(owner), recursive=False)
        except OSError as error:
            if error.errno not in NO_MAPPED_MOUNTS:
                raise

    def _make_place(self, target: str, *, directory: bool) -> None:
        """Create what to mount on, but never inside a directory of the host that is already shown."""
        if any(target == bound or target.startswith(f"{bound}/") for bound in self._bound):
            return
        self._make_directories(target if directory else os.path.dirname(target))
        if not directory and not os.path.lexists(ROOT + target):
            os.close(os.open(ROOT + target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))

    def _make_directories(self, path: str) -> None:
        """Those below a private directory belong to the job."""
        if os.path.isdir(ROOT + path):
            return
        self._make_directories(os.path.dirname(path))
        os.mkdir(ROOT + path, 0o755)
        if any(path.startswith(f"{private}/") for private in PRIVATE):
            os.chown(ROOT + path, *self._job)

"""What one sandbox looks like: a value that the worker decides on and a fresh process carries out."""

from __future__ import annotations

import msgspec

HOST_NAME = "blixard"
WORK = "/work"
TEMPORARY = "/tmp"  # noqa: S108 -- the sandbox's own
HOME = "/home/job"
CODE = "/bundle"
INSIDE_ID = 1000
"""The user and group that a job sees itself as; which one of the host it really is, ``SandboxPlan.host_uid`` says."""
UNPRIVILEGED_ID = 65534
"""Whom a job of a root worker is on the host: nobody."""
MAX_FILES = 65_536
"""Files and directories in a sandbox's private space: each costs the kernel about 1 KiB that no quota counts."""


class Bind(msgspec.Struct, frozen=True, array_like=True):
    """Show ``source`` of the host (a path without symbolic links) at ``target``; read-only unless ``writable``.

    ``owner``: whoever is (user, group) of the file on the host is the job's own user inside, so that a root worker can
    grant its files to a job that is not root. Only a root worker sets it, and only where the file system can.
    """

    source: str
    target: str
    writable: bool = False
    owner: tuple[int, int] | None = None


class TextFile(msgspec.Struct, frozen=True, array_like=True):
    target: str
    text: str


class Link(msgspec.Struct, frozen=True, array_like=True):
    target: str
    points_to: str


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, and counts of processes and open files.

    ``address_space`` is for hosts without a memory cgroup, ``processors`` (rounded up) for those without a cpu cgroup.
    """

    disk: int
    processes: int
    open_files: int
    address_space: int | None = None
    processors: float | None = None
    cgroups: tuple[str, ...] = ()
    """Directories of cgroups (one per hierarchy) that the sandbox joins before anything of the job runs."""


class BubblewrapCommand(msgspec.Struct, frozen=True, kw_only=True):
    """``program``: bubblewrap's own path on the host. The job: ``argv`` in ``environment``."""

    program: str
    version: tuple[int, int]
    argv: tuple[str, ...]
    environment: dict[str, str]


class SandboxPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All that ``enter`` needs. ``host_uid``/``host_gid``: whom the job runs as on the host; never 0.

    ``moved_library``: our own package lies under the first path on the host and under the second in the sandbox.
    ``command``: the job is run by bubblewrap, within this plan's root.
    """

    binds: tuple[Bind, ...]
    limits: Limits
    host_uid: int
    host_gid: int
    links: tuple[Link, ...] = ()
    files: tuple[TextFile, ...] = ()
    network: bool = False
    seccomp: bytes
    moved_library: tuple[str, str] | None = None
    command: BubblewrapCommand | None = None

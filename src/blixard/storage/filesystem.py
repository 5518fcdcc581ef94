"""What must be known of the file system below a data directory, and how files become durable on it."""

from __future__ import annotations

import os
from pathlib import Path

from blixard.errors import StoreUnavailable

_MOUNTS = Path("/proc/self/mountinfo")
NETWORK_TYPES = frozenset(
    {
        "9p",
        "afp",
        "afs",
        "afpfs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "davfs",
        "fhgfs",
        "gfs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncp",
        "ncpfs",
        "nfs",
        "nfs3",
        "nfs4",
        "ocfs2",
        "pvfs2",
        "smb2",
        "smb3",
        "smbfs",
    }
)
LOCAL_FUSE_TYPES = frozenset(
    {
        "fuseblk",
        "fuse.ntfs",
        "fuse.ntfs-3g",
        "fuse.exfat",
        "fuse.fuse-overlayfs",
        "fuse.mergerfs",
        "fuse.gocryptfs",
        "fuse.encfs",
        "fuse.bindfs",
        "fuse.lxcfs",
    }
)


def check_local(path: Path, mounts: str | None = None) -> None:
    """Refuse network file systems, whose locks and shared memory SQLite cannot rely on. Raises ``StoreUnavailable``.

    Of FUSE only the known local ones are accepted: what stands behind an unknown one cannot be seen from here.
    ``mounts``: text in the form of /proc/self/mountinfo instead of this machine's.
    """
    kind = filesystem_type(path, _read_mounts() if mounts is None else mounts)
    fuse = kind == "fuse" or kind.startswith("fuse.")
    if kind in NETWORK_TYPES or (fuse and kind not in LOCAL_FUSE_TYPES):
        raise StoreUnavailable(
            f"{path} is on a network file system ({kind}), where a database can be damaged",
            hint="choose a data directory on a local disk: set BLIXARD_STORAGE__DATA_DIR",
        )


def filesystem_type(path: Path, mounts: str) -> str:
    """Return the type of the file system that holds ``path`` (which need not exist), or an empty string if it is not known."""
    wanted = Path(os.path.realpath(path))
    best, kind = -1, ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        mount = Path(_unescape(fields[4]))
        if len(mount.parts) >= best and wanted.is_relative_to(mount):  # >=: the last mount of a place hides the earlier
            best, kind = len(mount.parts), after.split(" ")[0]
    return kind


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _read_mounts() -> str:
    """Return this machine's mounts, or nothing where there is no such file: then nothing can be told and nothing is refused."""
    return _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape") if _MOUNTS.exists() else ""


def make_private_directory(path: Path) -> None:
    """Create ``path`` and its missing parents, readable by the owner only. Raises ``StoreUnavailable`` saying why not."""
    try:
        # Not mkdir(parents=True): that gives the mode to the last directory only.
        for missing in reversed([each for each in (path, *path.parents) if not each.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreUnavailable(
            f"the data directory {path} cannot be created: {error.strerror}",
            hint="use a directory that you can write: set BLIXARD_STORAGE__DATA_DIR",
        ) from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StoreUnavailable(
            f"the data directory {path} cannot be written",
            hint="make it writable for this user, or set BLIXARD_STORAGE__DATA_DIR",
        )


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: what was created, renamed or removed in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

from __future__ import annotations

from pathlib import Path

import pytest

from blixard.errors import StoreUnavailable
from blixard.storage.filesystem import LOCAL_FUSE_TYPES, NETWORK_TYPES, check_local, filesystem_type

MOUNTS = """22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:25 / /net rw,relatime shared:1 - {kind} server:/export rw
31 30 0:26 / /net/local rw,relatime - xfs /dev/vdb rw
32 22 0:27 / /with\\040space rw - nfs4 server:/x rw
33 22 0:28 / /over rw - nfs4 server:/y rw
34 22 0:29 / /over rw - tmpfs none rw
not a line of mounts
"""


@pytest.mark.parametrize(
    "kind", sorted({*NETWORK_TYPES, "fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse", "fuse.unknown"})
)
def test_network_file_systems_are_refused_with_what_to_do(kind: str) -> None:
    with pytest.raises(StoreUnavailable, match=kind) as caught:
        check_local(Path("/net/some/where/blixard.db"), MOUNTS.format(kind=kind))
    assert "BLIXARD_STORAGE__DATA_DIR" in str(caught.value.hint)


@pytest.mark.parametrize(
    "kind", sorted({*LOCAL_FUSE_TYPES, "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "virtiofs"})
)
def test_local_file_systems_are_accepted(kind: str) -> None:
    check_local(Path("/net/some/where/blixard.db"), MOUNTS.format(kind=kind))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "ext4"),
        ("/net", "nfs"),
        ("/network", "ext4"),
        ("/net/local/x", "xfs"),
        ("/net/locals", "nfs"),
        ("/with space/x", "nfs4"),
        ("/over/x", "tmpfs"),
    ],
)
def test_the_innermost_and_last_mount_counts(path: str, kind: str) -> None:
    assert filesystem_type(Path(path), MOUNTS.format(kind="nfs")) == kind


def test_this_machines_own_temporary_directory_is_known_and_accepted(tmp_path: Path) -> None:
    check_local(tmp_path)
    assert filesystem_type(tmp_path, Path("/proc/self/mountinfo").read_text()) != ""


def test_without_knowledge_of_mounts_nothing_is_refused() -> None:
    check_local(Path("/somewhere"), "")

"""Ends machines whose manager died and did not take them along.

Each QEMU inherits the lock of its machine's directory and holds it to its end. So whoever has that very file open is that machine; a
number that the kernel gave to another process meanwhile is never hit, since the process is held by a handle while it is looked at.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

from blixard.storage.locks import is_free

LOCK = "lock"
END_SECONDS = 10.0


def end_orphans(directory: Path) -> int:
    """Kill every process that holds the lock of a directory in ``directory``; return how many there were when they have ended.

    Not who holds ``directory``'s own, which is its manager.
    """
    locks = [path for path in directory.rglob(LOCK) if path.parent != directory]
    wanted = {_identify(os.stat(path)) for path in locks if not is_free(path)}
    handles = _open_holders(wanted) if wanted else []
    for handle in handles:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    for handle in handles:
        select.select([handle], [], [], END_SECONDS)
        os.close(handle)
    return len(handles)


def _identify(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _open_holders(wanted: set[tuple[int, int]]) -> list[int]:
    """Return handles of all other processes that have one of these files open."""
    handles = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            handle = os.pidfd_open(int(name))
        except OSError:
            continue
        if _holds(int(name), wanted):
            handles.append(handle)
        else:
            os.close(handle)
    return handles


def _holds(pid: int, wanted: set[tuple[int, int]]) -> bool:
    """Another user's processes cannot be looked at, and are none of ours."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for name in names:
        with contextlib.suppress(OSError):
            if _identify(os.stat(f"/proc/{pid}/fd/{name}")) in wanted:
                return True
    return False

"""From what SQLite says to what Blixard raises."""

from __future__ import annotations

import os

import apsw

from blixard.errors import BlixardError, ConstraintFailed, InternalError, OutcomeUnknown, StoreFull, StoreUnavailable

STORE_BROKEN = (
    apsw.FullError,
    apsw.IOError,
    apsw.CorruptError,
    apsw.NotADBError,
    apsw.CantOpenError,
    apsw.ReadOnlyError,
    apsw.PermissionsError,
    apsw.BusyError,
    apsw.LockedError,
    apsw.ProtocolError,
    apsw.NoMemError,
    apsw.NoLFSError,
    apsw.InterruptError,
)
"""What is wrong with the store and not with the statement, so that the next statement would meet it too."""
LEAST_ROOM_BYTES = 64 * 1024
"""What opening a database needs beside the file itself."""
_SYNC_FAILED = {apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC}


def translate_error(error: BaseException, *, path: str, statement: str) -> BlixardError:
    """Return the ``BlixardError`` that says the same as an error that was met in running ``statement`` on the file ``path``."""
    if isinstance(error, BlixardError):
        return error
    if isinstance(error, apsw.ConstraintError):
        return ConstraintFailed(f"{statement}: {error}")
    if isinstance(error, apsw.FullError) or (isinstance(error, STORE_BROKEN) and _is_full(path)):
        return StoreFull(
            f"the disk is full: {path} could not be written", hint="free some space; nothing acknowledged is lost"
        )
    if isinstance(error, STORE_BROKEN):
        return _unavailable(error, path)
    return InternalError(f"the statement {statement!r} failed: {type(error).__name__}: {error}")


def _is_full(path: str) -> bool:
    """Say whether the file's disk has no room: SQLite calls it an I/O error where it cannot make its shared-memory file."""
    try:
        disk = os.statvfs(os.path.dirname(os.path.abspath(path)))  # noqa: PTH100, PTH120 - a string, which may be :memory:
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < LEAST_ROOM_BYTES


def translate_commit_error(error: BaseException, *, path: str) -> BlixardError:
    """Return what a failed COMMIT means to its callers.

    A failed fsync is the one case whose outcome nobody knows: the commit record may already be in the file.
    """
    if isinstance(error, apsw.IOError) and getattr(error, "extendedresult", None) in _SYNC_FAILED:
        return OutcomeUnknown(
            f"the disk failed to sync {path}: {error}", hint="check the disk, then repeat the request"
        )
    return translate_error(error, path=path, statement="commit")


def _unavailable(error: BaseException, path: str) -> StoreUnavailable:
    if isinstance(error, apsw.NotADBError):
        return StoreUnavailable(
            f"{path} is not a Blixard database", hint="move the file away, or use another data directory"
        )
    if isinstance(error, apsw.CorruptError):
        return StoreUnavailable(f"the database {path} is damaged: {error}", hint="restore it from a backup")
    if isinstance(error, apsw.ReadOnlyError | apsw.PermissionsError):
        return StoreUnavailable(
            f"{path} cannot be written: {error}", hint="make it writable, or use another data directory"
        )
    if isinstance(error, apsw.BusyError | apsw.LockedError):
        return StoreUnavailable(
            f"another process has kept {path} locked for too long",
            hint="look for a stopped Blixard process, then try again",
        )
    return StoreUnavailable(
        f"the database {path} cannot be used: {error}", hint="check the disk and the file's permissions"
    )

"""Says which grant was missing when a job ran into the walls of its sandbox. Runs in the worker: a job learns nothing by it."""

from __future__ import annotations

import errno
import os
import re

import msgspec

from blixard.backends.sandbox.layout import is_below
from blixard.backends.sandbox.plan import CODE, HOME, TEMPORARY, WORK
from blixard.domain.grants import Grants
from blixard.domain.outcome import AttemptError

_ERROR_OF_PATH = re.compile(r"\[Errno (?P<number>\d+)\] [^:]*: (?P<quote>['\"])(?P<path>/.*?)(?P=quote)")
_HIDDEN = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR}
_PROTECTED = {errno.EROFS, errno.EACCES, errno.EPERM}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_NO_NETWORK = re.compile(
    r"\[Errno (?:101|113|-2|-3|-5)\]|Network is unreachable|[Nn]ame resolution|Name or service not known|"
    r"nodename nor servname|getaddrinfo failed|No address associated with hostname"
)
_LOCAL_REFUSED = re.compile(r"\[Errno 111\]|Connection refused")
_OWN = (WORK, HOME, CODE, "/dev", "/proc")


def explain_denial(error: AttemptError, grants: Grants) -> AttemptError:
    """Return the error with a hint that names the missing grant, where that can be known; else as it was."""
    if error.hint is not None:
        return error
    text = f"{error.message}\n{(error.traceback or '')[-2000:]}"
    hint = _hint_of_path(text, grants) or (None if grants.network else _hint_of_network(text))
    return error if hint is None else msgspec.structs.replace(error, hint=hint)


def _hint_of_path(text: str, grants: Grants) -> str | None:
    found = _ERROR_OF_PATH.search(text)
    if found is None:
        return None
    number, path = int(found["number"]), os.path.normpath(found["path"])
    if any(is_below(path, own) for own in _OWN):
        return None
    readable = any(is_below(path, granted) for granted in (*grants.read, *grants.write))
    writable = any(is_below(path, granted) for granted in grants.write)
    if readable:
        if number in _PROTECTED and not writable:
            return f"the sandbox lets {path} be read only; grant it with --allow-write {path}"
        return _hint_of_owner(path) if number in _FORBIDDEN else None
    if number == errno.EROFS:
        return (
            f"nothing outside {WORK}, {HOME} and {TEMPORARY} can be written; grant it with --allow-write {_place(path)}"
        )
    if number not in _HIDDEN:
        return None
    if os.path.lexists(path):  # also below /tmp: the job has one of its own, and the file is in the machine's
        return f"the sandbox hides {path}; grant it with --allow-read {path} (or --allow-write {path})"
    parent = os.path.dirname(path)
    if parent not in {"/", TEMPORARY} and os.path.isdir(parent):
        return f"the sandbox hides {parent}; to create files in it, grant it with --allow-write {parent}"
    return None


def _hint_of_owner(path: str) -> str:
    """A granted path keeps its rights. A worker of root does not run jobs as root, which is what surprises."""
    if os.geteuid() != 0:
        return f"{path} is granted, but its own rights forbid this to the user of the worker"
    return (
        f"{path} is granted, but its own rights forbid this: a worker of root runs its jobs as an ordinary user; "
        f"allow others (chmod o+rwX {_place(path)}), or run the worker as the owner of the files"
    )


def _place(path: str) -> str:
    return path if os.path.lexists(path) else os.path.dirname(path)


def _hint_of_network(text: str) -> str | None:
    if _NO_NETWORK.search(text):
        return "the sandbox has no network; grant it with --allow-net"
    if _LOCAL_REFUSED.search(text):
        return (
            "the sandbox has a loopback of its own, without the machine's services; grant the network with --allow-net"
        )
    return None

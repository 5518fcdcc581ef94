"""What of the machine a sandboxed job may touch. Nothing, unless it is named here."""

from __future__ import annotations

import posixpath

import msgspec

from blixard.errors import InvalidRequest


class Grants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Paths are absolute and appear in the sandbox at the same place. They bind to whichever machine runs the job."""

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    network: bool = False


class InputFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A blob that appears as a read-only file at ``path``: relative to the job's working directory, or absolute (sandboxes only)."""

    path: str
    digest: str


def check_grants(grants: Grants) -> None:
    for field in ("read", "write"):
        for path in getattr(grants, field):
            if not path.startswith("/") or posixpath.normpath(path) != path:
                raise InvalidRequest(f"{path!r} is not an absolute path without '..'", field=f"grants.{field}")
            if path == "/":
                raise InvalidRequest(
                    "the whole file system cannot be granted",
                    field=f"grants.{field}",
                    hint="name the directories needed",
                )


def check_input_path(path: str) -> None:
    clean = posixpath.normpath(path)
    if not path or clean != path or clean.startswith("../") or clean in {".", "..", "/"} or "\0" in path:
        raise InvalidRequest(
            f"{path!r} cannot be the place of an input file",
            field="inputs",
            hint="give a path inside the working directory",
        )

"""Which parts of this host every sandbox shows: the system's programs, the interpreter's environment, and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import blixard
from blixard.backends.sandbox.plan import INSIDE_ID, TEMPORARY, WORK, Bind, Link, TextFile
from blixard.errors import NotSupportedHere

SYSTEM = "/usr"
SYSTEM_LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
SYSTEM_FILES = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime", "/nix/store")
"""Not secret, and programs in /usr do not work without them: links among programs, the linker's index, the time zone."""
NETWORK_FILES = (
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/certs",
    "/etc/pki/ca-trust/extracted",
    "/etc/ca-certificates/extracted",
)
RESOLVER = "/etc/resolv.conf"
LIBRARY = "/run/blixard/lib"
"""Where our own package is shown if its place on the host is one that a sandbox uses for itself."""
_PRIVATE = (WORK, TEMPORARY, "/dev", "/proc")
_PASSWD = f"root:x:0:0:root:/:/bin/sh\njob:x:{INSIDE_ID}:{INSIDE_ID}:job:{WORK}:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
_GROUP = f"root:x:0:\njob:x:{INSIDE_ID}:\nnogroup:x:65534:\n"
_HOSTS = "127.0.0.1 localhost blixard\n::1 localhost ip6-localhost\n"


def system_binds() -> Iterator[Bind]:
    yield Bind(SYSTEM, SYSTEM)
    for path in (*SYSTEM_LINKS, *SYSTEM_FILES):
        if os.path.exists(path) and not (path in SYSTEM_LINKS and os.path.islink(path)):
            yield Bind(os.path.realpath(path), path)


def system_links() -> tuple[Link, ...]:
    """Return the host's links such as /bin -> usr/bin, and the one that programs expect for /etc/mtab."""
    links = [Link(path, os.readlink(path)) for path in SYSTEM_LINKS if os.path.islink(path)]
    return (*links, Link("/etc/mtab", "/proc/self/mounts"))


def generated_files(*, network: bool) -> tuple[TextFile, ...]:
    lookup = "files dns" if network else "files"
    files = [
        TextFile("/etc/passwd", _PASSWD),
        TextFile("/etc/group", _GROUP),
        TextFile("/etc/hosts", _HOSTS),
        TextFile("/etc/nsswitch.conf", f"passwd: files\ngroup: files\nhosts: {lookup}\n"),
    ]
    if network and os.path.exists(RESOLVER):
        files.append(TextFile(RESOLVER, Path(RESOLVER).read_text(encoding="utf-8", errors="replace")))
    return tuple(files)


def network_binds() -> Iterator[Bind]:
    for path in NETWORK_FILES:
        if os.path.exists(path):
            yield Bind(os.path.realpath(path), path)


def interpreter_directories() -> list[str]:
    """Return where this interpreter and its packages are, outermost first, without what /usr shows anyway.

    Raises ``NotSupportedHere`` if one of them would show a whole home directory.
    """
    packages = [path for path in sys.path if os.path.basename(path) in {"site-packages", "dist-packages"}]
    wanted = {sys.base_prefix, sys.prefix, sys.base_exec_prefix, sys.exec_prefix, *packages}
    wanted |= {os.path.realpath(path) for path in wanted}
    wanted |= {os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))}
    found = [path for path in outermost(wanted) if os.path.isdir(path)]
    for path in found:
        _refuse_home(path)
    return [path for path in found if not is_below(path, SYSTEM)]


def _refuse_home(path: str) -> None:
    home = os.path.realpath(os.path.expanduser("~"))
    if is_below(home, path) and path != SYSTEM:
        raise NotSupportedHere(
            f"the interpreter's directory {path} holds your home directory, which no sandbox may see",
            hint="install blixard into a virtual environment of its own: python3 -m venv ~/blixard-env",
        )


def outermost(paths: Iterable[str]) -> list[str]:
    """Return the paths that lie in none of the others, sorted."""
    kept: list[str] = []
    for path in sorted(paths):
        if not any(is_below(path, other) for other in kept):
            kept.append(path)
    return kept


def is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def package_directory() -> str:
    return os.path.dirname(os.path.realpath(blixard.__file__))


def library_root() -> str | None:
    """Return the directory for ``sys.path`` under which a sandbox finds our package if that is not the host's."""
    package = package_directory()
    if any(is_below(package, directory) for directory in interpreter_directories()):
        return None
    return LIBRARY if any(is_below(package, private) for private in _PRIVATE) else os.path.dirname(package)


def interpreter_binds() -> Iterator[Bind]:
    for directory in interpreter_directories():
        yield Bind(os.path.realpath(directory), directory)
    root = library_root()
    if root is not None:
        yield Bind(package_directory(), f"{root}/blixard")

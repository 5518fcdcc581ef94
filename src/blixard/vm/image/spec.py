"""What a guest image is made of."""

from __future__ import annotations

import hashlib
import re

import msgspec

from blixard.errors import InvalidRequest, LimitExceeded

DEFAULT_NAME = "default"
DEFAULT_SUITE = "bookworm"
GUEST_PYTHON = {"bookworm": "3.11", "trixie": "3.13"}
"""Debian suites that an image can be made of, and the Python that each brings."""
MAX_PACKAGES = 500
MAX_REQUIREMENTS_BYTES = 64 * 1024
MIN_SIZE_MB, MAX_SIZE_MB = 300, 64 * 1024
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{1,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MIRROR = re.compile(r"https?://[^\s\[\]\"]+")
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_LOCAL = re.compile(r"(?:-r|-c|-e|--requirement|--constraint|--editable|-f|--find-links)\b|[./~]|(?:.*@\s*)?file:")
"""Lines of a requirements.txt that lead to files of this host."""


class ImageSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs of an image. The name is how jobs ask for it and no part of what it is made of."""

    name: str = DEFAULT_NAME
    suite: str = DEFAULT_SUITE
    packages: tuple[str, ...] = ()
    """Debian packages beside those that every image has."""
    requirements: str = ""
    """Text of a requirements.txt: what is installed from PyPI."""
    size_mb: int = 0
    """Size of the root file system; 0: as large as its contents need. Jobs write to memory, not to it."""
    mirror: str = ""
    """Where Debian packages come from; "": where this host gets its own."""
    as_of: str = ""
    """A date. It only makes another image of the same contents: newer packages are fetched."""

    def inputs(self) -> bytes:
        """Return everything but the name in one form: equal inputs give equal bytes."""
        return msgspec.json.encode(
            {
                "as_of": self.as_of,
                "mirror": self.mirror,
                "packages": sorted(set(self.packages)),
                "requirements": canonical_requirements(self.requirements),
                "size_mb": self.size_mb,
                "suite": self.suite,
            },
            order="sorted",
        )


def canonical_requirements(text: str) -> list[str]:
    """Return the lines that mean something, without comments and in order: an option of pip counts for what follows it."""
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in re.sub(r"\\\r?\n", " ", text).splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


def check_spec(spec: ImageSpec) -> ImageSpec:
    """Return ``spec``. Raises ``InvalidRequest`` and ``LimitExceeded`` that name the field."""
    check_name(spec.name)
    if spec.suite not in GUEST_PYTHON:
        known = ", ".join(GUEST_PYTHON)
        raise InvalidRequest(f"no image can be made of Debian {spec.suite!r}", field="suite", hint=f"one of {known}")
    if len(spec.packages) > MAX_PACKAGES:
        raise LimitExceeded(f"{len(spec.packages)} Debian packages, at most {MAX_PACKAGES}", field="packages")
    for package in spec.packages:
        if not _PACKAGE.fullmatch(package):
            raise InvalidRequest(f"{package!r} is not a name of a Debian package", field="packages")
    if len(spec.requirements.encode()) > MAX_REQUIREMENTS_BYTES:
        raise LimitExceeded(f"requirements longer than {MAX_REQUIREMENTS_BYTES:,} bytes", field="requirements")
    for line in canonical_requirements(spec.requirements):
        if _LOCAL.match(line):
            raise InvalidRequest(
                f"an image cannot be made of what is on this machine: {line!r}",
                field="requirements",
                hint="name packages of PyPI or addresses of wheels, so that the same image can be built anywhere",
            )
    if spec.mirror and not _MIRROR.fullmatch(spec.mirror):
        raise InvalidRequest(
            f"{spec.mirror!r} is no address of a mirror", field="mirror", hint="e.g. http://deb.debian.org/debian"
        )
    if spec.as_of and not _DAY.fullmatch(spec.as_of):
        raise InvalidRequest(f"{spec.as_of!r} is no day", field="as_of", hint="e.g. 2026-11-23")
    if spec.size_mb and not MIN_SIZE_MB <= spec.size_mb <= MAX_SIZE_MB:
        raise InvalidRequest(f"an image has {MIN_SIZE_MB} to {MAX_SIZE_MB} MB, not {spec.size_mb}", field="size_mb")
    return spec


def check_name(name: str) -> str:
    """Return ``name`` if an image may be called so: not like a digest, no path. Raises ``InvalidRequest``."""
    if not _NAME.fullmatch(name) or _DIGEST.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} cannot be the name of an image",
            field="name",
            hint="small letters, digits, dot, dash and underscore, at most 63, e.g. data-science",
        )
    return name


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def digest_of(inputs: dict[str, str]) -> str:
    """Return one SHA-256 (hex) of named inputs."""
    return hashlib.sha256(msgspec.json.encode(inputs, order="sorted")).hexdigest()


def digest_of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

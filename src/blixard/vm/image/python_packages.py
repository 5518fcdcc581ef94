"""Packages from PyPI for the guest's Python, fetched by this host's pip as wheels: no code of theirs runs here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path

from blixard.vm.image.complaints import explain, no_pip
from blixard.vm.image.spec import GUEST_PYTHON, ImageSpec, canonical_requirements
from blixard.vm.image.tools import ToolFailed, Tools

OUR_PACKAGES = ("msgspec", "wasmtime")
"""What our own code in the guest imports beside the standard library: in the versions that this host has."""
_GLIBC_MINORS = (36, 35, 34, 33, 32, 31, 28, 27, 26, 24, 17, 12, 5)
"""Every Debian that an image can be made of has glibc 2.36 or newer."""
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in _GLIBC_MINORS),
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"),
)
INTERPRETER = b"#!/usr/bin/python3\n"


def our_pins() -> tuple[str, ...]:
    return tuple(f"{name}=={importlib.metadata.version(name)}" for name in OUR_PACKAGES)


def install_ours(spec: ImageSpec, target: Path, tools: Tools) -> None:
    """Raises ``Unavailable``, ``NotSupportedHere``."""
    _install(spec, target, list(our_pins()), tools, what="fetching the agent's Python packages")


def install_required(spec: ImageSpec, target: Path, tools: Tools) -> tuple[str, ...]:
    """Install what the image's requirements ask for into ``target`` and return it as "name version".

    Raises ``InvalidRequest`` for requirements that cannot be met, ``Unavailable``, ``NotSupportedHere``.
    """
    target.mkdir()
    lines = canonical_requirements(spec.requirements)
    if not lines:
        return ()
    listed = target.with_suffix(".txt")
    listed.write_text("\n".join(lines) + "\n")
    _install(spec, target, ["--requirement", str(listed)], tools, what="installing Python packages")
    _adopt_programs(target / "bin")
    found = (path.name.removesuffix(".dist-info").rpartition("-") for path in target.glob("*.dist-info"))
    return tuple(sorted(f"{name.replace('_', '-')} {version}" for name, _, version in found))


def _install(spec: ImageSpec, target: Path, what_to_install: list[str], tools: Tools, *, what: str) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-compile", "--only-binary", ":all:"]
    python = ["--implementation", "cp", "--python-version", GUEST_PYTHON[spec.suite]]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    try:
        tools.run(
            [*_find_pip(), "install", *options, *python, *platforms, "--target", str(target), *what_to_install],
            env={"PIP_REQUIRE_VIRTUALENV": "0", "PIP_USER": "0", "PIP_ROOT_USER_ACTION": "ignore"},
        )
    except ToolFailed as failed:
        raise explain(failed, what=what) from failed


def _find_pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        if path := shutil.which(name):
            return [path]
    raise no_pip()


def _adopt_programs(directory: Path) -> None:
    """Let the programs that packages bring be run by the guest's Python, not by the one that installed them."""
    for path in directory.glob("*"):
        text = path.read_bytes() if path.is_file() else b""
        first, _, rest = text.partition(b"\n")
        if first == b"#!/bin/sh" and rest.startswith(b"'''exec'"):
            rest = rest.split(b"\n", 2)[2]  # how pip writes a first line that would be too long
        elif not (first.startswith(b"#!") and b"python" in first):
            continue
        path.write_bytes(INTERPRETER + rest)

"""What programs complain about, in their own words, becomes one error that says what to do."""

from __future__ import annotations

import pytest

from blixard.errors import BlixardError, InvalidRequest, NotSupportedHere, Unavailable
from blixard.vm.image.complaints import MAX_WORDS, explain
from blixard.vm.image.tools import ToolFailed

PIP_OFFLINE = """\
WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<HTTPSConnection>: Failed to establish a new connection')'
ERROR: Could not find a version that satisfies the requirement rich (from versions: none)
ERROR: No matching distribution found for rich
"""


@pytest.mark.parametrize(
    ("output", "kind", "words"),
    [
        ("E: Unable to locate package curll", InvalidRequest, "'curll'"),
        ("E: Package 'rar' has no installation candidate", InvalidRequest, "'rar'"),
        ("ERROR: No matching distribution found for no-such==9", InvalidRequest, "no-such==9"),
        ("ERROR: Invalid requirement: 'a b'", InvalidRequest, "'a b'"),
        ("ERROR: ResolutionImpossible: for help visit", InvalidRequest, "exclude each other"),
        ("/usr/bin/python3: No module named pip", NotSupportedHere, "no pip"),
        (
            "W: Temporary failure resolving 'deb.debian.org'\nE: Unable to locate package x",
            Unavailable,
            "no connection",
        ),
        ("E: Could not connect to deb.debian.org:80", Unavailable, "no connection"),
        (PIP_OFFLINE, Unavailable, "no connection"),
        ("tar: write error: No space left on device", Unavailable, "no space left"),
        (
            "E: You don't have enough free space in /var/cache/apt/archives/.\nnot enough space",
            Unavailable,
            "no space left",
        ),
        ("I: extracting\nE: the moon is full\n", Unavailable, "the moon is full"),
        ("", Unavailable, "exit code 7"),
    ],
)
def test_it_is_told_what_is_wrong(output: str, kind: type[BlixardError], words: str) -> None:
    error = explain(ToolFailed("apt-get", 7, output), what="installing")
    assert type(error) is kind
    assert words in error.message


def test_long_complaints_are_cut() -> None:
    error = explain(ToolFailed("apt-get", 1, "E: " + "x" * 100_000), what="installing")
    assert len(error.message) < 2 * MAX_WORDS

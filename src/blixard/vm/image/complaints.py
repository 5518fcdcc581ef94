"""From what a program of the build complained about to an error that says what to do."""

from __future__ import annotations

import re

from blixard.errors import BlixardError, InvalidRequest, NotSupportedHere, Unavailable
from blixard.vm.image.tools import ToolFailed

MAX_WORDS = 600
_NO_NETWORK = re.compile(
    r"Temporary failure resolving|Could not resolve|Could not connect|Unable to connect|Connection (?:failed|refused|timed out)|"
    r"NewConnectionError|ConnectTimeoutError|Network is unreachable|Failed to establish a new connection|Max retries exceeded|ProxyError"
)
_NO_PACKAGE = re.compile(
    r"Unable to locate package (\S+)|Couldn't find any package by (?:glob|regex) '(\S+?)'|Package '?(\S+?)'? has no installation candidate"
)
_NO_DISTRIBUTION = re.compile(r"No matching distribution found for (.+)")
_BAD_REQUIREMENT = re.compile(
    r"ERROR: (Invalid requirement:? .+|Invalid URL .+|.*is not a valid .*|.*does not (?:appear|look) .*)"
)
_NOT_TOGETHER = re.compile(r"ResolutionImpossible|conflicting dependencies")
_WHEELS = "an image takes wheels for Linux on x86-64 only: is the name right, and does this version have one?"


def explain(failed: ToolFailed, *, what: str) -> BlixardError:
    """Return the error for a program that failed while doing ``what`` ("installing Debian packages")."""
    text = failed.output
    if "No space left on device" in text or "Disk quota exceeded" in text or "not enough space" in text.lower():
        return disk_full(what)
    if _NO_NETWORK.search(text):
        return Unavailable(
            f"{what}: no connection to where the packages are ({_last_words(text)})",
            hint="images that are built already work without a network; look at the proxy settings and try again",
        )
    return _explain_request(failed.output) or Unavailable(f"{what}: {failed}: {_last_words(text)}")


def _explain_request(text: str) -> BlixardError | None:
    if found := _NO_PACKAGE.search(text):
        name = next(filter(None, found.groups()))
        return InvalidRequest(
            f"there is no Debian package {name!r}", field="packages", hint="`apt-cache search` finds names"
        )
    if found := _NO_DISTRIBUTION.search(text):
        return InvalidRequest(f"PyPI has nothing for {found[1].strip()!r}", field="requirements", hint=_WHEELS)
    if found := _BAD_REQUIREMENT.search(text):
        return InvalidRequest(f"{found[1].strip()}", field="requirements")
    if _NOT_TOGETHER.search(text):
        return InvalidRequest(f"these requirements exclude each other: {_last_words(text)}", field="requirements")
    if "No module named pip" in text:
        return no_pip()
    if "need working fakechroot" in text:
        return NotSupportedHere(
            "this process may neither mount nor have a user namespace, and there is no fakechroot to do without",
            hint="install Debian's fakechroot and fakeroot",
        )
    return None


def disk_full(what: str) -> BlixardError:
    return Unavailable(
        f"{what}: no space left on the disk; nothing was kept",
        hint="`blixard image prune` removes what no image needs; TMPDIR and vm.directory say where an image is made and kept",
    )


def no_pip() -> BlixardError:
    return NotSupportedHere(
        "there is no pip, which fetches an image's Python packages",
        hint="python3 -m ensurepip, or install Debian's python3-pip",
    )


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"(E|ERROR|error|fatal)[: ]", line)] or lines[-3:]
    return "; ".join(dict.fromkeys(told))[:MAX_WORDS]

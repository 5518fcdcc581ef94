"""What is done before a guest becomes a template: modules loaded, every path that a job takes gone once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any  # an order is JSON

import msgspec

from blixard.backends.executor.messages import Task, encode
from blixard.vm.guest.orders import PythonOrder
from blixard.vm.guest.protocol import Entry, EntryKind, Frame, Kind, Stream, packed

MODULES = (
    *("asyncio", "base64", "collections", "csv", "datetime", "decimal", "functools", "glob", "hashlib", "itertools"),
    *("json", "logging", "math", "pathlib", "pickle", "random", "re", "shutil", "socket", "statistics", "string"),
    *("subprocess", "tempfile", "threading", "traceback", "typing", "urllib.parse", "uuid", "zlib", "msgspec"),
    *("site", "blixard.sdk.app", "blixard.vm.guest.wasm_job"),
)
"""Imported by jobs more often than not, and costly to load under emulation."""
_SOURCE = b"""
import sys
def job(x):
    print("out")
    print("err", file=sys.stderr)
    return {"x": x}
"""
_LIMITS = {"memory": None, "processes": 128, "cpus": None, "disk": 1 << 30, "open_files": 1024}


def warm_up_frames() -> Iterator[Frame]:
    """Return what a host would send for a function, a script and a command."""
    yield Kind.REQUEST, 0, json.dumps({"id": 1, "op": "status"}).encode()
    function = Task("/bundle", "warm:job", "json", None, {}, None)
    script = Task("/bundle", None, "json", "warm.py", {}, None)
    for number, task in ((1, function), (2, script)):
        order: dict[str, Any] = {"kind": "job", "entry": "python", "environment": {"HOME": "/"}, "limits": _LIMITS}
        arguments = b'[["a"],{}]' if task is function else b"[]"
        yield from _job(number, order, packed(msgspec.msgpack.encode(PythonOrder(encode(task), arguments))))
    command = {"kind": "job", "entry": "command", "argv": ["true"], "environment": {"PATH": "/bin"}, "limits": _LIMITS}
    yield from _job(3, command, b"")


def _job(number: int, order: dict[str, Any], packets: bytes) -> Iterator[Frame]:
    yield Kind.OPEN, number, json.dumps(order).encode()
    files = Entry(EntryKind.FILE, "code/warm.py", 0o644, len(_SOURCE)).encode() + _SOURCE
    yield Kind.DATA, number, bytes([Stream.FILES]) + files
    if packets:
        yield Kind.DATA, number, bytes([Stream.PACKET]) + packets
    yield Kind.END, number, bytes([Stream.FILES])
    yield Kind.END, number, bytes([Stream.STDIN])

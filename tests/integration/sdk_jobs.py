"""Functions for the tests of the SDK, run by real workers."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path


def add(a: int, b: int = 1) -> int:
    return a + b


def identity(value: object) -> object:
    return value


def measure(text: str) -> int:
    return len(text)


def make_text(size: int) -> str:
    return "x" * size


def fail(text: str) -> None:
    _fail_deeper(text)


def _fail_deeper(text: str) -> None:
    raise ValueError(f"no {text} today")


def end_with(code: int) -> None:
    raise SystemExit(code)


def sleep(seconds: float) -> str:
    time.sleep(seconds)  # sleep: this is a job that takes long
    return "slept"


async def double_later(value: int) -> int:
    await asyncio.sleep(0)
    return value * 2


def fail_until_third() -> int:
    attempt = int(os.environ["BLIXARD_ATTEMPT"])
    if attempt < 3:
        raise RuntimeError(f"attempt {attempt}")
    return attempt


def see(path: str) -> dict[str, object]:
    """Tell what a job can see of the machine."""
    return {
        "exists": Path(path).exists(),
        "directory": str(Path.cwd()),
        "variable": os.environ.get("SHOP"),
        "processes": len([entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]),
    }


def lost_number() -> float:
    return float("nan")


def unwritable() -> object:
    return object()


def read(path: str) -> str:
    return Path(path).read_text()


def write(path: str) -> None:
    Path(path).write_text("written")

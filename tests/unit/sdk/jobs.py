"""Functions that the tests submit: at the top level of a file, as a worker needs them."""

from __future__ import annotations

import os


def add(a: int, b: int = 1) -> int:
    """Return the sum."""
    return a + b


def double(value: int) -> int:
    return value * 2


def fail_on_odd(value: int) -> int:
    if value % 2:
        raise ValueError(f"{value} is odd")
    return value


def measure(text: str) -> int:
    return len(text)


def process_id() -> int:
    return os.getpid()

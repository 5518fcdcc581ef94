"""Functions that the tests of executors call: at the top level of a file, as a worker needs them."""

from __future__ import annotations

import asyncio
import builtins
import time
from collections.abc import Callable


def capture(*args: object, **kwargs: object) -> list[object]:
    return [list(args), kwargs]


def fail(text: str) -> float:
    raise ValueError(f"no {text}")


def raise_builtin(name: str) -> None:
    raise getattr(builtins, name)("on purpose")


def sleep(seconds: float) -> float:
    time.sleep(seconds)  # sleep: this is a job that takes long
    return seconds


def slow_double(number: int) -> int:
    time.sleep(0.05)  # sleep: this is a job that takes a while
    return 2 * number


async def double_later(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


class Counter:
    def __init__(self, start: int) -> None:
        self.value = start

    def add(self, number: int) -> int:
        return self.value + number

    @classmethod
    def start_at(cls, start: int) -> int:
        return cls(start).value


def _make() -> Callable[[int], int]:
    def hidden(number: int) -> int:
        return number

    hidden.__qualname__ = "slow_double"
    return hidden


HIDDEN = _make()
"""Has the name of another function."""

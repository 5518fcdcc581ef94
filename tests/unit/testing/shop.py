"""A program with jobs, as a user has one to test."""

from __future__ import annotations

import contextvars
import dataclasses
import os
import threading
from pathlib import Path

import blixard

app = blixard.App("shop", server="http://127.0.0.1:9")
"""A server that is not there: a test that reached for it would fail."""
visitor: contextvars.ContextVar[str] = contextvars.ContextVar("visitor", default="nobody")


@dataclasses.dataclass
class Order:
    id: int
    items: tuple[str, ...] = ()


@app.job(queue="mail", retry=blixard.RetryPolicy(retries=2, delay=60, jitter=0), timeout=30, tags=["mail"])
def send(address: str, subject: str = "hello") -> str:
    if "@" not in address:
        raise ValueError(f"{address} is no address")
    return f"{subject} to {address}"


@app.job
def place(order: Order) -> object:
    return order


@app.job
def where() -> list[object]:
    return [threading.current_thread().name, os.getpid(), visitor.get(), os.environ.get("BLIXARD_JOB_ID")]


@app.job(env={"MODE": "test"})
def environment() -> list[str | None]:
    return [os.environ.get(name) for name in ("MODE", "BLIXARD_ATTEMPT", "BLIXARD_NAMESPACE")]


@app.job
async def later(number: int) -> int:
    return number + 1


@app.job
def both(address: str) -> list[str]:
    handles = [send.submit(address), send.submit(address, subject="again")]
    return blixard.gather(*handles)


@app.job
def steady_third() -> int:
    attempt = int(os.environ["BLIXARD_ATTEMPT"])
    if attempt < 3:
        raise ConnectionError(f"attempt {attempt}")
    return attempt


@app.job(encoding="pickle")
def double_set(values: set[int]) -> set[int]:
    return {2 * value for value in values}


@app.job
def read(path: str) -> str:
    return Path(path).read_text()


@app.job
def text_of(size: int) -> str:
    return "x" * size


@app.job
def unwritable() -> object:
    return object()

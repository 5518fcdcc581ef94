"""Typed uses of the SDK. ``# error`` marks a line that every checker must refuse; all others must pass.

Read by test_typing.py, never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_type

from blixard import App, JobHandle, JobState, RetryPolicy

app = App("shop", server="http://127.0.0.1:3020", token=None, data_dir=None)


@app.job
def plain(path: str, size: int = 128) -> dict[str, int]:
    return {path: size}


@app.job(retries=3, timeout=30, isolation="minimal", allow_read=["/data"], retry=RetryPolicy(), env={"A": "1"})
def declared(number: int, /, *, factor: float = 1.0) -> float:
    return number * factor


assert_type(plain("a", size=2), dict[str, int])
assert_type(plain.submit("a"), JobHandle[dict[str, int]])
assert_type(plain.submit("a", 3).result(), dict[str, int])
assert_type(plain.submit("a", size=3).result(timeout=5.0), dict[str, int])
assert_type(plain.map(["a"]), Iterator[dict[str, int]])
assert_type(plain.options(priority=5).submit("a"), JobHandle[dict[str, int]])
assert_type(declared(2, factor=0.5), float)
assert_type(declared.submit(2), JobHandle[float])
assert_type(list(declared.map([1, 2], ordered=False, resume=True, return_exceptions=True)), list[float])
assert_type(plain.submit("a").state(), JobState)
assert_type(app.handle("job_1").result(), object)


async def in_a_loop() -> None:
    assert_type(await plain.submit_async("a", size=1), JobHandle[dict[str, int]])
    assert_type(await plain.submit("a").result_async(timeout=1), dict[str, int])


plain(3)  # error
plain.submit()  # error
plain.submit("a", "b")  # error
plain.submit("a", colour="red")  # error
declared.submit(number=1)  # error
declared.submit(1, 2.0)  # error
wrong: str = plain.submit("a").result()  # error
plain.options(retrys=3)  # error
plain.options(retries="3")  # error
app.job(timeout="30s")  # error
app.job(allow_net="yes")  # error
App()  # error

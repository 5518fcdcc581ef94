"""Typed uses of the SDK. ``# error`` marks a line that every checker must refuse; all others must pass.

Read by test_typing.py, never run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import assert_type

from blixard import (
    App,
    BlixardError,
    Executor,
    JobFuture,
    JobHandle,
    JobState,
    RetryPolicy,
    as_completed,
    gather,
    gather_async,
)
from blixard.testing import inline

app = App("shop", server="http://127.0.0.1:3020", token=None, data_dir=None)


@app.job
def plain(path: str, size: int = 128) -> dict[str, int]:
    return {path: size}


@app.job(retries=3, timeout=30, isolation="minimal", allow_read=["/data"], retry=RetryPolicy(), env={"A": "1"})
def declared(number: int, /, *, factor: float = 1.0) -> float:
    return number * factor


@app.job
async def awaited(number: int) -> str:
    return str(number)


@app.job(timeout=5)
async def awaited_with_options(number: int) -> str:
    return str(number)


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


assert_type(awaited.submit(1).result(), str)
assert_type(awaited_with_options.options(priority=1).submit(1).result(), str)
assert_type(plain.map(["a"], max_in_flight=3, timeout=5.0), Iterator[dict[str, int]])
assert_type(plain.map_async(["a"]), AsyncIterator[dict[str, int]])
assert_type(gather(awaited.submit(1), awaited.submit(2)), list[str])
assert_type(gather(awaited.submit(1), return_exceptions=True), list[str | BlixardError])
assert_type(as_completed([awaited.submit(1)]), Iterator[JobHandle[str]])
executor = Executor(app, timeout=5)
assert_type(executor.submit(declared, 2, factor=3.0), JobFuture[float])
assert_type(executor.submit(awaited, 2).result(), str)
with inline(app) as jobs:
    jobs.assert_submitted(plain, "a", size=1)
    jobs.assert_submitted(plain, 3)  # error


async def in_a_loop() -> None:
    assert_type(await plain.submit_async("a", size=1), JobHandle[dict[str, int]])
    assert_type(await plain.submit("a").result_async(timeout=1), dict[str, int])
    assert_type(await awaited(1), str)
    assert_type(await gather_async(awaited.submit(1)), list[str])


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
executor.submit(declared, "two")  # error
executor.submit(declared)  # error
Executor(app, timeout="5")  # error
gather(3)  # error
plain.options(input=3)  # error

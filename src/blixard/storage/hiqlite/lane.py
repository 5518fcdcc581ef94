"""Requests that travel together: what waits while one batch is away goes with the next."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from blixard_hiqlite import Failure, Operation

from blixard.errors import BlixardError, InternalError, StoreUnavailable
from blixard.storage.hiqlite.operations import Outcome, translate_failure

MAX_QUEUED = 10_000
"""Calls that wait in a lane; a further one waits before it is queued."""
MAX_BATCH = 2_000
MAX_BATCH_BYTES = 256 * 1024
"""A batch takes no further operation above this, so that it is one entry of the log; a single larger one travels alone, in parts."""

Send = Callable[[Sequence[Operation]], Awaitable[Sequence[Outcome]]]


class Call:
    """One operation, what it is called in errors, and who waits for it."""

    __slots__ = ("future", "name", "operation")

    def __init__(self, operation: Operation, name: str, future: asyncio.Future[Outcome]) -> None:
        self.operation = operation
        self.name = name
        self.future = future


class Lane:
    """Sends one batch at a time, in the order of the calls. ``start`` and ``stop`` by its owner.

    ``send`` returns one outcome per operation, or raises what all of the batch are told.
    """

    def __init__(self, send: Send, *, name: str) -> None:
        self._send = send
        self._name = name
        self._queue: deque[Call] = deque()
        self._outside: deque[Call] = deque()
        self._filled = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def stop(self) -> None:
        """Answer what was queued, then end. Later calls are refused; calling it twice is harmless."""
        self._closed = True
        self._refuse(self._outside)
        self._filled.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def call(self, operation: Operation, name: str) -> Outcome:
        """Send with the next batch. A cancelled call may still be carried out."""
        if self._closed:
            raise StoreUnavailable("the database is closed")
        call = Call(operation, name, asyncio.get_running_loop().create_future())
        if self._outside or len(self._queue) >= MAX_QUEUED:
            self._outside.append(call)
        else:
            self._queue.append(call)
            self._filled.set()
        return await call.future

    async def _run(self) -> None:
        while not self._closed or self._queue:
            await self._filled.wait()
            batch = self._take()
            if batch:
                await self._carry(batch)
            if not self._queue and not self._closed:
                self._filled.clear()

    def _take(self) -> list[Call]:
        """Return the next batch, leaving out whose caller was cancelled before anything was sent."""
        batch: list[Call] = []
        size = 0
        while self._queue and len(batch) < MAX_BATCH:
            size += self._queue[0].operation.size
            if batch and size > MAX_BATCH_BYTES:
                break
            call = self._queue.popleft()
            if call.future.done():
                size -= call.operation.size
            else:
                batch.append(call)
        while self._outside and len(self._queue) < MAX_QUEUED:
            self._queue.append(self._outside.popleft())
        return batch

    async def _carry(self, batch: list[Call]) -> None:
        try:
            outcomes = await self._send([call.operation for call in batch])
        except BlixardError as error:
            self._fail(batch, error)
        except Exception as error:  # the edge of the lane: whoever waits must hear of our own bug
            self._fail(batch, InternalError(f"{self._name} failed: {type(error).__name__}: {error}"))
        except asyncio.CancelledError:
            self._fail(batch, StoreUnavailable("the database was closed"))
            raise
        else:
            for call, outcome in zip(batch, outcomes, strict=True):
                _settle(call, outcome)

    def _fail(self, batch: list[Call], error: BlixardError) -> None:
        for call in batch:
            if not call.future.done():
                call.future.set_exception(error)

    def _refuse(self, calls: deque[Call]) -> None:
        self._fail(list(calls), StoreUnavailable("the database is closed"))
        calls.clear()


def _settle(call: Call, outcome: Outcome) -> None:
    if call.future.done():  # the caller was cancelled; what was done stands
        return
    if isinstance(outcome, Failure):
        call.future.set_exception(translate_failure(outcome, call.name))
    else:
        call.future.set_result(outcome)

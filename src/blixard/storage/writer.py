"""The group-commit writer: one thread, one connection, one fsync for all writes that wait.

Rejected: a transaction per call (an fsync each: 2,000 a second), and SQLite on the event loop's thread (an fsync would
stop the loop). ``DESIGN.md`` says what holds at each crash point.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import apsw

from blixard.errors import BlixardError, OutcomeUnknown, StoreUnavailable
from blixard.storage.database import Params, Row, Statement
from blixard.storage.sqlite_errors import STORE_BROKEN, translate_commit_error, translate_error
from blixard.storage.turnstile import Turnstile

MAX_QUEUED_WRITES = 10_000
"""Calls that wait for the writer; a further one waits before it is queued."""
MAX_BATCH_WRITES = 2_000
"""Calls in one transaction."""
MAX_BATCH_SECONDS = 0.05
"""A transaction takes no further call after this time, so that no caller waits long for the others of its batch."""
MIN_POLL_SECONDS = 0.001
MAX_POLL_SECONDS = 0.025
"""How often a watched writer looks for the commits of other processes: often after a change, rarely in silence."""
BUSY_SECONDS = 1.0
"""For so long after a change another one is expected soon."""
COMPANY_SECONDS = 60.0
"""For so long after a commit of another process, an answer to each of our own is expected; a process by itself need not look often."""

# Any: a write's future holds rows, a transaction's row counts.
Answered = asyncio.Future[Any]


class Write:
    """One statement and who waits for it."""

    __slots__ = ("future", "params", "statement")

    def __init__(self, statement: Statement, params: Params, future: Answered) -> None:
        self.statement = statement
        self.params = params
        self.future = future

    @property
    def name(self) -> str:
        return self.statement.name

    def apply(self, connection: apsw.Connection) -> list[Row]:
        """Run it. Needs no savepoint: SQLite undoes a failed statement by itself, with all that its triggers did."""
        return connection.execute(self.statement.sql, self.params).fetchall()


class Transaction:
    """Several statements, all or nothing, and who waits for them."""

    __slots__ = ("future", "statements")

    def __init__(self, statements: Sequence[tuple[Statement, Params]], future: Answered) -> None:
        self.statements = statements
        self.future = future

    @property
    def name(self) -> str:
        return ", ".join(statement.name for statement, _ in self.statements)

    def apply(self, connection: apsw.Connection) -> list[int]:
        connection.execute("SAVEPOINT caller")
        try:
            counts = [self._count(connection, statement, params) for statement, params in self.statements]
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK TO caller")
                connection.execute("RELEASE caller")
            raise
        connection.execute("RELEASE caller")
        return counts

    @staticmethod
    def _count(connection: apsw.Connection, statement: Statement, params: Params) -> int:
        before = connection.total_changes()
        connection.execute(statement.sql, params).fetchall()
        return connection.changes() if connection.total_changes() != before else 0


Operation = Write | Transaction


class Answer(NamedTuple):
    """How one call ended: its value, or the error to raise."""

    operation: Operation
    value: object
    error: BlixardError | None


class GroupCommitWriter:
    """Owns the writing connection from ``start`` to ``stop``; everything else happens on its thread.

    ``changed`` is called on the event loop after each commit that changed something, also one of another process (noticed
    only while ``watched``). Answers of one batch travel to the loop in one call.
    """

    def __init__(
        self,
        connection: apsw.Connection,
        *,
        path: str,
        loop: asyncio.AbstractEventLoop,
        turnstile: Turnstile | None,
        changed: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._path = path
        self._loop = loop
        self._turnstile = turnstile
        self._changed = changed
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._again: deque[Operation] = deque()
        self._running: list[Operation] = []
        self._queued = 0
        # Not asyncio.Semaphore: waking n waiters in one turn of the loop costs it n² steps (measured: 6 times slower).
        self._outside: deque[Operation] = deque()
        self._closed: str | None = None
        self._stopped: asyncio.Future[None] = loop.create_future()
        self._stopping = False
        self._watched = False
        self._poll_seconds = MIN_POLL_SECONDS
        self._changed_at = time.monotonic()
        self._company_until = float("-inf")
        # As of before the thread starts: later, the first watcher would miss a commit that comes between its watch and the first look.
        self._data_version: object = connection.execute("PRAGMA data_version").fetchall()
        self._thread = threading.Thread(target=self._run, name="blixard-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Finish what was queued, then end the thread. Later calls are refused; calling it twice is harmless."""
        if self._closed is None:
            self._closed = "the database is closed"
            self._turn_away(self._closed)
            self._queue.put(None)
        await asyncio.shield(self._stopped)
        self._thread.join()

    async def write(self, statement: Statement, params: Params) -> list[Row]:
        future = self._loop.create_future()
        rows: list[Row] = await self._submit(Write(statement, params, future))
        return rows

    async def transaction(self, statements: Sequence[tuple[Statement, Params]]) -> list[int]:
        future = self._loop.create_future()
        counts: list[int] = await self._submit(Transaction(tuple(statements), future))
        return counts

    def watch(self, watched: bool) -> None:
        """Look for the commits of other processes from now on, or not any more."""
        if watched and not self._watched and self._closed is None:
            self._watched = True
            self._queue.put(_NUDGE)  # the thread may be waiting without a time limit
        self._watched = watched

    async def _submit(self, operation: Operation) -> Any:  # Any: see Answered
        if self._closed is not None:
            raise StoreUnavailable(self._closed)
        if self._outside or self._queued >= MAX_QUEUED_WRITES:
            self._outside.append(operation)
        else:
            self._enqueue(operation)
        return await operation.future

    def _enqueue(self, operation: Operation) -> None:
        self._queued += 1
        self._queue.put(operation)

    def _admit(self) -> None:
        """Queue those who wait outside, in their order, as far as there is room. Who was cancelled meanwhile is left out."""
        while self._outside and self._queued < MAX_QUEUED_WRITES:
            operation = self._outside.popleft()
            if not operation.future.done():
                self._enqueue(operation)

    def _turn_away(self, reason: str) -> None:
        while self._outside:
            future = self._outside.popleft().future
            if not future.done():
                future.set_exception(StoreUnavailable(reason))

    # What follows runs on the writer's thread, but for _settle.

    def _run(self) -> None:
        reason: BlixardError = StoreUnavailable("the database is closed")
        try:
            while (first := self._take()) is not None:
                answers, changed = self._commit_batch(first)
                self._post(answers, changed=changed)
        except Exception as error:  # the edge of the thread: whoever waits must hear of our own bug
            reason = translate_error(error, path=self._path, statement="writer")
        finally:
            self._post_end(reason)

    def _take(self) -> Operation | None:
        """Wait for the next operation; None when the writer is to end. Polls for foreign changes while it waits, if watched."""
        while True:
            if self._again:
                return self._again.popleft()
            if self._stopping:
                return None
            try:
                operation = self._queue.get(timeout=self._poll_seconds if self._watched else None)
            except queue.Empty:
                self._poll()
                continue
            if operation is _NUDGE:
                self._poll_seconds = MIN_POLL_SECONDS
            elif operation is None:
                self._stopping = True
            else:
                return operation

    def _next(self) -> Operation | None:
        """Return a further operation for the running batch without waiting."""
        if self._again:
            return self._again.popleft()
        if self._stopping:
            return None
        try:
            operation = self._queue.get_nowait()
        except queue.Empty:
            return None
        if operation is None:
            self._stopping = True
        return self._next() if operation is _NUDGE else operation

    def _commit_batch(self, first: Operation) -> tuple[list[Answer], bool]:
        """Run ``first`` and all that waits in one transaction; return the answers and whether anything changed."""
        before = self._connection.total_changes()
        try:
            self._begin()
        except Exception as error:  # told to all who wait: each by itself would wait as long as this one did
            return [self._failure(operation, error) for operation in self._drain(first)], False
        answers, broken = self._apply_all(first)
        if broken is not None:
            return self._abandon(answers, broken), False
        if not self._connection.in_transaction:
            return answers, False
        try:
            self._connection.execute("COMMIT")
        except Exception as error:  # told to everybody in the batch
            return self._abandon(answers, translate_commit_error(error, path=self._path)), False
        return answers, self._connection.total_changes() != before

    def _drain(self, first: Operation) -> list[Operation]:
        waiting = [first]
        while (operation := self._next()) is not None:
            waiting.append(operation)
        return waiting

    def _begin(self) -> None:
        if self._turnstile is None:
            self._connection.execute("BEGIN IMMEDIATE")
            return
        self._turnstile.enter()
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        finally:
            self._turnstile.leave()

    def _apply_all(self, first: Operation) -> tuple[list[Answer], BlixardError | None]:
        """Run operations until none waits or the batch is large enough. The second value is an error of the store itself."""
        answers: list[Answer] = []
        until = time.monotonic() + MAX_BATCH_SECONDS
        operation: Operation | None = first
        while operation is not None:
            self._running.append(operation)
            try:
                answers.append(Answer(operation, operation.apply(self._connection), None))
            except Exception as error:  # told to the owner of the operation
                answers.append(self._failure(operation, error))
                if isinstance(error, STORE_BROKEN):
                    return answers, answers[-1].error
                if not self._connection.in_transaction:
                    return self._spare(answers), None
            if len(answers) >= MAX_BATCH_WRITES or time.monotonic() > until:
                break
            operation = self._next()
        return answers, None

    def _spare(self, answers: list[Answer]) -> list[Answer]:
        """Keep only the failures, and run the others of the batch again: a statement has rolled back the whole transaction."""
        self._again.extendleft(answer.operation for answer in reversed(answers) if answer.error is None)
        return [answer for answer in answers if answer.error is not None]

    def _abandon(self, answers: list[Answer], error: BlixardError) -> list[Answer]:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        return [answer if answer.error else Answer(answer.operation, None, error) for answer in answers]

    def _failure(self, operation: Operation, error: BaseException) -> Answer:
        return Answer(operation, None, translate_error(error, path=self._path, statement=operation.name))

    def _poll(self) -> None:
        """Notice commits of other connections. SQLite's data_version does not move for a connection's own commits."""
        try:
            version: object = self._connection.execute("PRAGMA data_version").fetchall()
        except apsw.Error:
            version = object()  # a change, as it were: whoever looks again will hear of the trouble
        if version == self._data_version:
            if time.monotonic() - self._changed_at > BUSY_SECONDS:
                self._poll_seconds = min(self._poll_seconds * 2, MAX_POLL_SECONDS)
            return
        self._data_version = version
        self._company_until = time.monotonic() + COMPANY_SECONDS
        self._post([], changed=True)

    def _post(self, answers: list[Answer], *, changed: bool) -> None:
        if changed:
            self._changed_at = time.monotonic()
            self._poll_seconds = MIN_POLL_SECONDS if self._changed_at < self._company_until else MAX_POLL_SECONDS
        self._running = []
        self._call_loop(self._settle, answers, changed)

    def _post_end(self, reason: BlixardError) -> None:
        self._call_loop(self._settle_end, reason)

    # Any: whatever the called method takes.
    def _call_loop(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            # The loop was closed without closing the database: nobody is left who could be answered.
            self._stopping = True

    # On the event loop again.

    def _settle(self, answers: list[Answer], changed: bool) -> None:
        for operation, value, error in answers:
            future = operation.future
            if future.done():  # the caller was cancelled; the write stands
                continue
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)
        self._queued -= len(answers)
        self._admit()
        if changed:
            self._changed()

    def _settle_end(self, reason: BlixardError) -> None:
        if self._closed is None:
            self._closed = f"the writer of {self._path} has ended: {reason}"
        self._turn_away(self._closed)
        lost = [*self._running, *self._again]
        while not self._queue.empty():
            operation = self._queue.get_nowait()
            if operation is not None and operation is not _NUDGE:
                lost.append(operation)
        unknown = OutcomeUnknown(f"the writer of {self._path} has ended: {reason}")
        self._settle([Answer(operation, None, unknown) for operation in lost], changed=False)
        if not self._stopped.done():
            self._stopped.set_result(None)


class _Nudge(Write):
    """Wakes the thread and means nothing else."""

    __slots__ = ()

    def __init__(self) -> None:
        """Nothing to keep."""


_NUDGE = _Nudge()

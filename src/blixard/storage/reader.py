"""Reads beside the writer: a few threads, each with a connection of its own that cannot write."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence

import apsw

from blixard.errors import BlixardError, StoreUnavailable
from blixard.storage.database import Params, Row, Statement
from blixard.storage.sqlite_errors import translate_error

MAX_QUEUED_READS = 10_000
"""Calls that wait for a reader; a further one waits before it is queued."""

_Job = tuple[Statement, Params, asyncio.Future[list[Row]]]


class ReaderPool:
    """One thread for each connection, from ``start`` to ``stop``."""

    def __init__(self, connections: Sequence[apsw.Connection], *, path: str, loop: asyncio.AbstractEventLoop) -> None:
        self._path = path
        self._loop = loop
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(MAX_QUEUED_READS)
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, args=(connection,), name=f"blixard-reader-{number}", daemon=True)
            for number, connection in enumerate(connections)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    async def stop(self) -> None:
        """Answer what was queued, then end the threads. Calling it twice is harmless."""
        if not self._closed:
            self._closed = True
            for _ in self._threads:
                self._queue.put(None)
        await asyncio.to_thread(self._join)

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    async def read(self, statement: Statement, params: Params) -> list[Row]:
        async with self._room:
            if self._closed:
                raise StoreUnavailable("the database is closed")
            future: asyncio.Future[list[Row]] = self._loop.create_future()
            self._queue.put((statement, params, future))
            return await future

    def _run(self, connection: apsw.Connection) -> None:
        while (job := self._queue.get()) is not None:
            statement, params, future = job
            rows: list[Row] = []
            failure: BlixardError | None = None
            try:
                rows = connection.execute(statement.sql, params).fetchall()
            except Exception as error:  # told to the caller
                failure = translate_error(error, path=self._path, statement=statement.name)
            try:
                self._loop.call_soon_threadsafe(_settle, future, rows, failure)
            except RuntimeError:
                return  # the loop was closed without closing the database: nobody is left who could be answered


def _settle(future: asyncio.Future[list[Row]], rows: list[Row], failure: BlixardError | None) -> None:
    if future.done():  # the caller was cancelled
        return
    if failure is None:
        future.set_result(rows)
    else:
        future.set_exception(failure)

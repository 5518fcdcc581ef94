"""The blocking client: the same calls as ``AsyncClient`` for code without an event loop."""

from __future__ import annotations

import asyncio
import importlib
import os
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from blixard.client.contract import AsyncClient
from blixard.domain.job import NewJob
from blixard.domain.spec import JobSpec
from blixard.protocol.jobs import (
    BatchResults,
    BatchView,
    CancelReply,
    EventView,
    JobDetail,
    JobFilter,
    JobPage,
    JobResult,
    JobView,
    LogPageView,
    OpenBatchRequest,
    StatsView,
    SubmitReply,
    SubmitRequest,
    WaitReply,
    WhyView,
)
from blixard.protocol.workers import CreateTokenReply, CreateTokenRequest, Health, TokenView, WorkerView

R = TypeVar("R")


class _Portal:
    """A thread with an event loop and an open client. Of the process that made it; a fork makes its own."""

    def __init__(self, connect: Callable[[], AsyncClient]) -> None:
        self.pid = os.getpid()
        self._connect = connect
        self._loop = asyncio.new_event_loop()
        self._client: AsyncClient | None = None
        self._opening = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="blixard client", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[AsyncClient], Coroutine[None, None, R]]) -> R:
        """Run ``work`` on the loop and return what it returns. Interrupted, it cancels it."""
        future = self.begin(work)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C in this thread; an error of the work itself leaves nothing to cancel.
            future.cancel()
            raise

    async def call_async(self, work: Callable[[AsyncClient], Coroutine[None, None, R]]) -> R:
        """Do the same from a coroutine of another loop, which stays free; cancelling it cancels the work."""
        return await asyncio.wrap_future(self.begin(work))

    def begin(self, work: Callable[[AsyncClient], Coroutine[None, None, R]]) -> Future[R]:
        """Run ``work`` on the loop and return at once."""
        return asyncio.run_coroutine_threadsafe(self._run(work), self._loop)

    def start(self, work: Callable[[AsyncClient], Coroutine[None, None, None]]) -> asyncio.Task[None]:
        """Let ``work`` go on by itself until it ends, ``stop`` or ``close``."""
        return asyncio.run_coroutine_threadsafe(self._start(work), self._loop).result()

    def stop(self, task: asyncio.Task[None]) -> None:
        """Cancel and await what ``start`` began; tasks of others are left alone."""
        if task in self._background:
            asyncio.run_coroutine_threadsafe(_end({task}), self._loop).result()

    def abandon(self) -> None:
        """Forget a loop whose thread stayed behind in the parent of this process: its unfinished tasks are no news here."""
        self._loop.set_exception_handler(lambda _loop, _context: None)

    def close(self) -> None:
        """Close the client and end the thread."""
        if self._thread.is_alive():
            try:
                asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    async def _run(self, work: Callable[[AsyncClient], Coroutine[None, None, R]]) -> R:
        async with self._opening:  # or two first calls at once would open two clients
            if self._client is None:
                client = self._connect()
                self._client = await client.__aenter__()
        return await work(self._client)

    async def _start(self, work: Callable[[AsyncClient], Coroutine[None, None, None]]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._run(work), name="background")
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _close(self) -> None:
        await _end(set(self._background))
        client, self._client = self._client, None
        if client is not None:
            await client.__aexit__(None, None, None)


async def _nothing(client: AsyncClient) -> None:
    del client


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _begin_stream(digest: str, client: AsyncClient) -> AsyncIterator[bytes]:
    return client.stream_blob(digest)


async def _next_piece(stream: AsyncIterator[bytes]) -> bytes | None:
    return await anext(stream, None)


async def _end_stream(stream: AsyncIterator[bytes]) -> None:
    if isinstance(stream, AsyncGenerator):
        await stream.aclose()


def _at_exit(close: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Close at exit, before the interpreter shuts its thread pools: closing needs them, and atexit would be too late.

    There is no public call for that moment; concurrent.futures uses this one (https://bugs.python.org/issue39812), and
    must have done so before us: the last to ask is called first.
    """
    importlib.import_module("concurrent.futures.thread")

    def close_if_alive() -> None:
        if (call := close()) is not None:
            call()

    threading._register_atexit(close_if_alive)  # type: ignore[attr-defined]  # noqa: SLF001 - see above


class Client:
    """Opens with the first call, may be shared by threads, survives ``fork`` (the child gets a client of its own), closes at exit.

    ``connect`` returns the asynchronous client to use, not yet open. Raises what ``AsyncClient`` raises.
    """

    def __init__(self, connect: Callable[[], AsyncClient]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._portal: _Portal | None = None
        self._inherited: list[_Portal] = []

    def __enter__(self) -> Self:
        self._call(_nothing)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End this client's worker and connections. Allowed twice; a later call opens it again."""
        with self._lock:
            portal, self._portal = self._portal, None
        if portal is not None and portal.pid == os.getpid():
            portal.close()

    def call(self, work: Callable[[AsyncClient], Coroutine[None, None, R]]) -> R:
        """Run something that needs several asynchronous calls, and return its result."""
        return self._call(work)

    async def call_async(self, work: Callable[[AsyncClient], Coroutine[None, None, R]]) -> R:
        """Do the same from a coroutine; its event loop stays free meanwhile."""
        return await self._living_portal().call_async(work)

    def begin(self, work: Callable[[AsyncClient], Coroutine[None, None, R]]) -> Future[R]:
        """Begin something and return at once; its end is in the future. Cancelling that cancels the work."""
        return self._living_portal().begin(work)

    def start(self, work: Callable[[AsyncClient], Coroutine[None, None, None]]) -> asyncio.Task[None]:
        """Let something go on in the background until it ends, ``stop`` or ``close``. Its owner reads how it ended."""
        return self._living_portal().start(work)

    def stop(self, task: asyncio.Task[None]) -> None:
        """Cancel what ``start`` began and await its end. Allowed twice, after ``close``, and at the interpreter's end."""
        with self._lock:
            portal = self._portal
        if portal is not None and portal.pid == os.getpid():
            portal.stop(task)

    def submit(self, spec: JobSpec, job: NewJob | None = None) -> str:
        return self._call(lambda c: c.submit(spec, job))

    def submit_many(self, request: SubmitRequest) -> SubmitReply:
        return self._call(lambda c: c.submit_many(request))

    def open_batch(self, request: OpenBatchRequest) -> BatchView:
        return self._call(lambda c: c.open_batch(request))

    def batch(self, batch_id: str) -> BatchView:
        return self._call(lambda c: c.batch(batch_id))

    def batch_results(self, batch_id: str, *, after: int = 0, limit: int = 1000, wait: float = 0.0) -> BatchResults:
        return self._call(lambda c: c.batch_results(batch_id, after=after, limit=limit, wait=wait))

    def cancel_batch(self, batch_id: str) -> int:
        return self._call(lambda c: c.cancel_batch(batch_id))

    def job(self, job_id: str) -> JobDetail:
        return self._call(lambda c: c.job(job_id))

    def jobs(self, where: JobFilter | None = None, *, limit: int = 100, cursor: str | None = None) -> JobPage:
        return self._call(lambda c: c.jobs(where, limit=limit, cursor=cursor))

    def wait(self, ids: Sequence[str], *, wait: float) -> WaitReply:
        return self._call(lambda c: c.wait(ids, wait=wait))

    def result(self, job_id: str, *, timeout: float | None = None) -> JobResult:
        return self._call(lambda c: c.result(job_id, timeout=timeout))

    def cancel(self, job_id: str) -> CancelReply:
        return self._call(lambda c: c.cancel(job_id))

    def retry(self, job_id: str) -> JobView:
        return self._call(lambda c: c.retry(job_id))

    def why(self, job_id: str) -> WhyView:
        return self._call(lambda c: c.why(job_id))

    def events(self, job_id: str) -> list[EventView]:
        return self._call(lambda c: c.events(job_id))

    def logs(self, job_id: str, *, attempt: int | None = None, offset: int = 0, wait: float = 0.0) -> LogPageView:
        return self._call(lambda c: c.logs(job_id, attempt=attempt, offset=offset, wait=wait))

    def put_blob(self, content: bytes | Path) -> str:
        return self._call(lambda c: c.put_blob(content))

    def get_blob(self, digest: str) -> bytes:
        return self._call(lambda c: c.get_blob(digest))

    def stats(self) -> StatsView:
        return self._call(lambda c: c.stats())

    def workers(self) -> list[WorkerView]:
        return self._call(lambda c: c.workers())

    def drain_worker(self, session: str) -> WorkerView:
        return self._call(lambda c: c.drain_worker(session))

    def health(self) -> Health:
        return self._call(lambda c: c.health())

    def create_token(self, request: CreateTokenRequest) -> CreateTokenReply:
        return self._call(lambda c: c.create_token(request))

    def tokens(self) -> list[TokenView]:
        return self._call(lambda c: c.tokens())

    def revoke_token(self, token_id: str) -> TokenView:
        return self._call(lambda c: c.revoke_token(token_id))

    def prune(self) -> dict[str, int]:
        return self._call(lambda c: c.prune())

    def stream_blob(self, digest: str) -> Iterator[bytes]:
        """Yield the content piece by piece."""
        stream = self._call(partial(_begin_stream, digest))
        try:
            while (piece := self._call(lambda _: _next_piece(stream))) is not None:
                yield piece
        finally:
            self._call(lambda _: _end_stream(stream))

    def _call(self, work: Callable[[AsyncClient], Coroutine[None, None, R]]) -> R:
        return self._living_portal().call(work)

    def _living_portal(self) -> _Portal:
        with self._lock:
            if self._portal is None or self._portal.pid != os.getpid():
                if self._portal is not None:
                    # After a fork the thread is gone and the connections are the parent's: they are left to it untouched.
                    self._portal.abandon()
                    self._inherited.append(self._portal)
                self._portal = _Portal(self._connect)
                _at_exit(weakref.WeakMethod(self.close))
            return self._portal

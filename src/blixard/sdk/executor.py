"""``concurrent.futures`` on durable jobs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack, cast, overload

from blixard.client.contract import AsyncClient
from blixard.client.endings import result_bytes
from blixard.domain.limits import MAX_BATCH_JOBS
from blixard.domain.state_machine import JobState
from blixard.errors import InvalidTransition, JobCancelled, JobNotFound
from blixard.protocol.jobs import JobResult
from blixard.sdk.callables import unwrap
from blixard.sdk.ends import error_of, with_type
from blixard.sdk.function import JobFunction
from blixard.sdk.handle import JobHandle
from blixard.sdk.options import JobOptions, OptionArguments
from blixard.sdk.patience import Deadline
from blixard.sdk.surroundings import check_not_importing
from blixard.sdk.template import JobTemplate
from blixard.sdk.waiting import Ends

if TYPE_CHECKING:
    from blixard.sdk.app import App

P = ParamSpec("P")
R = TypeVar("R")
CANCELS_AT_ONCE = 16
UNSTARTED = frozenset({JobState.BLOCKED, JobState.PENDING})
DEFAULT_NAME = "executor"


class JobFuture(concurrent.futures.Future[R]):
    """A ``concurrent.futures.Future`` of one job. ``job_id`` finds the job again when this process is gone."""

    def __init__(self, handle: JobHandle[R], decode: Callable[[bytes | None], object]) -> None:
        super().__init__()
        self.handle = handle
        self._decode = decode
        self._turn = threading.RLock()

    @property
    def job_id(self) -> str:
        return self.handle.id

    def cancel(self) -> bool:
        """Cancel the job, also while it runs; False if it has ended otherwise. Asks the store.

        Once the store has taken the request the future is cancelled. A worker obeys within a second; work that is done before
        that stays done.
        """
        if self.done():
            return self.cancelled()
        try:
            self.handle.cancel()
        except InvalidTransition:
            return False  # it has ended, and its result is on its way here
        self.end_cancelled()
        return self.cancelled()

    def running(self) -> bool:
        """Say whether a worker runs the job now. Asks the store."""
        return not self.done() and self.handle.state() is JobState.IN_PROGRESS

    def end(self, result: JobResult, data: bytes | None) -> None:
        """Be told how the job ended."""
        error = error_of(result)
        if isinstance(error, JobCancelled):
            self.end_cancelled()
        elif error is not None:
            self.fail(with_type(error, result.error))
        else:
            self._succeed(data)

    def fail(self, error: BaseException) -> None:
        """Have no result, unless it has one or is cancelled."""
        with self._turn:
            if not self.done():
                self.set_exception(error)

    def _succeed(self, data: bytes | None) -> None:
        try:
            value = cast("R", self._decode(data))
        except Exception as error:  # the edge of a job: a class of the job's may refuse to be read back
            self.fail(error)
            return
        with self._turn:
            if not self.done():
                self.set_result(value)

    def end_cancelled(self) -> None:
        """Be cancelled, unless it has a result."""
        with self._turn:
            if not self.done():
                super().cancel()
                # Only this wakes those who wait for several futures.
                self.set_running_or_notify_cancel()


class Executor(concurrent.futures.Executor):
    """A ``concurrent.futures.Executor`` whose calls are durable jobs with the options given here.

    Takes every function that can be imported by its name; one made by ``@app.job`` keeps its own options. Without ``app`` it
    opens one by the configuration and closes it at ``shutdown``. Leaving ``with`` waits for all jobs. A program that ends
    without it leaves its jobs pending and durable: the next process on the same store, or the server, runs them.

    Callbacks of futures run one after the other in a thread of the executor. Arguments and results travel as JSON unless
    ``encoding`` says otherwise.
    """

    def __init__(self, app: App | None = None, /, **options: Unpack[OptionArguments]) -> None:
        """Raises ``InvalidRequest`` for a wrong option."""
        from blixard.sdk.app import App

        self._options = JobOptions().changed(options)
        self._app = App(DEFAULT_NAME) if app is None else app
        self._owns_app = app is None
        self._lock = threading.Lock()
        self._is_shut = False
        self._collector: _Collector | None = None

    @overload
    def submit(self, fn: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs) -> JobFuture[R]: ...
    @overload
    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> JobFuture[R]: ...
    def submit(self, fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> JobFuture[Any]:
        """Store a call as a job and return its future; the job is durable when this returns.

        Raises ``RuntimeError`` after ``shutdown``, and what ``JobFunction.submit`` raises.
        """
        function, words, names = unwrap(_plain(fn), args, kwargs)
        template = self._template(fn, function)
        return self._store(template, [template.encode(words, names)])[0]

    @overload
    def map(
        self,
        fn: Callable[..., Coroutine[Any, Any, R]],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[R]: ...
    @overload
    def map(
        self,
        fn: Callable[..., R],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[R]: ...
    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],  # Any: as in concurrent.futures
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """Call ``fn`` with the items of the iterables side by side; yield results in order, as ``concurrent.futures`` does.

        All inputs are taken and stored at once; with ``buffersize`` so many jobs ahead of the results taken. ``chunksize``: so
        many calls in one job, one after the other. ``timeout``: seconds from this call on, then ``TimeoutError``. Leaving the
        loop cancels the jobs that are left.
        """
        _check_sizes(chunksize, buffersize)
        deadline = Deadline(timeout)
        function, words, names = unwrap(_plain(fn), (), {})
        template = self._template(fn, function, in_chunks=chunksize > 1)
        calls = ((*words, *call) for call in zip(*iterables, strict=False))
        arguments = _arguments(template, calls, names, chunksize)
        first = arguments if buffersize is None else islice(arguments, buffersize)
        self._check_open()
        waiting: deque[JobFuture[Any]] = deque()  # Any: a list of results or one
        while taken := list(islice(first, MAX_BATCH_JOBS)):
            waiting.extend(self._store(template, taken))
        refill = None if buffersize is None else partial(self._store_next, template, arguments)
        results = _results(waiting, refill, deadline)
        return chain.from_iterable(results) if chunksize > 1 else results

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls. ``wait`` for all jobs; ``cancel_futures`` cancels those that no worker has started. Allowed twice."""
        with self._lock:
            self._is_shut = True
            collector = self._collector
        if collector is None:
            if self._owns_app:
                self._app.close()
            return
        if cancel_futures:
            collector.cancel_pending()
        collector.finish(wait=wait)

    def _store_next(self, template: JobTemplate, arguments: Iterator[bytes]) -> list[JobFuture[Any]]:
        taken = list(islice(arguments, 1))
        return self._store(template, taken) if taken else []

    def _store(self, template: JobTemplate, arguments: Sequence[bytes]) -> list[JobFuture[Any]]:
        collector = self._hold_collector()
        try:
            return collector.store(template, arguments)
        finally:
            collector.release()

    def _hold_collector(self) -> _Collector:
        """Return the collector, which does not end before it is released."""
        with self._lock:
            self._refuse_if_shut()
            collector = self._collector
            if collector is None or not collector.try_hold():
                collector = self._collector = _Collector(self._app, close_app=self._owns_app)
                # An executor that is dropped without a word takes no more calls either.
                weakref.finalize(self, collector.finish, wait=False).atexit = False
                collector.try_hold()
            return collector

    def _check_open(self) -> None:
        with self._lock:
            self._refuse_if_shut()

    def _refuse_if_shut(self) -> None:
        if self._is_shut:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _template(
        self, given: Callable[..., object], function: Callable[..., object], *, in_chunks: bool = False
    ) -> JobTemplate:
        check_not_importing(function)
        options = given.template.options if isinstance(given, JobFunction) else self._options
        return JobTemplate(self._app, function, options, in_chunks=in_chunks)


class _Collector:
    """Gives the futures of one executor their results, in a thread of its own."""

    def __init__(self, app: App, *, close_app: bool) -> None:
        self._app = app
        self._close_app = close_app
        self._client = app.client
        self._ends = Ends(app.patience)
        self._futures: dict[str, JobFuture[Any]] = {}
        self._lock = threading.Lock()
        self._held = 0
        self._is_finishing = False
        self._has_ended = False
        self._watching = self._client.start(self._ends.watch)
        self._thread = threading.Thread(target=self._run, name="blixard executor", daemon=True)
        self._thread.start()

    def try_hold(self) -> bool:
        """Keep it from ending until ``release``; False if it has ended."""
        with self._lock:
            self._held += not self._has_ended
            return not self._has_ended

    def release(self) -> None:
        with self._lock:
            self._held -= 1
        self._wake()

    def store(self, template: JobTemplate, arguments: Sequence[bytes]) -> list[JobFuture[Any]]:
        """Submit one job per item; return their futures in order."""
        return self._client.call(partial(self._store, template=template, arguments=arguments))

    async def _store(
        self, client: AsyncClient, template: JobTemplate, arguments: Sequence[bytes]
    ) -> list[JobFuture[Any]]:
        ids = await template.submit(client, arguments)
        encoding, patience = template.options.encoding, self._app.patience
        futures = [
            JobFuture(JobHandle[Any](self._client, job_id, encoding, patience), template.decode) for job_id in ids
        ]
        with self._lock:
            self._futures.update(zip(ids, futures, strict=True))
        self._ends.add(ids)
        return futures

    def cancel_pending(self) -> None:
        with self._lock:
            futures = dict(self._futures)
        for job_id in self._client.call(partial(cancel_jobs, ids=list(futures), only_pending=True)):
            futures[job_id].end_cancelled()

    def finish(self, *, wait: bool) -> None:
        """End once every future has its result."""
        with self._lock:
            self._is_finishing = True
        self._wake()
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        # A closed loop has woken everybody already.
        with contextlib.suppress(RuntimeError):
            self._watching.get_loop().call_soon_threadsafe(self._ends.wake)

    def _run(self) -> None:
        try:
            while not self._is_over():
                for result in self._client.call(lambda _: self._ends.take()):
                    self._end_one(result)
        except BaseException as error:  # the edge of a thread: told to everybody who waits
            self._fail(error)
        finally:
            self._client.stop(self._watching)
            if self._close_app:
                self._app.close()

    def _is_over(self) -> bool:
        with self._lock:
            self._has_ended = self._is_finishing and not self._held and not self._futures
            return self._has_ended

    def _end_one(self, result: JobResult) -> None:
        future = self._futures[result.id]
        data = None if result.result is None else bytes(result.result)
        if result.result_blob is not None:
            data = self._client.call(partial(self._fetch, result=result))
        future.end(result, data)
        with self._lock:
            del self._futures[result.id]

    async def _fetch(self, client: AsyncClient, result: JobResult) -> bytes | None:
        return await self._app.patience.insist(partial(result_bytes, client, result))

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._has_ended = True
            futures, self._futures = self._futures, {}
        for future in futures.values():
            future.fail(error)


async def cancel_jobs(client: AsyncClient, ids: Sequence[str], *, only_pending: bool) -> list[str]:
    """Cancel those that have not ended, or have not even started; return which."""
    turns = asyncio.Semaphore(CANCELS_AT_ONCE)

    async def cancel(job_id: str) -> str | None:
        async with turns:
            try:
                if only_pending and (await client.job(job_id)).state not in UNSTARTED:
                    return None
                await client.cancel(job_id)
            except (InvalidTransition, JobNotFound):
                return None  # it has ended meanwhile
            return job_id

    return [found for found in await asyncio.gather(*map(cancel, ids)) if found is not None]


def _plain(function: Callable[..., R]) -> Callable[..., R]:
    return function.__blixard_function__ if isinstance(function, JobFunction) else function


def _check_sizes(chunksize: int, buffersize: object) -> None:
    """Refuse what ``concurrent.futures`` refuses, in its words."""
    if chunksize < 1:
        raise ValueError("chunksize must be >= 1.")
    if buffersize is not None and not isinstance(buffersize, int):
        raise TypeError("buffersize must be an integer or None")
    if buffersize is not None and buffersize < 1:
        raise ValueError("buffersize must be None or > 0")


def _arguments(
    template: JobTemplate, calls: Iterator[tuple[object, ...]], names: Mapping[str, object], chunksize: int
) -> Iterator[bytes]:
    if chunksize == 1:
        yield from (template.encode(call, names) for call in calls)
    while chunksize > 1 and (chunk := list(islice(calls, chunksize))):
        yield template.encode_chunk(chunk, names)


def _results(
    waiting: deque[JobFuture[Any]], refill: Callable[[], list[JobFuture[Any]]] | None, deadline: Deadline
) -> Generator[Any, None, None]:
    try:
        while waiting:
            if refill is not None:
                waiting.extend(refill())
            yield _result_or_cancel(waiting.popleft(), deadline)
    finally:
        _cancel_all(waiting)


def _result_or_cancel(future: JobFuture[R], deadline: Deadline) -> R:
    try:
        return future.result(deadline.left())
    finally:
        future.cancel()


def _cancel_all(futures: Iterable[JobFuture[Any]]) -> None:
    """Cancel many at once: one after the other each would cost a round trip."""
    left = {future.job_id: future for future in futures if not future.done()}
    if left:
        client = next(iter(left.values())).handle.client
        for job_id in client.call(partial(cancel_jobs, ids=list(left), only_pending=False)):
            left[job_id].end_cancelled()

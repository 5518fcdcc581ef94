"""A function that can be called as ever, or submitted as a durable job."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar, Unpack, cast

from blixard.client.endings import result_bytes
from blixard.errors import InvalidRequest
from blixard.sdk.ends import error_of
from blixard.sdk.handle import JobHandle
from blixard.sdk.mapping import (
    AsTheyCome,
    BatchMap,
    Ended,
    InOrder,
    MapSource,
    WindowMap,
    check_timeout,
    check_window,
)
from blixard.sdk.options import JobOptions, OptionArguments
from blixard.sdk.patience import Deadline
from blixard.sdk.surroundings import check_not_importing
from blixard.sdk.template import JobTemplate

if TYPE_CHECKING:
    from blixard.client.blocking import Client
    from blixard.client.contract import AsyncClient
    from blixard.sdk.app import App

P = ParamSpec("P")
R = TypeVar("R")


class JobFunction(Generic[P, R]):
    """Made by ``@app.job``. Calling it runs the function here and now; ``submit`` and ``map`` run it as jobs."""

    __name__: str
    __qualname__: str

    def __init__(self, app: App, function: Callable[P, R], options: JobOptions) -> None:
        self._app = app
        self._options = options
        self.__blixard_function__ = function
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.__blixard_function__(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<job function {self._app.name}.{self.__blixard_function__.__qualname__}>"

    @property
    def template(self) -> JobTemplate:
        """What makes this function's jobs."""
        return JobTemplate(self._app, self.__blixard_function__, self._options)

    def options(self, **changes: Unpack[OptionArguments]) -> Self:
        """Return the same function with other options, such as ``f.options(priority=5).submit(1)``.

        Raises ``InvalidRequest`` at once for an unknown option or a wrong value, naming it and what it takes.
        """
        return type(self)(self._app, self.__blixard_function__, self._options.changed(changes))

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """Store a call as a job and return at once; it is durable when this returns.

        Raises ``InvalidRequest`` when the arguments do not serialise or an input file is missing, ``Unavailable`` when the
        store is not there.
        """
        template = self.template
        data = template.encode(args, kwargs)
        ids = self._client.call(lambda client: template.submit(client, [data]))
        return self._handle(ids[0])

    async def submit_async(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """Do the same in an event loop."""
        template = self.template
        data = template.encode(args, kwargs)
        ids = await self._client.call_async(lambda client: template.submit(client, [data]))
        return self._handle(ids[0])

    def map(
        self,
        inputs: Iterable[object],
        *,
        ordered: bool = True,
        resume: bool = False,
        return_exceptions: bool = False,
        timeout: float | None = None,
        max_in_flight: int | None = None,
    ) -> Iterator[R]:
        """Call the function once per input, as durable jobs; yield results in the order of the inputs as they come.

        ``ordered=False`` yields in the order of completion. ``resume=True`` attaches to an earlier map of the same code and
        inputs, such as one whose process was killed, and only runs what has not completed. The first failed call raises,
        unless ``return_exceptions`` yields errors in place of results. ``timeout``: seconds for all of it, from the first
        result asked for on, then ``WaitTimedOut``. ``max_in_flight``: take inputs one by one as room is made, with so many at
        most submitted and not yet yielded: inputs without end in bounded memory. Leaving the loop leaves what was submitted.
        """
        check_timeout(timeout)
        source = self._source(inputs, resume, max_in_flight)
        return self._results(source, ordered, return_exceptions, timeout)

    def map_async(
        self,
        inputs: Iterable[object],
        *,
        ordered: bool = True,
        resume: bool = False,
        return_exceptions: bool = False,
        timeout: float | None = None,  # the user's word, as in map
        max_in_flight: int | None = None,
    ) -> AsyncIterator[R]:
        """Do the same in an event loop: ``async for value in f.map_async(inputs)``."""
        check_timeout(timeout)
        source = self._source(inputs, resume, max_in_flight)
        return self._results_async(source, ordered, return_exceptions, timeout)

    def _source(self, inputs: Iterable[object], resume: bool, max_in_flight: int | None) -> MapSource:
        template = self.template
        if max_in_flight is None:
            return BatchMap(template, [template.encode((item,), {}) for item in inputs], resume=resume)
        if resume:
            raise InvalidRequest(
                "a map is known again by all of its inputs, which max_in_flight does not wait for",
                field="resume",
                hint="leave out resume or max_in_flight",
            )
        return WindowMap(template, inputs, check_window(max_in_flight))

    def _results(self, source: MapSource, ordered: bool, return_exceptions: bool, timeout: float | None) -> Iterator[R]:
        client, deadline = self._client, Deadline(timeout)
        order = InOrder() if ordered else AsTheyCome()
        client.call(source.begin)
        working = client.start(source.work)
        try:
            while page := client.call(partial(source.next_page, inputs=source.refill(), deadline=deadline)):
                for item in order.sort(page):
                    data = client.call(partial(self._fetch, item=item)) if item.result.result_blob else None
                    source.note_yield()
                    yield self._value(item, data, return_exceptions=return_exceptions)
        finally:
            client.stop(working)

    async def _results_async(
        self,
        source: MapSource,
        ordered: bool,
        return_exceptions: bool,
        timeout: float | None,  # noqa: ASYNC109 - for all
    ) -> AsyncIterator[R]:
        client, deadline = self._client, Deadline(timeout)
        order = InOrder() if ordered else AsTheyCome()
        await client.call_async(source.begin)
        working = client.start(source.work)
        try:
            while page := await client.call_async(partial(source.next_page, inputs=source.refill(), deadline=deadline)):
                for item in order.sort(page):
                    fetch = partial(self._fetch, item=item)
                    data = await client.call_async(fetch) if item.result.result_blob else None
                    source.note_yield()
                    yield self._value(item, data, return_exceptions=return_exceptions)
        finally:
            client.stop(working)

    async def _fetch(self, client: AsyncClient, item: Ended) -> bytes | None:
        """Return a result that is a blob: one at a time, since a page may have a thousand."""
        return await self._app.patience.insist(lambda: result_bytes(client, item.result))

    def _value(self, item: Ended, data: bytes | None, *, return_exceptions: bool) -> R:
        error = error_of(item.result)
        if error is None:
            inline = item.result.result
            return cast("R", self.template.decode(data if inline is None else bytes(inline)))
        if return_exceptions:
            return cast("R", error)  # the caller asked for errors among the results
        raise error

    @property
    def _client(self) -> Client:
        check_not_importing(self.__blixard_function__)
        return self._app.client

    def _handle(self, job_id: str) -> JobHandle[R]:
        return JobHandle(self._app.client, job_id, self._options.encoding, self._app.patience)


class AsyncJobFunction(JobFunction[P, R]):
    """Made by ``@app.job`` from an ``async def``. Calling it gives the coroutine; a job awaits it, so its result is the value."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:  # type: ignore[override]  # the function's own
        return super().__call__(*args, **kwargs)  # type: ignore[return-value]  # the same

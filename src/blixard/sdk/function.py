"""A function that can be called as ever, or submitted as a durable job."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar, Unpack, cast

from blixard.client.submission import make_job
from blixard.domain.payload import FunctionPayload
from blixard.domain.spec import JobSpec
from blixard.sdk.handle import JobHandle
from blixard.sdk.mapping import Ended, MapStream
from blixard.sdk.options import JobOptions, OptionArguments
from blixard.sdk.surroundings import check_not_importing
from blixard.sdk.values import decode_result, encode_arguments

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
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.__blixard_function__(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<job function {self._app.name}.{self.__blixard_function__.__qualname__}>"

    def options(self, **changes: Unpack[OptionArguments]) -> JobFunction[P, R]:
        """Return the same function with other options, such as ``f.options(priority=5).submit(1)``."""
        return JobFunction(self._app, self.__blixard_function__, self._options.changed(changes))

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """Store a call as a job and return at once; it is durable when this returns.

        Raises ``InvalidRequest`` when the arguments do not serialise or an option is wrong, ``Unavailable`` when the store is.
        """
        data = encode_arguments(self._options.encoding, args, kwargs)
        return self._handle(self._client.call(lambda client: self._store(client, data)))

    async def submit_async(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """Do the same in an event loop."""
        data = encode_arguments(self._options.encoding, args, kwargs)
        return self._handle(await self._client.call_async(lambda client: self._store(client, data)))

    def map(
        self, inputs: Iterable[object], *, ordered: bool = True, resume: bool = False, return_exceptions: bool = False
    ) -> Iterator[R]:
        """Call the function once per input, as durable jobs; yield results in the order of the inputs as they come.

        ``ordered=False`` yields in the order of completion. ``resume=True`` attaches to an earlier map of the same code and
        inputs, such as one whose process was killed, and only runs what has not completed. The first failed call raises,
        unless ``return_exceptions`` yields errors in place of results. Leaving the loop leaves what was submitted.
        """
        arguments = [encode_arguments(self._options.encoding, (item,), {}) for item in inputs]
        client = self._client
        stream = client.call(lambda c: self._begin(c, arguments, resume=resume))
        submitting = client.start(lambda _: stream.submit())
        try:
            pages = iter(lambda: client.call(lambda c: stream.next_page(c, submitting)), [])
            items = (item for page in pages for item in page)
            for item in _in_order(items) if ordered else items:
                yield self._value(item, return_exceptions=return_exceptions)
        finally:
            client.stop(submitting)

    async def _begin(self, client: AsyncClient, arguments: list[bytes], *, resume: bool) -> MapStream:
        spec = await self._spec(client)
        return await MapStream.open(client, spec, arguments, self._options.priority, resume=resume)

    def _value(self, item: Ended, *, return_exceptions: bool) -> R:
        if item.error is None:
            return cast("R", decode_result(self._options.encoding, item.data))
        if return_exceptions:
            return cast("R", item.error)  # the caller asked for errors among the results
        raise item.error

    @property
    def _client(self) -> Client:
        check_not_importing(self.__blixard_function__)
        return self._app.client

    def _handle(self, job_id: str) -> JobHandle[R]:
        return JobHandle(self._app.client, job_id, self._options.encoding)

    async def _store(self, client: AsyncClient, data: bytes) -> str:
        spec = await self._spec(client)
        return await client.submit(spec, await make_job(client, data, priority=self._options.priority))

    async def _spec(self, client: AsyncClient) -> JobSpec:
        """Return the spec, its code uploaded."""
        code = self._app.bundler.bundle_function(self.__blixard_function__, include=self._options.include)
        digest = None
        if code.bundle is not None:
            digest = code.bundle.digest
            await self._app.upload(client, digest, code.bundle.archive)
        payload = FunctionPayload(function=code.function, bundle=digest, encoding=self._options.encoding)
        return self._options.spec(f"{self._app.name}.{self.__blixard_function__.__qualname__}", payload)


def _in_order(items: Iterator[Ended]) -> Iterator[Ended]:
    """Yield in the order of the inputs, keeping what came early."""
    early: dict[int, Ended] = {}
    expected = 0
    for item in items:
        early[item.index] = item
        while expected in early:
            yield early.pop(expected)
            expected += 1

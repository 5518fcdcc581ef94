"""Waiting for several handles: all of them, or each as it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, overload

from blixard.errors import BlixardError, InvalidRequest, JobError, WaitTimedOut, WorkerLost
from blixard.protocol.jobs import JobResult
from blixard.sdk.handle import JobHandle
from blixard.sdk.mapping import check_timeout
from blixard.sdk.patience import Deadline
from blixard.sdk.waiting import Ends

if TYPE_CHECKING:
    from blixard.client.blocking import Client

R = TypeVar("R")


@overload
def gather(
    *handles: JobHandle[R], timeout: float | None = None, return_exceptions: Literal[False] = False
) -> list[R]: ...
@overload
def gather(*handles: JobHandle[R], timeout: float | None = None, return_exceptions: bool) -> list[R | BlixardError]: ...
def gather(
    *handles: JobHandle[R], timeout: float | None = None, return_exceptions: bool = False
) -> list[R] | list[R | BlixardError]:
    """Wait for all of these jobs and return their results in the order of the arguments.

    The first job that ends without a result raises what its ``result`` raises; the others go on. ``return_exceptions`` puts
    errors in the place of results instead. ``timeout``: seconds for all of them, then ``WaitTimedOut``. Raises
    ``InvalidRequest`` for handles of different apps.
    """
    found: dict[JobHandle[R], R | BlixardError] = {}
    for handle in as_completed(handles, timeout=timeout):
        try:
            found[handle] = handle.result()
        except (JobError, WorkerLost) as error:
            if not return_exceptions:
                raise
            found[handle] = error
    return [found[handle] for handle in handles]


@overload
async def gather_async(
    *handles: JobHandle[R],
    timeout: float | None = None,  # noqa: ASYNC109 - the user's word
    return_exceptions: Literal[False] = False,
) -> list[R]: ...
@overload
async def gather_async(
    *handles: JobHandle[R],
    timeout: float | None = None,  # noqa: ASYNC109 - the user's word
    return_exceptions: bool,
) -> list[R | BlixardError]: ...
async def gather_async(
    *handles: JobHandle[R],
    timeout: float | None = None,  # noqa: ASYNC109 - the user's word
    return_exceptions: bool = False,
) -> list[R] | list[R | BlixardError]:
    """Do the same in an event loop, which stays free."""
    found: dict[JobHandle[R], R | BlixardError] = {}
    async for handle in as_completed_async(handles, timeout=timeout):
        try:
            found[handle] = await handle.result_async()
        except (JobError, WorkerLost) as error:
            if not return_exceptions:
                raise
            found[handle] = error
    return [found[handle] for handle in handles]


def as_completed(handles: Iterable[JobHandle[R]], *, timeout: float | None = None) -> Iterator[JobHandle[R]]:
    """Yield each handle once its job has ended, however; its ``result`` then does not wait.

    ``timeout``: seconds from the first handle asked for on, then ``WaitTimedOut``; the jobs go on. A handle that is given
    twice comes once. Raises ``InvalidRequest`` for handles of different apps, ``JobNotFound``.
    """
    return _completed(_Collection(handles, timeout))


def as_completed_async(
    handles: Iterable[JobHandle[R]],
    *,
    timeout: float | None = None,
) -> AsyncIterator[JobHandle[R]]:
    """Do the same in an event loop, which stays free; for ``async for``."""
    return _completed_async(_Collection(handles, timeout))


class _Collection(Generic[R]):
    """Handles of one client that have not ended yet."""

    def __init__(self, handles: Iterable[JobHandle[R]], timeout: float | None) -> None:
        check_timeout(timeout)
        self._timeout = timeout
        self._handles: dict[str, list[JobHandle[R]]] = {}
        given = _checked(handles)
        for handle in dict.fromkeys(given):
            self._handles.setdefault(handle.id, []).append(handle)
        self.client: Client | None = given[0].client if given else None
        self.ends = Ends(given[0].patience) if given else None

    def __len__(self) -> int:
        return len(self._handles)

    def begin(self) -> Deadline:
        assert self.ends is not None
        self.ends.add(self._handles)
        return Deadline(self._timeout)

    def sort(self, page: list[JobResult]) -> Iterator[JobHandle[R]]:
        """Yield the handles of ended jobs, each told its end."""
        if not page:
            raise WaitTimedOut(f"{len(self)} jobs have not ended after {self._timeout:g} s; they go on")
        for result in page:
            for handle in self._handles.pop(result.id):
                handle.note_end(result)
                yield handle


def _completed(waiting: _Collection[R]) -> Iterator[JobHandle[R]]:
    client, ends = waiting.client, waiting.ends
    if client is None or ends is None:
        return
    deadline = waiting.begin()
    client.call(ends.look)
    watching = client.start(ends.watch)
    try:
        while len(waiting):
            yield from waiting.sort(client.call(lambda _: ends.take(deadline)))
    finally:
        client.stop(watching)


async def _completed_async(waiting: _Collection[R]) -> AsyncIterator[JobHandle[R]]:
    client, ends = waiting.client, waiting.ends
    if client is None or ends is None:
        return
    deadline = waiting.begin()
    await client.call_async(ends.look)
    watching = client.start(ends.watch)
    try:
        while len(waiting):
            for handle in waiting.sort(await client.call_async(lambda _: ends.take(deadline))):
                yield handle
    finally:
        client.stop(watching)


def _checked(handles: Iterable[JobHandle[R]]) -> Sequence[JobHandle[R]]:
    given = list(handles)
    for handle in given:
        if not isinstance(handle, JobHandle):
            raise InvalidRequest(
                f"{handle!r} is no job handle", field="handles", hint="pass what submit returned, or app.handle(id)"
            )
        if handle.client is not given[0].client:
            raise InvalidRequest(
                "these handles belong to different apps",
                field="handles",
                hint="wait for the jobs of each app by itself",
            )
    return given

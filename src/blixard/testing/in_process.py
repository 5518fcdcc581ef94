"""Jobs without workers: run in the process of a test as they are submitted, or only recorded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from blixard.client.blocking import Client
from blixard.client.contract import AsyncClient
from blixard.client.plane_client import PlaneClient
from blixard.domain.ids import DEFAULT_NAMESPACE
from blixard.domain.payload import FunctionPayload
from blixard.errors import InvalidRequest
from blixard.protocol.jobs import BatchResults, SubmitReply, SubmitRequest
from blixard.sdk.app import App
from blixard.services.control_plane import ControlPlane, ControlPlaneConfig, build_control_plane
from blixard.storage.logs import LocalLogStore
from blixard.testing.clock import FakeClock
from blixard.testing.inline_run import Variables, run_call
from blixard.testing.inline_worker import InlineCall, InlineEnding, InlineWorker
from blixard.testing.storage import memory_blob_store, memory_database
from blixard.testing.submissions import Submissions

R = TypeVar("R")
LEASE_SECONDS = 1e9
"""However far a test moves its clock, a job that runs in its own thread is not lost."""
NO_LOGS = Path("/nonexistent/blixard-inline")
"""Output of jobs goes where the test's goes; nothing is ever written here."""


@contextmanager
def inline(app: App, *, clock: FakeClock | None = None) -> Iterator[Submissions]:
    """Run the app's jobs in this process meanwhile: each at once, in the thread that submits it, before ``submit`` returns.

    Queue, retries, states and errors are the product's own, on a store in memory. Arguments and results travel through the
    encoding of the job, a failed job raises ``JobFailed`` with its traceback, and a failed attempt is tried again with
    ``clock`` moved ahead instead of waiting. Isolation, grants, timeouts and limits of memory are not applied; output goes
    where the test's own goes; ``input`` files lie in a temporary working directory. Submitted within an event loop, a job
    runs in a thread of its own. Nothing of it is left at the end.
    """
    with _taken_over(app, clock, is_run=True) as submissions:
        yield submissions


@contextmanager
def submitted(app: App, *, clock: FakeClock | None = None) -> Iterator[Submissions]:
    """Record the app's jobs meanwhile and run none: they stay pending. Waiting for one raises ``InvalidRequest`` at once."""
    with _taken_over(app, clock, is_run=False) as submissions:
        yield submissions


@contextmanager
def _taken_over(app: App, clock: FakeClock | None, *, is_run: bool) -> Iterator[Submissions]:
    submissions = Submissions(clock or FakeClock())
    client = InlineClient(submissions, is_run=is_run)
    with app.using(client), client:
        yield submissions


class InlinePlane(PlaneClient):
    """A control plane in memory that tells of every submission: ``submissions`` of the job, the worker of what it asks for."""

    def __init__(self, plane: ControlPlane, submissions: Submissions, worker: InlineWorker | None, bell: Bell) -> None:
        super().__init__(plane, DEFAULT_NAMESPACE, attendant=Nobody() if worker is None else None)
        self._plane = plane
        self._submissions = submissions
        self._worker = worker
        self._bell = bell

    async def __aenter__(self) -> Self:
        await self._plane.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._plane.close()

    async def submit_many(self, request: SubmitRequest) -> SubmitReply:
        """Take every isolation: which of them this machine can give does not matter here."""
        reply = await self._plane.commands.submit(DEFAULT_NAMESPACE, request)
        if isinstance(request.spec.payload, FunctionPayload):
            await self._note(request, request.spec.payload, reply)
        if self._worker is not None:
            self._worker.expect(request.spec.requirements.labels)
            self._bell.ring()
        return reply

    async def batch_results(
        self, batch_id: str, *, after: int = 0, limit: int = 1000, wait: float = 0.0
    ) -> BatchResults:
        """Let a map that nobody runs be submitted as a whole before it is refused: what is recorded must not be chance."""
        if self._worker is None:
            while (batch := await self.batch(batch_id)).submitted < batch.total:  # noqa: ASYNC110 - each look is a query
                await asyncio.sleep(0)
        return await super().batch_results(batch_id, after=after, limit=limit, wait=wait)

    async def _note(self, request: SubmitRequest, payload: FunctionPayload, reply: SubmitReply) -> None:
        for job_id, job in zip(reply.ids, request.jobs, strict=True):
            blob = job.arguments_blob
            arguments = bytes(job.arguments) if blob is None else await self._plane.blobs.get(blob)
            self._submissions.note(request.spec, payload, job, job_id, arguments)


class InlineClient(Client):
    """Lets the threads that call it run the jobs."""

    def __init__(self, submissions: Submissions, *, is_run: bool) -> None:
        self._plane = build_control_plane(
            memory_database(),
            memory_blob_store(),
            LocalLogStore(NO_LOGS),
            ControlPlaneConfig(lease_seconds=LEASE_SECONDS),
            submissions.clock,
        )
        self._worker = InlineWorker(self._plane, submissions.clock) if is_run else None
        self._bell = Bell()
        self._variables = Variables()
        super().__init__(lambda: InlinePlane(self._plane, submissions, self._worker, self._bell))

    async def call_async(self, work: Callable[[AsyncClient], Coroutine[None, None, R]]) -> R:
        future = self.begin(work)
        future.add_done_callback(lambda _: self._bell.ring())
        try:
            while not future.done():
                heard = self._bell.rings
                self._run_ready()
                if not future.done():
                    await asyncio.to_thread(self._bell.wait, heard)
        except BaseException:
            future.cancel()
            raise
        self._run_ready()
        return future.result()

    def _call(self, work: Callable[[AsyncClient], Coroutine[None, None, R]]) -> R:
        future = self.begin(work)
        future.add_done_callback(lambda _: self._bell.ring())
        try:
            while not future.done():
                heard = self._bell.rings
                self._run_ready()
                if not future.done():
                    self._bell.wait(heard)
        except BaseException:
            future.cancel()
            raise
        self._run_ready()
        return future.result()

    def _run_ready(self) -> None:
        """Run what is due, here and now."""
        ending: InlineEnding | None = None
        while self._worker is not None:
            call = self.begin(partial(self._next_call, self._worker, ending)).result()
            if call is None:
                return
            ending = run_call(call, self._variables)

    async def _next_call(
        self, worker: InlineWorker, ending: InlineEnding | None, client: AsyncClient
    ) -> InlineCall | None:
        del client
        return await worker.next_call(ending)


class Bell:
    """Rung in one thread, heard in others."""

    def __init__(self) -> None:
        self.rings = 0
        self._changed = threading.Condition()

    def ring(self) -> None:
        with self._changed:
            self.rings += 1
            self._changed.notify_all()

    def wait(self, heard: int) -> None:
        """Return once it has rung more often than ``heard``."""
        with self._changed:
            self._changed.wait_for(lambda: self.rings != heard)


class Nobody:
    """Runs no jobs, and says so to who waits for one."""

    async def attend(self, waiting: Coroutine[None, None, R]) -> R:
        waiting.close()
        raise InvalidRequest(
            "within submitted(app) jobs are recorded and not run, so this one never ends",
            hint="use inline(app) to run them",
        )

"""The client of a control plane in this process."""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Protocol, Self, TypeVar

import msgspec

from blixard.domain.job import NewJob
from blixard.domain.limits import KIB, MAX_WAIT_SECONDS
from blixard.domain.requirements import Isolation, WorkerType, worker_type_for
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.errors import InvalidRequest, JobNotFound, NotSupportedHere, WaitTimedOut
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
from blixard.services.control_plane import ControlPlane
from blixard.services.health import check_store

READ_BYTES = 256 * KIB
FIT_SECONDS = 2.0
"""After so long without an end, ask whether the own worker can run the job at all: nobody else would ever take it."""
R = TypeVar("R")
_read_json = msgspec.json.Decoder(msgspec.Raw).decode


class Attendant(Protocol):
    """Sees to it that jobs run while somebody waits for them."""

    async def attend(self, waiting: Coroutine[None, None, R]) -> R: ...


class Bystander:
    """Knows that others run the jobs."""

    async def attend(self, waiting: Coroutine[None, None, R]) -> R:
        return await waiting


class PlaneClient:
    """``AsyncClient`` on the services themselves. Opening and closing the control plane is its owner's.

    ``submitter`` is asked at every submission who runs the jobs (empty: any worker). Every call that really waits goes
    through ``attendant``.
    """

    def __init__(
        self,
        plane: ControlPlane,
        namespace: str,
        *,
        submitter: Callable[[], str] = lambda: "",
        attendant: Attendant | None = None,
        missing_for_vms: Callable[[], str] = lambda: "",
    ) -> None:
        self._missing_for_vms = missing_for_vms
        self._plane = plane
        self._namespace = namespace
        self._submitter = submitter
        self._attendant = attendant or Bystander()
        self._runs_own_jobs = attendant is not None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return

    async def submit(self, spec: JobSpec, job: NewJob | None = None) -> str:
        reply = await self.submit_many(SubmitRequest(spec=spec, jobs=[job or NewJob()]))
        return reply.ids[0]

    async def submit_many(self, request: SubmitRequest) -> SubmitReply:
        needs = request.spec.requirements
        if worker_type_for(request.spec.runtime, needs.isolation, needs.vm_mode) is WorkerType.MICROVM:
            self._check_machines(needs.isolation)
        _check_arguments(request.jobs)
        return await self._plane.commands.submit(self._namespace, request, submitter=self._submitter())

    def _check_machines(self, isolation: Isolation) -> None:
        """Only this machine would run it, and nothing less is ever given instead. Raises ``NotSupportedHere``."""
        if reason := self._missing_for_vms():
            raise NotSupportedHere(
                f"isolation {isolation} in a virtual machine cannot be had here: {reason}",
                hint="`blixard vm setup` installs what it can; `blixard doctor` says what this machine can give",
            )

    async def open_batch(self, request: OpenBatchRequest) -> BatchView:
        return await self._plane.commands.open_batch(self._namespace, request)

    async def batch(self, batch_id: str) -> BatchView:
        return await self._plane.queries.batch(self._namespace, batch_id)

    async def batch_results(
        self, batch_id: str, *, after: int = 0, limit: int = 1000, wait: float = 0.0
    ) -> BatchResults:
        async def look(seconds: float) -> BatchResults:
            return await self._plane.queries.batch_results(
                self._namespace, batch_id, after=after, limit=limit, wait=seconds
            )

        async def pending() -> str | None:
            where = JobFilter(batch=batch_id, states=(JobState.PENDING,))
            return next((job.id for job in (await self.jobs(where, limit=1)).jobs), None)

        return await self._look(look, lambda found: bool(found.results) or found.done, wait, pending)

    async def cancel_batch(self, batch_id: str) -> int:
        return await self._plane.commands.cancel_batch(self._namespace, batch_id)

    async def job(self, job_id: str) -> JobDetail:
        return await self._plane.queries.job(self._namespace, job_id)

    async def jobs(self, where: JobFilter | None = None, *, limit: int = 100, cursor: str | None = None) -> JobPage:
        return await self._plane.queries.jobs(self._namespace, where or JobFilter(), limit=limit, cursor=cursor)

    async def wait(self, ids: Sequence[str], *, wait: float) -> WaitReply:
        async def look(seconds: float) -> WaitReply:
            return await self._plane.queries.wait(self._namespace, ids, wait=seconds)

        async def first() -> str | None:
            return next(iter(ids), None)

        deadline = time.monotonic() + wait
        while True:
            left = max(0.0, min(deadline - time.monotonic(), MAX_WAIT_SECONDS)) if wait > 0 else wait
            reply = await self._look(look, lambda found: bool(found.ended or found.unknown), left, first)
            if reply.ended or reply.unknown or time.monotonic() >= deadline:
                return reply

    async def result(self, job_id: str, *, timeout: float | None = None) -> JobResult:  # noqa: ASYNC109 - the user's word
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = MAX_WAIT_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
            reply = await self.wait([job_id], wait=min(left, MAX_WAIT_SECONDS))
            if reply.unknown:
                raise JobNotFound(job_id)
            if reply.ended:
                return reply.ended[0]
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimedOut(f"job {job_id!r} has not ended after {timeout:g} s; it goes on")

    async def cancel(self, job_id: str) -> CancelReply:
        return await self._plane.commands.cancel_job(self._namespace, job_id)

    async def retry(self, job_id: str) -> JobView:
        return await self._plane.commands.retry_job(self._namespace, job_id)

    async def why(self, job_id: str) -> WhyView:
        return await self._plane.queries.why(self._namespace, job_id)

    async def events(self, job_id: str) -> list[EventView]:
        return await self._plane.queries.events(self._namespace, job_id)

    async def logs(self, job_id: str, *, attempt: int | None = None, offset: int = 0, wait: float = 0.0) -> LogPageView:
        async def look(seconds: float) -> LogPageView:
            return await self._plane.logs.read(self._namespace, job_id, attempt=attempt, offset=offset, wait=seconds)

        return await self._look(look, lambda page: bool(page.entries) or page.ended, wait)

    async def put_blob(self, content: bytes | Path) -> str:
        return await self._plane.blobs.put(content)

    async def get_blob(self, digest: str) -> bytes:
        return await self._plane.blobs.get(digest)

    async def stream_blob(self, digest: str) -> AsyncIterator[bytes]:
        path = await self._plane.blobs.open_path(digest)
        if path is None:
            yield await self._plane.blobs.get(digest)
            return
        file = await asyncio.to_thread(path.open, "rb")
        try:
            while piece := await asyncio.to_thread(file.read, READ_BYTES):
                yield piece
        finally:
            file.close()

    async def stats(self) -> StatsView:
        return await self._plane.queries.stats(self._namespace)

    async def workers(self) -> list[WorkerView]:
        return await self._plane.workers.workers(self._namespace)

    async def drain_worker(self, session: str) -> WorkerView:
        return await self._plane.workers.drain(self._namespace, session)

    async def health(self) -> Health:
        """Try the store. Raises ``StoreUnavailable``."""
        await check_store(self._plane.database)
        return Health(status="ok", version=importlib.metadata.version("blixard"), checks={"store": "ok"})

    async def create_token(self, request: CreateTokenRequest) -> CreateTokenReply:
        return await self._plane.tokens.create(self._namespace, request)

    async def tokens(self) -> list[TokenView]:
        return await self._plane.tokens.tokens(self._namespace)

    async def revoke_token(self, token_id: str) -> TokenView:
        return await self._plane.tokens.revoke(self._namespace, token_id)

    async def prune(self) -> dict[str, int]:
        return await self._plane.maintenance.prune_now()

    async def _look(
        self,
        look: Callable[[float], Coroutine[None, None, R]],
        is_enough: Callable[[R], bool],
        wait: float,
        waited_for: Callable[[], Awaitable[str | None]] | None = None,
    ) -> R:
        """Look at once; only if that is not enough, wait, with the jobs attended to.

        ``waited_for`` names a job that must be able to run here: raises ``NotSupportedHere`` if it cannot.
        """
        found = await look(min(wait, 0.0))
        if is_enough(found) or wait <= 0:
            return found
        wait = min(wait, MAX_WAIT_SECONDS)
        if not self._runs_own_jobs or waited_for is None:
            return await self._attendant.attend(look(wait))
        step = FIT_SECONDS
        while True:
            found = await self._attendant.attend(look(min(wait, step)))
            wait -= step
            if is_enough(found) or wait <= 0:
                return found
            if (job_id := await waited_for()) is not None:
                _check_fit(await self.why(job_id))
            step *= 2  # on a busy machine the own worker may not have said yet what it can


def _check_arguments(jobs: Sequence[NewJob]) -> None:
    """A server reads them with the request; here nobody else does before they are stored."""
    for place, job in enumerate(jobs):
        try:
            _read_json(bytes(job.arguments).decode())
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the arguments are not JSON: {error}", field=f"jobs[{place}].arguments") from None


def _check_fit(view: WhyView) -> None:
    if not any(reason.code == "no_fitting_worker" for reason in view.reasons):
        return
    unfit = "; ".join(reason.text for reason in view.reasons if reason.code == "worker_unfit")
    raise NotSupportedHere(
        f"job {view.id} cannot run here: {unfit or view.summary}",
        hint="`blixard doctor` says what this machine lacks; change what the job asks for, or submit it to a server",
    )

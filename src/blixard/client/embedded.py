"""The client of a data directory: through the server that owns it if there is one, else on the file itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from blixard.client.contract import AsyncClient
from blixard.domain.ids import DEFAULT_NAMESPACE
from blixard.domain.job import NewJob
from blixard.domain.spec import JobSpec
from blixard.errors import InternalError
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
from blixard.storage.locks import is_free

if TYPE_CHECKING:
    from blixard.config.settings import Settings
    from blixard.infrastructure import InfrastructureFactory
    from blixard.worker.child import ChildWorker

STOP_MARGIN_SECONDS = 5.0


class EmbeddedClient:
    """Works without a server: submitting only writes; waiting starts one child worker that ends with this process.

    Jobs whose process is gone are continued by the next one that waits on the same directory. Use as ``async with``.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        factory: InfrastructureFactory | None = None,
    ) -> None:
        self._settings = settings
        self._given_factory = factory
        self._child: ChildWorker | None = None
        self._namespace = namespace
        self._opened = AsyncExitStack()
        self._client: AsyncClient | None = None

    @property
    def worker_pid(self) -> int | None:
        """The child worker that runs now, if there is one."""
        return None if self._child is None else self._child.pid

    async def __aenter__(self) -> Self:
        """Open. Raises ``StoreUnavailable`` for a directory that cannot be used."""
        if self._client is not None:
            return self
        data_dir = self._settings.storage.data_dir
        try:
            served = is_served(data_dir)
            self._client = await (self._reach_server(data_dir / "server.sock") if served else self._open_store())
        except BaseException:
            await self._opened.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._client = None
        await self._opened.aclose()

    @property
    def _inner(self) -> AsyncClient:
        if self._client is None:
            raise InternalError("the client is used outside of its `async with`")
        return self._client

    def _factory(self) -> InfrastructureFactory:
        from blixard.infrastructure import ProductionInfrastructureFactory

        return self._given_factory or ProductionInfrastructureFactory(self._settings)

    async def _reach_server(self, socket: Path) -> AsyncClient:
        from blixard.client.http import HttpClient
        from blixard.client.http_link import ServerAddress

        return await self._opened.enter_async_context(HttpClient(ServerAddress(socket=socket)))

    async def _open_store(self) -> AsyncClient:
        # Imported when needed: whoever talks to a server needs no store.
        from blixard.client.plane_client import PlaneClient
        from blixard.client.submitter import Submitter
        from blixard.worker.child import ChildWorker
        from blixard.worker.program import program_config

        factory = self._factory()
        plane = factory.create_control_plane()
        self._opened.push_async_callback(plane.close)
        await plane.open()
        submitter = Submitter(self._settings.storage.data_dir / "submitters")
        self._opened.callback(submitter.end)
        config = program_config(self._settings, submitter=submitter.id, namespace=self._namespace)
        grace = self._settings.server.shutdown_grace
        self._child = ChildWorker(config, stop_seconds=grace + STOP_MARGIN_SECONDS)
        self._opened.push_async_callback(self._child.stop)
        return PlaneClient(
            plane,
            self._namespace,
            submitter=submitter.use,
            attendant=self._child,
            missing_for_vms=factory.missing_for_vms,
        )

    async def submit(self, spec: JobSpec, job: NewJob | None = None) -> str:
        return await self._inner.submit(spec, job)

    async def submit_many(self, request: SubmitRequest) -> SubmitReply:
        return await self._inner.submit_many(request)

    async def open_batch(self, request: OpenBatchRequest) -> BatchView:
        return await self._inner.open_batch(request)

    async def batch(self, batch_id: str) -> BatchView:
        return await self._inner.batch(batch_id)

    async def batch_results(
        self, batch_id: str, *, after: int = 0, limit: int = 1000, wait: float = 0.0
    ) -> BatchResults:
        return await self._inner.batch_results(batch_id, after=after, limit=limit, wait=wait)

    async def cancel_batch(self, batch_id: str) -> int:
        return await self._inner.cancel_batch(batch_id)

    async def job(self, job_id: str) -> JobDetail:
        return await self._inner.job(job_id)

    async def jobs(self, where: JobFilter | None = None, *, limit: int = 100, cursor: str | None = None) -> JobPage:
        return await self._inner.jobs(where, limit=limit, cursor=cursor)

    async def wait(self, ids: Sequence[str], *, wait: float) -> WaitReply:
        return await self._inner.wait(ids, wait=wait)

    async def result(self, job_id: str, *, timeout: float | None = None) -> JobResult:  # noqa: ASYNC109 - the user's word
        return await self._inner.result(job_id, timeout=timeout)

    async def cancel(self, job_id: str) -> CancelReply:
        return await self._inner.cancel(job_id)

    async def retry(self, job_id: str) -> JobView:
        return await self._inner.retry(job_id)

    async def why(self, job_id: str) -> WhyView:
        return await self._inner.why(job_id)

    async def events(self, job_id: str) -> list[EventView]:
        return await self._inner.events(job_id)

    async def logs(self, job_id: str, *, attempt: int | None = None, offset: int = 0, wait: float = 0.0) -> LogPageView:
        return await self._inner.logs(job_id, attempt=attempt, offset=offset, wait=wait)

    async def put_blob(self, content: bytes | Path) -> str:
        return await self._inner.put_blob(content)

    async def get_blob(self, digest: str) -> bytes:
        return await self._inner.get_blob(digest)

    def stream_blob(self, digest: str) -> AsyncIterator[bytes]:
        return self._inner.stream_blob(digest)

    async def stats(self) -> StatsView:
        return await self._inner.stats()

    async def workers(self) -> list[WorkerView]:
        return await self._inner.workers()

    async def drain_worker(self, session: str) -> WorkerView:
        return await self._inner.drain_worker(session)

    async def health(self) -> Health:
        return await self._inner.health()

    async def create_token(self, request: CreateTokenRequest) -> CreateTokenReply:
        return await self._inner.create_token(request)

    async def tokens(self) -> list[TokenView]:
        return await self._inner.tokens()

    async def revoke_token(self, token_id: str) -> TokenView:
        return await self._inner.revoke_token(token_id)

    async def prune(self) -> dict[str, int]:
        return await self._inner.prune()


def is_served(data_dir: Path) -> bool:
    """Say whether a living server owns the directory and can be reached through its socket."""
    return (data_dir / "server.sock").exists() and not is_free(data_dir / "owner.lock")

"""An application: the jobs of one program, and how it reaches the queue."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, Unpack, overload

from blixard.domain.payload import Encoding
from blixard.errors import InvalidRequest
from blixard.sdk.function import AsyncJobFunction, JobFunction
from blixard.sdk.handle import JobHandle
from blixard.sdk.options import JobOptions, OptionArguments
from blixard.sdk.patience import Patience

if TYPE_CHECKING:
    from blixard.bundling import Bundler
    from blixard.client.blocking import Client
    from blixard.client.contract import AsyncClient

P = ParamSpec("P")
R = TypeVar("R")
MAX_REMEMBERED_UPLOADS = 1_024


class JobDecorator(Protocol):
    """What ``@app.job(**options)`` is."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncJobFunction[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> JobFunction[P, R]: ...


class App:
    """Names a group of jobs. Nothing is opened before the first submission, so importing a module with jobs costs nothing.

    ``server`` (a URL) and ``token`` default to the configuration (``BLIXARD_SERVER``, ``BLIXARD_TOKEN``); without a server
    jobs live in ``data_dir``, by default the configured data directory. ``client`` takes a client of your own.
    """

    def __init__(
        self,
        name: str,
        *,
        server: str | None = None,
        token: str | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        client: Client | None = None,
    ) -> None:
        if not name or not name.isprintable():
            raise InvalidRequest("an app needs a name of printable characters", field="name")
        self.name = name
        self._overrides = {
            "server.url": server,
            "server.token": token,
            "storage.data_dir": None if data_dir is None else os.fspath(data_dir),
        }
        self._client = client
        self._bundler: Bundler | None = None
        self._uploaded: set[str] = set()
        self._files: dict[tuple[str, int, int], str] = {}
        self.patience = Patience()
        self._lock = threading.Lock()

    @overload
    def job(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncJobFunction[P, R]: ...
    @overload
    def job(self, function: Callable[P, R], /) -> JobFunction[P, R]: ...
    @overload
    def job(self, /, **options: Unpack[OptionArguments]) -> JobDecorator: ...
    def job(
        self, function: Callable[P, Any] | None = None, /, **options: Unpack[OptionArguments]
    ) -> Any:  # Any: the overloads say which
        """Make a function submittable: ``@app.job`` or ``@app.job(retries=3, timeout=30)``. It can still be called as before."""
        declared = JobOptions().changed(options)

        def declare(target: Callable[P, Any]) -> Any:  # the same
            cls = AsyncJobFunction if inspect.iscoroutinefunction(target) else JobFunction
            return cls(self, target, declared)

        return declare if function is None else declare(function)

    def handle(self, job_id: str, *, encoding: str = Encoding.JSON) -> JobHandle[object]:
        """Return a handle to a job that was submitted before, here or elsewhere; ``encoding`` is that of its function.

        Raises ``InvalidRequest`` for an unknown encoding; whether there is such a job tells the first use of the handle.
        """
        return JobHandle(self.client, job_id, JobOptions().changed({"encoding": encoding}).encoding, self.patience)

    @property
    def client(self) -> Client:
        """The client of this app, opened at its first use. Raises ``ConfigError``."""
        with self._lock:
            if self._client is None:
                from blixard.client.opening import open_configured

                self._client = open_configured(self._overrides)
            return self._client

    @property
    def bundler(self) -> Bundler:
        if self._bundler is None:
            from blixard.bundling import Bundler

            self._bundler = Bundler()
        return self._bundler

    async def upload(self, client: AsyncClient, digest: str, archive: bytes) -> None:
        """Send a bundle once."""
        if digest not in self._uploaded:
            await client.put_blob(archive)
            if len(self._uploaded) >= MAX_REMEMBERED_UPLOADS:
                self._uploaded.clear()
            self._uploaded.add(digest)

    async def upload_file(self, client: AsyncClient, path: str) -> str:
        """Send a file and return its digest; once, as long as its size and time stay the same."""
        status = os.stat(path)  # noqa: PTH116 - one look at a local file
        stamp = (path, status.st_size, status.st_mtime_ns)
        if stamp not in self._files:
            digest = await client.put_blob(Path(path))
            if len(self._files) >= MAX_REMEMBERED_UPLOADS:
                self._files.clear()
            self._files[stamp] = digest
        return self._files[stamp]

    def forget_uploads(self) -> None:
        """Send everything again with the next submission."""
        self._uploaded.clear()
        self._files.clear()

    @contextmanager
    def using(self, client: Client) -> Iterator[None]:
        """Talk to another client meanwhile, with nothing uploaded there yet. Its owner closes it."""
        with self._lock:
            before = (self._client, self._uploaded, self._files, self.patience)
            self._client, self._uploaded, self._files, self.patience = client, set(), {}, Patience()
        try:
            yield
        finally:
            with self._lock:
                self._client, self._uploaded, self._files, self.patience = before

    def close(self) -> None:
        """Close the client, if it was opened. Allowed twice."""
        with self._lock:
            if self._client is not None:
                self._client.close()

"""The server: a control plane with its maintenance, its sockets and a local worker, started and stopped as one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import msgspec

from blixard.api.access import Gatekeeper, is_loopback
from blixard.api.application import create_application
from blixard.api.door import Door
from blixard.api.listeners import Listener, bind_tcp, bind_unix, check_tls
from blixard.api.local_worker import LocalWorker
from blixard.api.metrics import ApiMetrics
from blixard.api.operation import ApiContext
from blixard.config.settings import Settings
from blixard.errors import ConfigError, Conflict, StoreUnavailable
from blixard.infrastructure import InfrastructureFactory, ProductionInfrastructureFactory
from blixard.services.control_plane import ControlPlane
from blixard.storage.locks import FileLock
from blixard.worker.program import program_config

SOCKET_NAME = "server.sock"
OWNER_LOCK_NAME = "owner.lock"


class Listening(msgspec.Struct, frozen=True, kw_only=True):
    """Where a started server answers. ``needs_token``: on ``url``; the socket never does."""

    url: str
    socket: Path
    data_dir: Path
    needs_token: bool


class Server:
    """Owns a data directory from ``start`` to ``stop``. Killed at any moment, it leaves a directory that the next one takes over at once."""

    def __init__(
        self, settings: Settings, factory: InfrastructureFactory | None = None, *, worker: LocalWorker | None = None
    ) -> None:
        """``worker`` replaces the local worker that the settings describe."""
        self._settings = settings
        self._factory = factory or ProductionInfrastructureFactory(settings)
        self._data_dir = settings.storage.data_dir
        self._worker = worker
        self._stack = contextlib.AsyncExitStack()
        self._starting: asyncio.Task[Listening] | None = None
        self._stopping = asyncio.Lock()
        self._stopped = False
        self._doors: list[Door] = []
        self._listeners: list[Listener] = []
        self._watched: list[asyncio.Task[None]] = []

    async def start(self) -> Listening:
        """Take the directory, open the store, listen, start the worker. What was begun is undone when it fails.

        Raises ``ConfigError`` (address, files, token), ``Conflict`` (another server owns the directory), ``StoreUnavailable``.
        """
        if self._stopped:
            raise Conflict("the server was stopped")
        self._starting = asyncio.create_task(self._start(), name="start")
        try:
            return await self._starting
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop in order: no new connections, worker drained, waits answered, store closed. Allowed before, during and after start."""
        self._stopped = True
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        async with self._stopping:
            await self._stack.aclose()

    def hurry(self) -> None:
        """Make a ``stop`` under way end at once: jobs that still run are killed with their worker and run again later."""
        for listener in self._listeners:
            listener.force_exit = True
        if self._worker is not None:
            self._worker.kill()

    async def broken(self) -> None:
        """Return when a part of the server ended by itself, which it should not, by raising why."""
        if self._watched:
            done, _ = await asyncio.wait(self._watched, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def _start(self) -> Listening:
        # Entered in this order, undone in the reverse one.
        settings = self._settings.server
        check_tls(settings)
        self._own_directory()
        tcp = bind_tcp(settings.host, settings.port)
        self._stack.callback(tcp.close)
        port = tcp.getsockname()[1]
        plane = self._factory.create_control_plane()
        self._stack.push_async_callback(plane.close)
        await plane.open()
        await self._check_exposure(plane)
        self._start_maintenance(plane)
        context = ApiContext(
            plane=plane,
            gate=Gatekeeper(plane.tokens, settings.host),
            metrics=ApiMetrics(),
            request_limit=settings.request_limit,
        )
        application = create_application(context)
        local = Door(application, context, trusted=True)
        await self._listen(Listener(local, self._bind_socket()), local)
        self._start_worker()
        public = Door(application, context, trusted=False)
        await self._listen(Listener(public, tcp, settings=settings), public)
        scheme = "http" if settings.tls_certificate is None else "https"
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return Listening(
            url=f"{scheme}://{host}:{port}",
            socket=self._data_dir / SOCKET_NAME,
            data_dir=self._data_dir,
            needs_token=not is_loopback(settings.host) or await plane.tokens.any_exists(),
        )

    def _own_directory(self) -> None:
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = FileLock.acquire(self._data_dir / OWNER_LOCK_NAME, f"pid {os.getpid()}")
        except Conflict as error:
            raise Conflict(
                f"another server owns {self._data_dir}: {error.message}",
                hint="stop it, or give this one its own directory: BLIXARD_STORAGE__DATA_DIR",
            ) from error
        except OSError as error:
            raise StoreUnavailable(
                f"{self._data_dir} cannot be written: {error.strerror or error}",
                hint="choose a directory that you may write: BLIXARD_STORAGE__DATA_DIR",
            ) from error
        self._stack.callback(lock.release)

    async def _check_exposure(self, plane: ControlPlane) -> None:
        if not is_loopback(self._settings.server.host) and not await plane.tokens.any_exists():
            raise ConfigError(
                f"server.host is {self._settings.server.host}, which others can reach, and there is no token yet",
                hint="make one first: blixard token create NAME --scope admin",
            )

    def _start_maintenance(self, plane: ControlPlane) -> None:
        stop = asyncio.Event()
        task = asyncio.create_task(plane.maintenance.run(stop), name="maintenance")
        self._watched.append(task)

        async def end() -> None:
            stop.set()
            await asyncio.gather(task, return_exceptions=True)

        self._stack.push_async_callback(end)

    def _bind_socket(self) -> socket.socket:
        path = self._data_dir / SOCKET_NAME
        bound = bind_unix(path)
        self._stack.callback(path.unlink, missing_ok=True)
        return bound

    async def _listen(self, listener: Listener, door: Door) -> None:
        async def end() -> None:
            listener.should_exit = True
            await door.waits.stop()
            await listener.stop()

        self._stack.push_async_callback(end)
        self._doors.append(door)
        self._listeners.append(listener)
        await listener.start()

    def _start_worker(self) -> None:
        if self._worker is None:
            config = program_config(self._settings, socket=str(self._data_dir / SOCKET_NAME))
            self._worker = LocalWorker(config, grace_seconds=self._settings.server.shutdown_grace)
        self._stack.push_async_callback(self._worker.stop)
        self._worker.start()

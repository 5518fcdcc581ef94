"""The sockets that the server listens on, and uvicorn on each of them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from litestar.types import ASGIApp

from blixard.config.settings import ServerSettings
from blixard.errors import ConfigError

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
MAX_SOCKET_PATH_BYTES = 107
"""sun_path of unix(7) less its closing zero."""
SHUTDOWN_SECONDS = 5


class Listener(uvicorn.Server):
    """One uvicorn on one bound socket. Signals are the business of whoever owns it."""

    def __init__(self, app: ASGIApp, bound: socket.socket, *, settings: ServerSettings | None = None) -> None:
        secure = settings is not None and settings.tls_certificate is not None
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nothing asks for the client's address
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
                ssl_certfile=settings.tls_certificate if secure and settings else None,
                ssl_keyfile=settings.tls_key if secure and settings else None,
            )
        )
        self._bound = bound
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen; returns once connections are answered."""
        self._task = asyncio.create_task(self.serve(sockets=[self._bound]), name="listener")
        ready = asyncio.create_task(self._ready.wait(), name="listener-ready")
        try:
            await asyncio.wait({self._task, ready}, return_when=asyncio.FIRST_COMPLETED)
            if self._task.done():
                await self._task
        finally:
            ready.cancel()

    async def stop(self) -> None:
        """Take no more connections and let requests under way end within five seconds. Allowed before start and twice."""
        self.should_exit = True
        task, self._task = self._task, None
        if task is not None:
            await task
        self._bound.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def check_tls(settings: ServerSettings) -> None:
    """Raise ``ConfigError`` when the certificate and key cannot be used."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return
    for name, path in (("tls_certificate", settings.tls_certificate), ("tls_key", settings.tls_key)):
        if not os.access(path, os.R_OK):
            raise ConfigError(f"server.{name}: {path} is not there or cannot be read", hint="give a PEM file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key)
    except ssl.SSLError as error:
        raise ConfigError(
            f"server.tls_certificate and server.tls_key cannot be used together: {error.reason or error}",
            hint="both must be PEM, and the key must be the certificate's, without a password",
        ) from error


def bind_tcp(host: str, port: int) -> socket.socket:
    """Return a socket bound to ``host:port``. Raises ``ConfigError`` that says what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"server.host: {host!r} is no address of this machine: {error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # Two sockets may be bound to one port until one of them listens; then the other cannot any more.
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise _cannot_bind(host, port, error) from error
    bound.setblocking(False)
    return bound


def _cannot_bind(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {port} on {host} is in use by another program",
            hint="stop that program, or choose another port: BLIXARD_SERVER__PORT=3021 (0 takes any free one)",
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return ConfigError(f"port {port} may not be used: {error.strerror}", hint="ports below 1024 need privileges")
    return ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}", hint="check server.host")


def bind_unix(path: Path) -> socket.socket:
    """Return a socket bound to ``path``, open to this user only. Call as the owner of the directory: what is there is stale."""
    # Bound under a hidden name in a private directory of ours, and shown only once its mode is right.
    hidden = path.with_name(f".{path.name}")
    if len(os.fsencode(hidden)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"{path} is too long for a Unix socket ({MAX_SOCKET_PATH_BYTES} bytes)",
            hint="choose a data directory with a shorter path: BLIXARD_STORAGE__DATA_DIR",
        )
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    hidden.unlink(missing_ok=True)
    try:
        bound.bind(str(hidden))
        hidden.chmod(0o600)
        bound.listen(BACKLOG)
        hidden.rename(path)
    except OSError as error:
        bound.close()
        raise ConfigError(f"cannot make the socket {path}: {error.strerror or error}") from error
    bound.setblocking(False)
    return bound

"""The worker program: ``blixard worker``, the local worker of ``blixard serve``, and the child of an embedded client.

``python -m blixard.worker.program`` reads one line of JSON (``WorkerProgramConfig``) from its standard input, then works until
SIGTERM, or until that pipe ends because its parent is gone. Exit codes: 0 stopped, 2 the configuration cannot work here, 1 anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import uvloop

from blixard.domain.ids import DEFAULT_NAMESPACE
from blixard.domain.requirements import WorkerType
from blixard.errors import BlixardError, CallerError

if TYPE_CHECKING:
    from blixard.config.settings import Settings
    from blixard.infrastructure import InfrastructureFactory
    from blixard.worker.gateway import WorkerGateway
    from blixard.worker.worker import Worker

SOCKET_URL = "http://blixard"
"""Names nobody: over a Unix socket only the path counts."""
EXIT_OK, EXIT_BROKEN, EXIT_MISUSED = 0, 125, 2
_PR_SET_PDEATHSIG = 1
_MAX_CONFIG_BYTES = 1 << 20


class WorkerProgramConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """``settings`` is the JSON of ``Settings``. The control plane is at ``socket``, else at ``server``, else on the data directory.

    ``parent`` is the process that must not be outlived (0: none). ``submitter``: work only for this embedded process.
    """

    settings: msgspec.Raw
    socket: str = ""
    server: str = ""
    token: str = ""
    parent: int = 0
    submitter: str | None = None
    worker_types: tuple[WorkerType, ...] = ()
    namespace: str = DEFAULT_NAMESPACE


def program_config(settings: Settings, **fields: object) -> WorkerProgramConfig:
    """Return the configuration for a worker with these settings."""
    return msgspec.convert(
        {"settings": msgspec.Raw(settings.model_dump_json(exclude_none=True).encode()), **fields}, WorkerProgramConfig
    )


def main() -> int:
    """Run as a child: configuration and the parent's life come through standard input."""
    line = sys.stdin.buffer.readline(_MAX_CONFIG_BYTES)
    if not line.endswith(b"\n"):
        return EXIT_BROKEN  # whoever started us is gone before it could say what for
    config = msgspec.json.decode(line, type=WorkerProgramConfig)
    _die_with(config.parent)
    return run_worker(config)


def run_worker(config: WorkerProgramConfig, announce: Callable[[], None] = lambda: None) -> int:
    """Work until stopped, and return the exit code. What went wrong stands on standard error.

    ``announce`` is called once signals stop it in an orderly way.
    """
    from blixard.config.settings import Settings
    from blixard.infrastructure import ProductionInfrastructureFactory

    settings = Settings.model_validate(msgspec.json.decode(config.settings))
    _configure_logging(config, settings)

    factory = ProductionInfrastructureFactory(settings)
    try:
        _run_loop(config, factory, announce)
    except BlixardError as error:
        sys.stderr.write(f"error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return EXIT_MISUSED if isinstance(error, CallerError) else EXIT_BROKEN
    return EXIT_OK


def _configure_logging(config: WorkerProgramConfig, settings: Settings) -> None:
    if config.submitter is not None:  # nobody reads it unless this process fails: then a person
        logging.basicConfig(level=settings.log.level.upper(), format="%(levelname)s %(name)s: %(message)s")
        return
    from blixard.telemetry import configure_logging

    configure_logging(settings.log.level, settings.log.format)


def _run_loop(config: WorkerProgramConfig, factory: InfrastructureFactory, announce: Callable[[], None]) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(work(config, factory, announce))


async def work(
    config: WorkerProgramConfig, factory: InfrastructureFactory, announce: Callable[[], None] = lambda: None
) -> None:
    """Be the worker that ``config`` describes, until a signal or the parent's end stops it."""
    async with _gateway(config, factory) as gateway:
        home = factory.create_home(is_local=not config.server)
        try:
            worker = factory.create_worker(gateway, home, worker_types=config.worker_types, submitter=config.submitter)
            with _stopped_by_signals(worker), _stopped_by_parent(worker, config):
                announce()
                await worker.run()
        finally:
            home.remove()


@contextlib.asynccontextmanager
async def _gateway(config: WorkerProgramConfig, factory: InfrastructureFactory) -> AsyncIterator[WorkerGateway]:
    if config.socket or config.server:
        from blixard.worker.http_gateway import HttpGateway

        socket = Path(config.socket) if config.socket else None
        remote = HttpGateway(config.server or SOCKET_URL, token=config.token, socket=socket)
        try:
            yield remote
        finally:
            await remote.aclose()
        return
    async with _own_control_plane(config, factory) as gateway:
        yield gateway


@contextlib.asynccontextmanager
async def _own_control_plane(
    config: WorkerProgramConfig, factory: InfrastructureFactory
) -> AsyncIterator[WorkerGateway]:
    """Open the data directory beside the processes that share it, and keep it in order if nobody else does."""
    from blixard.worker.local_gateway import LocalGateway

    plane = factory.create_control_plane()
    await plane.open()
    stop = asyncio.Event()
    maintenance = asyncio.create_task(plane.maintenance.run(stop), name="maintenance")
    try:
        yield LocalGateway(plane, config.namespace)
    finally:
        stop.set()
        await asyncio.gather(maintenance, return_exceptions=True)
        await plane.close()


@contextlib.contextmanager
def _stopped_by_signals(worker: Worker) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C stops the worker in its own time, the second at once."""
    loop = asyncio.get_running_loop()
    asked = False

    def stop() -> None:
        nonlocal asked
        if asked:
            worker.kill()
        asked = True
        worker.stop()

    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _stopped_by_parent(worker: Worker, config: WorkerProgramConfig) -> Iterator[None]:
    """End at once when standard input ends: nobody is left who waits for us."""
    if not config.parent:
        yield
        return
    loop = asyncio.get_running_loop()
    fd = sys.stdin.fileno()

    def read() -> None:
        if not os.read(fd, 1024):
            loop.remove_reader(fd)
            worker.kill()

    loop.add_reader(fd, read)
    try:
        yield
    finally:
        loop.remove_reader(fd)


def _die_with(parent: int) -> None:
    """Be killed when the thread that started us ends, however it ends; the pipe covers what this does not."""
    if not parent:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(EXIT_BROKEN)


if __name__ == "__main__":
    sys.exit(main())

"""`blixard serve`: the server with its signals."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

from blixard.api.server import Listening, Server
from blixard.config.settings import Settings

EXIT_STOPPED = 0
EXIT_AT_ONCE = 130
"""As a shell reports a program ended by Ctrl-C."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_server(settings: Settings, on_ready: Callable[[Listening], None], *, server: Server | None = None) -> int:
    """Run ``serve`` on uvloop, which answers a third more requests than asyncio's own loop."""
    import uvloop

    return uvloop.run(serve(settings, on_ready, server=server))


async def serve(settings: Settings, on_ready: Callable[[Listening], None], *, server: Server | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C and return the exit code: 0 after a clean stop, 130 when a second signal cut it short.

    ``on_ready`` hears where the server listens. Raises what ``Server.start`` raises. The main thread's event loop only.
    """
    server = server or Server(settings)
    signals = _Signals(server)
    with signals.heard():
        await _run(server, on_ready, signals.first)
    return EXIT_AT_ONCE if signals.count > 1 else EXIT_STOPPED


async def _run(server: Server, on_ready: Callable[[Listening], None], stop: asyncio.Event) -> None:
    stopped = asyncio.create_task(stop.wait(), name="stop")
    starting = asyncio.create_task(server.start(), name="starting")
    tasks: list[asyncio.Task[object]] = [stopped, starting]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            on_ready(starting.result())
            broken = asyncio.create_task(server.broken(), name="broken")
            tasks.append(broken)
            await asyncio.wait({stopped, broken}, return_when=asyncio.FIRST_COMPLETED)
            if broken.done():
                broken.result()
        await server.stop()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Signals:
    """The first signal stops in order; the second at once: the worker is killed, and the store is safe at any moment."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.first = asyncio.Event()
        self.count = 0

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._hear)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _hear(self) -> None:
        self.count += 1
        self.first.set()
        if self.count > 1:
            self._server.hurry()

"""QEMU's control channel: commands, and the events that we wait for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError

_QUIET = logging.Logger("blixard.qmp", level=logging.CRITICAL + 1)  # noqa: LOG001  one of our own, so that nobody's settings reach it
"""The library prints every lost connection, which for us is how machines end."""


class MonitorLost(Exception):
    """The channel is closed: QEMU is gone, or on its way."""


class CommandRefused(Exception):
    """QEMU answered with an error."""


class _Client(QMPClient):
    logger = _QUIET


class Monitor:
    """All methods but ``close`` raise ``MonitorLost`` when QEMU is gone."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._client = _Client()

    async def connect(self) -> None:
        """Returns when QEMU takes commands."""
        try:
            await self._client.connect(self._channel)
        except ConnectError as error:
            raise MonitorLost(str(error)) from error

    async def execute(self, command: str, **arguments: object) -> object:
        """Carry out one command. Raises ``CommandRefused``, too."""
        try:
            return await self._client.execute(command, arguments or None)
        except ExecuteError as error:
            raise CommandRefused(f"{command}: {error}") from error
        except QMPError as error:
            raise MonitorLost(f"{command}: {error}") from error

    async def give(self, name: str, descriptor: int) -> None:
        """Pass an open descriptor, which commands then know as ``fd:<name>``. The caller keeps its own."""
        try:
            # Not the client's own method: that one reaches into asyncio's transport and does not know uvloop's.
            socket.send_fds(self._channel, [b" "], [descriptor])
        except OSError as error:
            raise MonitorLost(str(error)) from error
        await self.execute("getfd", fdname=name)

    async def load(self, uri: str, *, run: bool) -> None:
        """Load a saved machine, and return when it is there: running, or standing still if QEMU was started so."""
        with self._client.listener(("RESUME", "MIGRATION")) as events:
            await self.execute("migrate-incoming", uri=uri)
            await (_until_running(events) if run else self._until_migrated(events))

    async def send(self, uri: str) -> None:
        """Save the machine; it stands still afterwards."""
        with self._client.listener(("MIGRATION",)) as events:
            await self.execute("migrate", uri=uri)
            await self._until_migrated(events)

    async def _until_migrated(self, events: EventListener) -> None:
        while True:
            data = (await events.get()).get("data")
            status = data.get("status") if isinstance(data, dict) else None
            if status == "failed":
                raise CommandRefused(f"to migrate: {await self.execute('query-migrate')}")
            if status == "completed":
                return

    async def close(self) -> None:
        """Allowed at any time, and twice."""
        with contextlib.suppress(QMPError, OSError, EOFError, asyncio.IncompleteReadError):
            await self._client.disconnect()
        self._channel.close()


async def _until_running(events: EventListener) -> None:
    while (await events.get())["event"] != "RESUME":
        pass

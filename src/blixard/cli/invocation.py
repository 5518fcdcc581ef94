"""What the commands of one invocation share: global options, settings, and the way to a client."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from blixard.client.contract import AsyncClient
    from blixard.config import AppConfig

Connect = Callable[["AppConfig"], "AsyncClient"]
T = TypeVar("T")


class Invocation:
    """One run of the program. Reads settings when a command first asks for them, so that `--help` needs none."""

    def __init__(self, connect: Connect | None = None) -> None:
        self._connect = connect
        self._config: AppConfig | None = None
        self.overrides: dict[str, object] = {}
        self.config_file: str | None = None
        self.verbose = bool(os.environ.get("BLIXARD_DEBUG"))
        self.quiet = False

    @property
    def config(self) -> AppConfig:
        """Return the settings. Raises ``ConfigError``."""
        if self._config is None:
            from blixard.config import AppConfig

            environment = dict(os.environ)
            if self.config_file is not None:
                environment["CONFIG_FILE"] = self.config_file
            self._config = AppConfig.load_with_layers(self.overrides, environment=environment)
        return self._config

    @property
    def is_remote(self) -> bool:
        """Say whether jobs may run on another machine than this one."""
        return bool(self.config.settings.server.url)

    def connect(self) -> AsyncClient:
        """Return a client that is not open yet: use it as ``async with``."""
        if self._connect is not None:
            return self._connect(self.config)
        from blixard.client import open_client
        from blixard.telemetry import configure_logging

        log = self.config.settings.log
        # A command's own words are its output; of the machinery below only trouble is worth a line.
        configure_logging("debug" if self.verbose else "warning", log.format)
        return open_client(self.config.settings)

    def run(self, work: Coroutine[object, object, T]) -> T:
        """Run asynchronous work to its end."""
        import asyncio  # here: `--help` needs none of it

        return asyncio.run(work)

    def call(self, use: Callable[[AsyncClient], Coroutine[object, object, T]]) -> T:
        """Run ``use`` with an open client."""

        async def work() -> T:
            async with self.connect() as client:
                return await use(client)

        return self.run(work())

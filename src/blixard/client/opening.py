"""Which client the settings call for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blixard.client.blocking import Client
    from blixard.client.contract import AsyncClient
    from blixard.config.settings import Settings


def open_client(settings: Settings) -> AsyncClient:
    """Return a client, to be used as ``async with``: of the server that ``server.url`` names, else of the data directory."""
    if settings.server.url:
        from blixard.client.http import HttpClient
        from blixard.client.http_link import ServerAddress

        return HttpClient(ServerAddress(url=settings.server.url, token=settings.server.token))
    from blixard.client.embedded import EmbeddedClient

    return EmbeddedClient(settings)


def open_configured(overrides: Mapping[str, object]) -> Client:
    """Return a blocking client as the configuration says, with some keys overridden (None: as configured). Raises ``ConfigError``."""
    from blixard.client.blocking import Client
    from blixard.config import AppConfig

    settings = AppConfig.load_with_layers(overrides).settings
    return Client(lambda: open_client(settings))

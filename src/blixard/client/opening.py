"""Which client the settings call for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

"""Which client the settings call for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from blixard.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blixard.client.blocking import Client
    from blixard.client.contract import AsyncClient
    from blixard.config.settings import Settings

DATA_DIR = "BLIXARD_STORAGE__DATA_DIR"


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
    _check_not_in_a_job(settings, is_default=overrides.get("storage.data_dir") is None)
    return Client(lambda: open_client(settings))


def _check_not_in_a_job(settings: Settings, *, is_default: bool) -> None:
    """Refuse a queue in a job's own home: it would be gone with the job, and with it what was submitted."""
    job_id = os.environ.get("BLIXARD_JOB_ID")
    if job_id and is_default and not settings.server.url and DATA_DIR not in os.environ:
        raise InvalidRequest(
            f"this code runs as job {job_id}, whose home vanishes with it: there is no place for jobs of its own",
            field="data_dir",
            hint="name a server (App(server=...), BLIXARD_SERVER and allow_net) or a granted data_dir",
        )

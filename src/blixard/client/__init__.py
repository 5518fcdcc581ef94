"""Clients: one contract, over HTTP or on a local data directory.

Names are imported when first used: `blixard --help` should not pay for them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blixard.client.blocking import Client
    from blixard.client.contract import AsyncClient
    from blixard.client.embedded import EmbeddedClient
    from blixard.client.http import HttpClient
    from blixard.client.opening import open_client

__all__ = ["AsyncClient", "Client", "EmbeddedClient", "HttpClient", "open_client"]

_HOMES = {
    "AsyncClient": "blixard.client.contract",
    "Client": "blixard.client.blocking",
    "EmbeddedClient": "blixard.client.embedded",
    "HttpClient": "blixard.client.http",
    "open_client": "blixard.client.opening",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

from __future__ import annotations

import importlib.metadata


def server_version() -> str:
    """Return the version of the installed package."""
    return importlib.metadata.version("blixard")

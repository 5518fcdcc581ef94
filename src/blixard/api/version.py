from __future__ import annotations

import functools
import importlib.metadata


@functools.cache  # reading the metadata takes 400 µs
def server_version() -> str:
    """Return the version of the installed package."""
    return importlib.metadata.version("blixard")

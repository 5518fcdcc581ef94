"""Settings: what they are, where they come from, and which layer wins.

Names are imported when first used: `blixard --help` should not pay for pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blixard.config.app_config import AppConfig, SettingSource, describe_sources
    from blixard.config.settings import Settings

__all__ = ["AppConfig", "SettingSource", "Settings", "describe_sources"]

_HOMES = {
    "AppConfig": "blixard.config.app_config",
    "SettingSource": "blixard.config.app_config",
    "Settings": "blixard.config.settings",
    "describe_sources": "blixard.config.app_config",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

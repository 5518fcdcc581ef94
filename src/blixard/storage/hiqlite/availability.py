"""Whether this installation can be a node of a cluster at all. The other modules here need the binding to be imported."""

from __future__ import annotations

import importlib

from blixard.errors import NotSupportedHere


def require_binding() -> None:
    """Raise ``NotSupportedHere`` unless the native package is installed and can be loaded."""
    try:
        importlib.import_module("blixard_hiqlite")
    except ImportError as error:
        raise NotSupportedHere(
            f"a cluster needs the package blixard-hiqlite: {error}", hint="pip install 'blixard[cluster]'"
        ) from error

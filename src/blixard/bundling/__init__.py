"""Code shipping: from a function, a script or ``FILE.py:FUNCTION`` to one content-addressed archive, and back to files."""

from blixard.bundling.archive import Bundle, pack, unpack
from blixard.bundling.bundler import Bundler, FunctionCode, ScriptCode

__all__ = ["Bundle", "Bundler", "FunctionCode", "ScriptCode", "pack", "unpack"]

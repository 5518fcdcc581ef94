"""What tests of programs with jobs use: ``inline``, ``submitted`` and ``FakeClock``.

Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blixard.testing.clock import FakeClock
    from blixard.testing.in_process import inline, submitted
    from blixard.testing.submissions import Submission, Submissions

__all__ = ["FakeClock", "Submission", "Submissions", "inline", "submitted"]

_HOMES = {
    "FakeClock": "blixard.testing.clock",
    "Submission": "blixard.testing.submissions",
    "Submissions": "blixard.testing.submissions",
    "inline": "blixard.testing.in_process",
    "submitted": "blixard.testing.in_process",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

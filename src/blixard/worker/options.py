"""What a worker is told about itself."""

from __future__ import annotations

import msgspec

from blixard.domain.worker import WorkerOffer

DEFAULT_PREFETCH = 800
DEFAULT_GRACE_SECONDS = 10.0


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """``host`` is the boot id of this machine if the worker holds its session's lock where the control plane can look; else empty.

    ``grace_seconds``: how long a stopping worker lets its running jobs go on.
    """

    name: str
    offer: WorkerOffer
    prefetch: int = DEFAULT_PREFETCH
    grace_seconds: float = DEFAULT_GRACE_SECONDS
    host: str = ""
    interpreter: str = ""

"""Blixard runs jobs in isolated sandboxes from a durable queue.

Names are imported when first used, so that importing this package is free.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blixard.client import AsyncClient, Client, open_client
    from blixard.domain.outcome import OutcomeKind
    from blixard.domain.requirements import Isolation
    from blixard.domain.retry import RetryPolicy
    from blixard.domain.state_machine import JobState
    from blixard.errors import (
        BlixardError,
        CallerError,
        ConfigError,
        InvalidRequest,
        JobCancelled,
        JobError,
        JobFailed,
        JobNotFound,
        JobTimedOut,
        Unavailable,
        WaitTimedOut,
        WorkerLost,
    )
    from blixard.sdk.app import App
    from blixard.sdk.collecting import as_completed, as_completed_async, gather, gather_async
    from blixard.sdk.executor import Executor, JobFuture
    from blixard.sdk.function import AsyncJobFunction, JobFunction
    from blixard.sdk.handle import JobHandle

__version__ = "0.1.0"

__all__ = [
    "App",
    "AsyncClient",
    "AsyncJobFunction",
    "BlixardError",
    "CallerError",
    "Client",
    "ConfigError",
    "Executor",
    "InvalidRequest",
    "Isolation",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "JobFunction",
    "JobFuture",
    "JobHandle",
    "JobNotFound",
    "JobState",
    "JobTimedOut",
    "OutcomeKind",
    "RetryPolicy",
    "Unavailable",
    "WaitTimedOut",
    "WorkerLost",
    "as_completed",
    "as_completed_async",
    "gather",
    "gather_async",
    "open_client",
]

_HOMES = {
    "App": "blixard.sdk.app",
    "AsyncClient": "blixard.client",
    "AsyncJobFunction": "blixard.sdk.function",
    "Client": "blixard.client",
    "Executor": "blixard.sdk.executor",
    "Isolation": "blixard.domain.requirements",
    "JobFunction": "blixard.sdk.function",
    "JobFuture": "blixard.sdk.executor",
    "JobHandle": "blixard.sdk.handle",
    "JobState": "blixard.domain.state_machine",
    "OutcomeKind": "blixard.domain.outcome",
    "RetryPolicy": "blixard.domain.retry",
    "as_completed": "blixard.sdk.collecting",
    "as_completed_async": "blixard.sdk.collecting",
    "gather": "blixard.sdk.collecting",
    "gather_async": "blixard.sdk.collecting",
    "open_client": "blixard.client",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "blixard.errors")), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

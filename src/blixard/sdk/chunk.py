"""Several calls in one job: what ``Executor.map`` with a chunk size above 1 lets a worker run."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Mapping, Sequence


def call_chunk(function: str, calls: Sequence[Sequence[object]], names: Mapping[str, object]) -> list[object]:
    """Call ``module:qualname`` once per item, in order, each time with ``names``. The first call that fails fails the job."""
    module, _, path = function.partition(":")
    found: object = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    found = getattr(found, "__blixard_function__", found)
    if not callable(found):
        raise TypeError(f"{function} is not a function")
    return [_finish(found(*call, **names)) for call in calls]


def _finish(value: object) -> object:
    return asyncio.run(value) if inspect.iscoroutine(value) else value

"""Waits for a guest to have nothing left to do, so that its clones have not, either.

An agent answers before all that follows a boot is done: its collector runs, a process that it keeps ready gets up, the kernel frees what it needed.
What is unfinished in a template is done again by every clone, under translation, and in memory that is then its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

WINDOW_SECONDS = 0.15
IDLE_SHARE = 0.1
"""Of one processor. An idle guest under TCG takes 1 to 3 %."""
QUIET_WINDOWS = 3
"""One after the other: a guest may be waiting for its own timers in between."""
PATIENCE_SECONDS = 10.0


def wanted_seconds(pid: int) -> float:
    """Return for how long the threads of a process have run or waited for a processor, since they began; 0 when it is gone."""
    total = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that ended meanwhile
                running, waiting, _ = (task / "schedstat").read_text().split()
                total += int(running) + int(waiting)
    return total / 1e9


async def wait_until_idle(pid: int, patience: float = PATIENCE_SECONDS) -> None:
    """Return when the process has been idle for a moment, or patience is at an end: a busy template is slow, not wrong."""
    begun, quiet = time.monotonic(), 0
    while quiet < QUIET_WINDOWS and time.monotonic() - begun < patience:
        before, at = wanted_seconds(pid), time.monotonic()
        await asyncio.sleep(WINDOW_SECONDS)
        share = (wanted_seconds(pid) - before) / (time.monotonic() - at)
        quiet = quiet + 1 if share < IDLE_SHARE else 0

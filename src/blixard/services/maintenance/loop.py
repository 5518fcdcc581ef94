"""The loop that calls the passes, in whichever process holds the maintenance lock."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog

from blixard.errors import Conflict, Unavailable
from blixard.services.clock import Clock
from blixard.services.maintenance.adopter import Adopter
from blixard.services.maintenance.promoter import Promoter
from blixard.services.maintenance.pruner import Pruner
from blixard.services.maintenance.rescuer import Rescuer
from blixard.storage.locks import FileLock

BLOB_PASS_SECONDS = 3600.0
SHORTEST_PAUSE = 0.02


class MaintenanceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds between passes of the rescuer and adopter, and of the pruner. The promoter runs when the next job falls due."""

    interval: float = 1.0
    prune_interval: float = 60.0


class Maintenance:
    """Runs the passes until it is told to stop. Another process that wants to run them too waits for the lock."""

    def __init__(
        self,
        *,
        rescuer: Rescuer,
        promoter: Promoter,
        pruner: Pruner,
        adopter: Adopter,
        clock: Clock,
        config: MaintenanceConfig,
        lock_path: Path | None,
    ) -> None:
        self._rescuer = rescuer
        self._promoter = promoter
        self._pruner = pruner
        self._adopter = adopter
        self._clock = clock
        self._config = config
        self._lock_path = lock_path
        self._next_prune = clock.monotonic() + config.prune_interval
        self._next_blobs = clock.monotonic() + BLOB_PASS_SECONDS
        self._log = structlog.get_logger("maintenance")
        self.counts: dict[str, int] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Wait for the lock, then run passes until ``stop`` is set. An unavailable store is tried again at the next pass."""
        lock = await self._take_lock(stop)
        try:
            while not stop.is_set():
                await self._run_passes()
                await self._pause(stop)
        finally:
            if lock is not None:
                lock.release()

    async def _take_lock(self, stop: asyncio.Event) -> FileLock | None:
        while self._lock_path is not None and not stop.is_set():
            try:
                return FileLock.acquire(self._lock_path, f"pid {os.getpid()}")
            except Conflict:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), self._config.interval)
        return None

    async def _run_passes(self) -> None:
        passes: list[Callable[[], Awaitable[dict[str, int]]]] = [
            self._adopter.run_once,
            self._rescuer.run_once,
            self._promoter.run_once,
        ]
        if self._clock.monotonic() >= self._next_prune:
            self._next_prune = self._clock.monotonic() + self._config.prune_interval
            passes.append(self._pruner.run_once)
        if self._clock.monotonic() >= self._next_blobs:
            self._next_blobs = self._clock.monotonic() + BLOB_PASS_SECONDS
            passes.append(self._prune_blobs)
        for run_once in passes:
            await self._run_pass(run_once)

    async def _run_pass(self, run_once: Callable[[], Awaitable[dict[str, int]]]) -> None:
        try:
            counts = await run_once()
        except Unavailable as error:
            self.counts["passes_failed"] = self.counts.get("passes_failed", 0) + 1
            self._log.warning("maintenance pass failed and will be repeated", error=str(error))
            return
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    async def _pause(self, stop: asyncio.Event) -> None:
        """Wait for the next pass: the interval, or less when a job falls due before."""
        try:
            due = await self._promoter.seconds_to_next()
        except Unavailable:
            due = None
        pause = self._config.interval if due is None else min(self._config.interval, max(due, SHORTEST_PAUSE))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), pause)

    async def run_once(self) -> dict[str, int]:
        """Run adopter, rescuer and promoter once, such as before a first claim; return their counts."""
        counts: dict[str, int] = {}
        for run_once in (self._adopter.run_once, self._rescuer.run_once, self._promoter.run_once):
            counts.update(await run_once())
        return counts

    async def prune_now(self) -> dict[str, int]:
        """Remove what retention allows, blobs too; return counts by kind."""
        return {**await self._pruner.run_once(), **await self._prune_blobs()}

    async def _prune_blobs(self) -> dict[str, int]:
        return {"blobs": await self._pruner.prune_blobs()}

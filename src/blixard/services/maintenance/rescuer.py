"""The rescuer: takes leases away from workers that are gone, by watching and never by comparing wall clocks."""

from __future__ import annotations

from pathlib import Path

import msgspec

from blixard.domain.worker import SessionState
from blixard.services.clock import Clock
from blixard.storage.locks import boot_id, is_free
from blixard.storage.repositories.leases import LeaseRepository
from blixard.storage.repositories.sessions import SessionRepository, Watched

RENEWAL_SHARE = 1 / 6
"""Part of the lease time for which a renewal counts for the syncs behind it; the rescuer waits so much longer."""


class RescuerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``interval``: seconds between passes; a pass counts for at most twice of it, however long it was away."""

    lease_seconds: float = 10.0
    interval: float = 1.0
    step: int = 1_000


class _Observation(msgspec.Struct):
    renewals: int
    stood_still: float


class Rescuer:
    """Expires a session when its renewals stood still for the lease time (and the share that renewals may lag behind) while we
    watched, or at once when its lock is free.

    A paused or restarted rescuer starts to watch afresh, so a jump of any clock expires nothing.
    """

    def __init__(
        self,
        sessions: SessionRepository,
        leases: LeaseRepository,
        clock: Clock,
        config: RescuerConfig,
        lock_directory: Path | None = None,
    ) -> None:
        self._sessions = sessions
        self._leases = leases
        self._clock = clock
        self._config = config
        self._lock_directory = lock_directory
        self._host = boot_id()
        self._seen: dict[str, _Observation] = {}
        self._last_pass: float | None = None

    async def run_once(self) -> dict[str, int]:
        """Watch every session once; return how many were expired and how many leases were taken back."""
        elapsed = self._elapsed()
        watched = await self._sessions.watched()
        expired = [w for w in watched if self._is_alive(w) and self._is_gone(w, elapsed)]
        counts = {"sessions_expired": 0, "leases_lost": 0}
        for session in expired:
            counts["sessions_expired"] += await self._sessions.expire(session.id, session.renewals, self._clock.now())
        dead = [w.id for w in watched if not self._is_alive(w)] + [w.id for w in expired]
        for session_id in dead:
            counts["leases_lost"] += await self._take_leases(session_id)
        alive = {w.id for w in watched} - set(dead)
        self._seen = {key: value for key, value in self._seen.items() if key in alive}
        return counts

    def _elapsed(self) -> float:
        """Return the seconds since the last pass that may be counted."""
        now = self._clock.monotonic()
        elapsed = 0.0 if self._last_pass is None else now - self._last_pass
        self._last_pass = now
        return min(elapsed, 2 * self._config.interval)

    @staticmethod
    def _is_alive(session: Watched) -> bool:
        return session.state in {SessionState.ONLINE, SessionState.DRAINING}

    def _is_gone(self, session: Watched, elapsed: float) -> bool:
        if self._lock_is_free(session):
            return True
        known = self._seen.get(session.id)
        if known is None or known.renewals != session.renewals:
            self._seen[session.id] = _Observation(session.renewals, 0.0)
            return False
        known.stood_still += elapsed
        return known.stood_still >= self._config.lease_seconds * (1 + RENEWAL_SHARE)

    def _lock_is_free(self, session: Watched) -> bool:
        """Say whether a worker of this machine and boot is known to be dead, with all its supervisors.

        A lock that is missing says nothing: the worker may be just about to make it.
        """
        if self._lock_directory is None or not self._host or session.host != self._host:
            return False
        path = self._lock_directory / f"{session.id}.lock"
        return path.exists() and is_free(path)

    async def _take_leases(self, session: str) -> int:
        taken = 0
        while ended := await self._leases.lose(
            session,
            refs=None,
            message="the worker that ran it is gone",
            limit=self._config.step,
            now=self._clock.now(),
        ):
            taken += len(ended)
        if self._lock_directory is not None:
            (self._lock_directory / f"{session}.lock").unlink(missing_ok=True)
        return taken

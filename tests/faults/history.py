"""Checks what the store says happened to jobs, and what the jobs themselves wrote down while they ran."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import apsw
import msgspec

ENDED = frozenset({"completed", "failed", "cancelled"})
GIVEN_BACK = frozenset({"lost", "released"})


class StoredAttempt(msgspec.Struct, frozen=True):
    job_id: str
    number: int
    session: str
    worker: str
    claimed_at: int
    finished_at: int
    outcome: str


class StoredJob(msgspec.Struct, frozen=True):
    id: str
    state: str
    attempt: int
    lost: int
    failures: int
    result: str | None
    error: str | None


class History:
    """All jobs, attempts and events of a data directory, read from its database file."""

    def __init__(self, data_dir: Path) -> None:
        connection = apsw.Connection(str(data_dir / "blixard.db"), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            connection.set_busy_timeout(30_000)
            self.integrity = [row[0] for row in connection.execute("PRAGMA integrity_check")]
            with connection:  # one moment
                self._read(connection)
        finally:
            connection.close()

    def _read(self, connection: apsw.Connection) -> None:
        jobs = connection.execute("SELECT id, state, attempt, lost, failures, result, error FROM jobs")
        self.jobs = {row[0]: StoredJob(*row) for row in jobs}
        self.attempts: dict[str, list[StoredAttempt]] = defaultdict(list)
        for row in connection.execute(
            "SELECT jobs.id, a.attempt, a.session, a.worker, a.claimed_at, a.finished_at, a.outcome "
            "FROM attempts AS a JOIN jobs ON jobs.seq = a.job ORDER BY a.job, a.attempt"
        ):
            self.attempts[row[0]].append(StoredAttempt(*row))
        self.events: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for job_id, kind, attempt in connection.execute(
            "SELECT jobs.id, e.type, e.attempt FROM events AS e JOIN jobs ON jobs.seq = e.job ORDER BY e.seq"
        ):
            self.events[job_id].append((kind, attempt))

    def check(self, acknowledged: Iterable[str]) -> None:
        """Hold the store against its promises: nothing acknowledged is lost, nothing completes twice, all has ended."""
        assert self.integrity == ["ok"]
        lost = set(acknowledged) - set(self.jobs)
        assert not lost, f"{len(lost)} acknowledged jobs are lost: {sorted(lost)[:5]}"
        stuck = [job for job in self.jobs.values() if job.state not in ENDED]
        assert not stuck, f"{len(stuck)} jobs have not ended: {stuck[:5]}"
        for job in self.jobs.values():
            self._check_job(job)

    def _check_job(self, job: StoredJob) -> None:
        attempts, events = self.attempts[job.id], self.events[job.id]
        say = f"{job}\n{attempts}\n{events}"
        assert [a.number for a in attempts] == list(range(1, job.attempt + 1)), f"attempts are missing or reused: {say}"
        done = [a.number for a in attempts if a.outcome == "completed"]
        told = [attempt for kind, attempt in events if kind == "completed"]
        expected = [job.attempt] if job.state == "completed" else []
        assert done == told == expected, f"completed {len(done)} times, told {len(told)} times: {say}"
        for one, next_one in itertools.pairwise(attempts):
            assert one.finished_at <= next_one.claimed_at, f"two attempts at once: {say}"
        assert all(a.claimed_at <= a.finished_at for a in attempts), say

    def attempts_with(self, *outcomes: str) -> list[StoredAttempt]:
        return [a for attempts in self.attempts.values() for a in attempts if a.outcome in outcomes]


class Marks:
    """A file to which running jobs append ``begin ID ATTEMPT`` and ``end ID ATTEMPT``: what really happened, and in which order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")
        path.chmod(0o666)

    def read(self) -> list[tuple[str, str, int]]:
        lines = self.path.read_text().splitlines()
        return [(word, job_id, int(attempt)) for word, job_id, attempt in (line.split() for line in lines)]

    def check(self, history: History) -> None:
        """Hold what the jobs did against the store: no attempt ran twice or beside another one, and what completed ran."""
        runs: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for word, job_id, attempt in self.read():
            runs[job_id].append((word, attempt))
        for job_id, steps in runs.items():
            begun = [attempt for word, attempt in steps if word == "begin"]
            # Steps of a job in the order of the file: an attempt that ends after a later one has begun ran beside it.
            assert begun == sorted(set(begun)), f"{job_id} ran an attempt twice or out of order: {steps}"
            for place, (word, attempt) in enumerate(steps):
                assert word == "begin" or steps[place - 1] == ("begin", attempt), f"{job_id} ran beside itself: {steps}"
            assert begun[-1] <= history.jobs[job_id].attempt, f"{job_id} ran without a lease: {steps}"
        for job in history.jobs.values():
            if job.state == "completed":
                ends = [attempt for word, attempt in runs[job.id] if word == "end"]
                assert ends[-1:] == [job.attempt], f"completed without having run: {job} {runs[job.id]}"

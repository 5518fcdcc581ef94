"""kill -9 of everything, again and again, under load: nothing acknowledged is lost, nothing completes twice.

``BLIXARD_TEST_KILLS`` and ``BLIXARD_TEST_SEED`` make it longer or repeat a run.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import threading
from collections import Counter
from pathlib import Path

import psutil
import pytest

from blixard.protocol.jobs import StatsView
from tests.faults.history import GIVEN_BACK, History, Marks
from tests.faults.load import Kind, Submitter, make_kinds
from tests.faults.plant import Plant, depth_below, descendants, plant, until

KILLS = int(os.environ.get("BLIXARD_TEST_KILLS", "36"))
JOBS_PER_KILL = 45
CLIENTS = 4
LONGEST_PAUSE = 1.2
"""Seconds between two kills."""
LONGEST_DELAY = 0.05
"""Seconds between the begin of a burst of submissions and the kill."""
WORKER_PROGRAM = "blixard.worker.program"
ZYGOTE_PROGRAM = "launch.py"
KINDS = ("server", "local worker", "remote worker", "zygote", "supervisor", "job")


class Killer:
    """Finds victims among the processes of a plant, kills them, and starts again what nobody else does."""

    def __init__(self, site: Plant, chance: random.Random) -> None:
        self.hits: Counter[str] = Counter()
        self._site = site
        self._chance = chance
        self.server = site.serve()
        self.remote = site.work("remote")

    def kill(self, kind: str) -> None:
        """Kill one process of this kind with SIGKILL, waiting for one to appear."""
        assert self.server.poll() is self.remote.poll() is None, "a server or worker ended by itself"
        until(lambda: self._victims(kind), f"there is a {kind} to kill after {self.hits}")
        victims = self._victims(kind)
        if not victims:  # gone in that moment
            self.kill(kind)
            return
        victim = self._chance.choice(victims)
        try:
            victim.kill()
        except psutil.NoSuchProcess:  # it ended in that moment: take another one
            self.kill(kind)
            return
        self.hits[kind] += 1
        self._restart(victim.pid)

    def _victims(self, kind: str) -> list[psutil.Process]:
        match kind:
            case "server":
                return [psutil.Process(self.server.pid)]
            case "remote worker":
                return [psutil.Process(self.remote.pid)]
            case "local worker":
                return self._local_workers()
        return [process for process in self._below_workers() if self._kind_of(process) == kind]

    def _local_workers(self) -> list[psutil.Process]:
        return [p for p in descendants(self.server.pid) if _runs(p, WORKER_PROGRAM)]

    def _below_workers(self) -> list[psutil.Process]:
        workers = [*self._local_workers(), psutil.Process(self.remote.pid)]
        return [process for worker in workers for process in descendants(worker.pid)]

    def _kind_of(self, process: psutil.Process) -> str:
        """Tell by the place in the tree: worker, zygote, supervisors, and all below is jobs and what runs them."""
        zygotes = [
            p for p in self._below_workers() if _runs(p, ZYGOTE_PROGRAM) and not _runs(_parent(p), ZYGOTE_PROGRAM)
        ]
        if process in zygotes:
            return "zygote"
        depth = max((depth_below(process, zygote.pid) for zygote in zygotes), default=0)
        return {0: "", 1: "supervisor"}.get(depth, "job")

    def _restart(self, victim: int) -> None:
        if victim == self.server.pid:
            self.server.wait()
            self.server = self._site.serve()
        if victim == self.remote.pid:
            self.remote.wait()
            self.remote = self._site.work("remote")


def _runs(process: psutil.Process | None, program: str) -> bool:
    try:
        return process is not None and any(word.endswith(program) for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _parent(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.NoSuchProcess:
        return None


def plan_kills(chance: random.Random) -> list[str]:
    """Return the kinds in random order, each about as often as the others."""
    kinds = [KINDS[number % len(KINDS)] for number in range(KILLS)]
    chance.shuffle(kinds)
    return kinds


@pytest.mark.timeout(max(300, KILLS * 15))
def test_kills_lose_nothing_and_complete_nothing_twice(tmp_path: Path) -> None:
    seed = int(os.environ.get("BLIXARD_TEST_SEED") or secrets.randbelow(1 << 32))
    print(f"seed {seed}")
    settings = {"leases__duration": "5s", "maintenance__interval": "200ms", "worker__types": "process"}
    with plant(tmp_path, **settings, worker__slots=2) as site:
        marks = Marks(tmp_path / "marks")
        chance = random.Random(seed)
        killer = Killer(site, chance)
        submitters = start_load(site, marks, seed)
        kill_all(killer, chance, submitters)
        finish_load(site, submitters)
        assert site.stop(killer.remote) == 0
        assert site.stop(killer.server) == 0
        site.check_nothing_left()
        check_outcome(site, marks, submitters)
        tell(killer, submitters, History(site.data_dir))
        site.check_no_traceback()


def start_load(site: Plant, marks: Marks, seed: int) -> list[Submitter]:
    kinds = make_kinds(site.client(), site.directory, marks.path)
    total = KILLS * JOBS_PER_KILL // CLIENTS
    submitters = [
        Submitter(site.client(), kinds, name=f"client{number}", seed=seed + number, total=total)
        for number in range(CLIENTS)
    ]
    for submitter in submitters:
        submitter.start()
    return submitters


def allow(submitters: list[Submitter], share: float) -> None:
    for submitter in submitters:
        submitter.allow(share)


def kill_all(killer: Killer, chance: random.Random, submitters: list[Submitter]) -> None:
    pause = threading.Event()
    try:
        for number, kind in enumerate(plan_kills(chance)):
            allow(submitters, (number + 0.5) / KILLS)
            pause.wait(chance.uniform(0, LONGEST_PAUSE))
            allow(submitters, (number + 1) / KILLS)  # so that the kill comes while clients submit
            pause.wait(chance.uniform(0, LONGEST_DELAY))
            if kind == "server":
                allow(submitters, (number + 2) / KILLS)  # more than can be done before it is gone
            killer.kill(kind)
    except BaseException:
        for submitter in submitters:
            submitter.stop()
        raise


def finish_load(site: Plant, submitters: list[Submitter]) -> None:
    """Wait until every client has delivered all, and every job has ended."""
    for submitter in submitters:
        submitter.join(120.0)
        assert not submitter.is_alive(), f"{submitter.name} is stuck"
        if submitter.error is not None:
            raise submitter.error
    client = site.client()
    until(lambda: _is_done(client.stats()), "every job has ended", 180.0)


def _is_done(stats: StatsView) -> bool:
    return not any(count for state, count in stats.jobs.items() if state in {"pending", "claimed", "in_progress"})


def check_outcome(site: Plant, marks: Marks, submitters: list[Submitter]) -> None:
    history = History(site.data_dir)
    acknowledged = {job_id: job for submitter in submitters for job_id, job in submitter.acknowledged.items()}
    assert len(acknowledged) >= KILLS * JOBS_PER_KILL - CLIENTS
    history.check(acknowledged)
    marks.check(history)
    for job_id, submitted in acknowledged.items():
        _check_result(history, job_id, submitted.kind, submitted.number)
    for submitter in submitters:
        for job_id, told in submitter.ended.items():
            job = history.jobs[job_id]
            assert (told.state, told.attempt) == (job.state, job.attempt), f"told {told}, stored {job}"


def _check_result(history: History, job_id: str, kind: Kind, number: int) -> None:
    job = history.jobs[job_id]
    if not kind.succeeds:
        assert job.state == "failed", job
        return
    assert job.state == "completed", f"{job} {history.attempts[job_id]}"
    if kind.returns:
        assert json.loads(job.result or "null") == {"number": number, "square": number * number}


def tell(killer: Killer, submitters: list[Submitter], history: History) -> None:
    given_back = history.attempts_with(*GIVEN_BACK)
    refused = sum(submitter.refused for submitter in submitters)
    unknown = sum(submitter.unknown for submitter in submitters)
    outcomes = Counter(attempt.outcome for attempts in history.attempts.values() for attempt in attempts)
    print(f"kills: {dict(killer.hits)}; submissions without a server: {refused}, without an answer: {unknown}")
    print(f"jobs: {len(history.jobs)}; attempts: {dict(outcomes)}")
    assert sum(killer.hits.values()) >= 30
    assert all(killer.hits[kind] for kind in KINDS), f"a kind of kill hit nothing: {killer.hits}"
    assert refused + unknown > 0, "no kill hit a submission"
    assert len(given_back) >= KILLS // 4, "the kills hardly hit any job"
    workers = {attempt.worker for attempt in history.attempts_with("completed")}
    assert len(workers) > 1, f"only one worker did all the work: {workers}"

"""SIGSTOP beyond the lease: what wakes up later may write nothing, and everything is done once by others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from blixard.client.blocking import Client
from blixard.domain.job import NewJob
from blixard.domain.lease import AttemptRef, FinishedAttempt, SyncRequest
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import CommandPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.errors import LeaseLost, SessionExpired
from blixard.protocol.workers import LogBatch
from blixard.worker.http_gateway import HttpGateway
from tests.faults.history import History, Marks
from tests.faults.plant import PATIENCE, Plant, descendants, is_alive, plant, until

LEASE = "2s"
SLOTS = 2
# The first attempt waits until it is let go on; every later one is quick.
PROGRAM = """
echo "begin $BLIXARD_JOB_ID $BLIXARD_ATTEMPT" >> "$MARKS"
if [ "$BLIXARD_ATTEMPT" = 1 ]; then while [ ! -e "$GATE" ]; do sleep 0.02; done; fi
echo "end $BLIXARD_JOB_ID $BLIXARD_ATTEMPT" >> "$MARKS"
echo "attempt $BLIXARD_ATTEMPT"
"""
IDS = [f"job-{number}" for number in range(SLOTS)]


def gated_spec(site: Plant, marks: Marks) -> JobSpec:
    environment = {"MARKS": str(marks.path), "GATE": str(site.directory / "gate")}
    return JobSpec(
        name="gated",
        payload=CommandPayload(argv=("sh", "-ec", PROGRAM)),
        requirements=JobRequirements(isolation=Isolation.MINIMAL),
        environment=environment,
    )


def open_gate(site: Plant) -> None:
    (site.directory / "gate").write_text("")


def begin_jobs(site: Plant, client: Client, marks: Marks) -> None:
    """Submit jobs and wait until their first attempts run and the store knows it."""
    spec = gated_spec(site, marks)
    for job_id in IDS:
        client.submit(spec, NewJob(id=job_id))
    until(lambda: all(client.job(job_id).state is JobState.IN_PROGRESS for job_id in IDS), "first attempts are running")
    until(lambda: len(marks.read()) == SLOTS, "first attempts are at the gate")


def pause(process: subprocess.Popen[bytes], *, with_jobs: bool) -> list[psutil.Process]:
    """Stop a worker, or it and everything below it; return what is below it."""
    below = descendants(process.pid)
    process.send_signal(signal.SIGSTOP)
    for each in below if with_jobs else []:
        each.suspend()
    return below


def resume(process: subprocess.Popen[bytes], below: list[psutil.Process]) -> None:
    for each in below:
        if is_alive(each):
            each.resume()
    process.send_signal(signal.SIGCONT)


def session_of(client: Client, name: str) -> str | None:
    return next((worker.session for worker in client.workers() if worker.name == name), None)


async def try_late_writes(url: str, session: str, job_id: str) -> None:
    """Write as the paused worker could: nothing of it may be taken."""
    gateway = HttpGateway(url)
    ref = AttemptRef("default", job_id, 1)
    late = FinishedAttempt(ref=ref, outcome=Outcome(kind=OutcomeKind.COMPLETED, exit_code=0))
    try:
        with pytest.raises(SessionExpired):
            await gateway.sync(SyncRequest(session=session, number=1_000, finished=[late]))
        with pytest.raises(SessionExpired):
            await gateway.sync(SyncRequest(session=session, number=1_001, holding=[ref], want=1))
        with pytest.raises((SessionExpired, LeaseLost)):
            await gateway.append_logs(session, [LogBatch(ref=ref, records=[], offset=0)])
    finally:
        await gateway.aclose()


@pytest.mark.parametrize("with_jobs", [True, False], ids=["worker and jobs", "worker alone"])
async def test_a_worker_paused_beyond_its_lease_has_every_write_refused(tmp_path: Path, with_jobs: bool) -> None:
    with plant(tmp_path, leases__duration=LEASE, maintenance__interval="100ms") as site:
        marks = Marks(tmp_path / "marks")
        server = site.serve("--no-worker")
        client = site.client()
        paused = site.work("first", worker__slots=SLOTS, worker__types="process")
        begin_jobs(site, client, marks)
        old_session = session_of(client, "first")
        assert old_session is not None

        below = pause(paused, with_jobs=with_jobs)
        other = site.work("second", worker__slots=SLOTS, worker__types="process")
        ends = [client.result(job_id, timeout=PATIENCE) for job_id in IDS]
        assert [(end.state, end.attempt) for end in ends] == [(JobState.COMPLETED, 2)] * SLOTS
        await try_late_writes(site.url, old_session, IDS[0])
        if not with_jobs:
            open_gate(site)  # the first attempts end while nobody listens, and will be reported late
            until(lambda: sum(word == "end" for word, _, _ in marks.read()) == 2 * SLOTS, "the first attempts end")

        assert site.stop(other) == 0
        resume(paused, below)
        until(lambda: session_of(client, "first") not in {None, old_session}, "the paused worker registers anew")
        until(
            lambda: not any(is_alive(p) and p.status() != "stopped" and _is_job(p) for p in below), "its jobs are ended"
        )
        assert "has expired; its jobs are ended" in site.said()
        again = client.submit(gated_spec(site, marks), NewJob(id="again"))
        open_gate(site)
        assert client.result(again, timeout=PATIENCE).state is JobState.COMPLETED

        assert [site.stop(paused), site.stop(server)] == [0, 0]
        site.check_nothing_left()
        history = History(site.data_dir)
        history.check([*IDS, "again"])
        for job_id in IDS:
            assert [(a.outcome, a.worker) for a in history.attempts[job_id]] == [
                ("lost", "first"),
                ("completed", "second"),
            ]
        assert [a.worker for a in history.attempts["again"]] == ["first"]
        if with_jobs:
            marks.check(history)
        site.check_no_traceback()


def _is_job(process: psutil.Process) -> bool:
    try:
        return process.name() in {"sh", "sleep"}
    except psutil.NoSuchProcess:
        return False


def test_a_server_paused_beyond_the_lease_loses_and_doubles_nothing(tmp_path: Path) -> None:
    with plant(tmp_path, leases__duration=LEASE, maintenance__interval="100ms") as site:
        marks = Marks(tmp_path / "marks")
        server = site.serve("--no-worker")
        client = site.client()
        worker = site.work("only", worker__slots=SLOTS, worker__types="process")
        begin_jobs(site, client, marks)
        jobs = [process for process in descendants(worker.pid) if _is_job(process)]
        assert len(jobs) >= SLOTS

        os.kill(server.pid, signal.SIGSTOP)
        try:
            # Without an answer for the lease time it must end its own jobs: others may be given them.
            until(lambda: not any(map(is_alive, jobs)), "the worker ends its jobs by itself")
        finally:
            os.kill(server.pid, signal.SIGCONT)
        ends = [client.result(job_id, timeout=PATIENCE) for job_id in IDS]
        assert {end.state for end in ends} == {JobState.COMPLETED}

        assert [site.stop(worker), site.stop(server)] == [0, 0]
        site.check_nothing_left()
        history = History(site.data_dir)
        history.check(IDS)
        marks.check(history)
        assert "had no answer for 2 s; its jobs are ended" in site.said()
        assert {history.jobs[job_id].lost for job_id in IDS} == {1}, json.dumps(list(map(str, history.jobs.values())))
        site.check_no_traceback()

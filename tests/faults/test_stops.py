"""SIGTERM under load: running jobs are finished or given back, nothing is lost, and the next server goes on."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from blixard.client.blocking import Client
from blixard.domain.job import NewJob
from blixard.domain.payload import CommandPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.protocol.jobs import SubmitRequest
from tests.faults.history import ENDED, History, Marks
from tests.faults.plant import PATIENCE, Plant, plant, until

JOBS = 240
ROUNDS = 3
LONG_GRACE = 50.0
QUICK = """
echo "begin $BLIXARD_JOB_ID $BLIXARD_ATTEMPT" >> "$MARKS"
sleep 0.05
echo "end $BLIXARD_JOB_ID $BLIXARD_ATTEMPT" >> "$MARKS"
"""
# The first attempt never ends by itself.
ENDLESS = """
echo "begin $BLIXARD_JOB_ID $BLIXARD_ATTEMPT" >> "$MARKS"
if [ "$BLIXARD_ATTEMPT" = 1 ]; then exec sleep 1000; fi
echo "end $BLIXARD_JOB_ID $BLIXARD_ATTEMPT" >> "$MARKS"
"""


def shell(script: str, marks: Marks) -> JobSpec:
    return JobSpec(
        name="shell",
        payload=CommandPayload(argv=("sh", "-ec", script)),
        requirements=JobRequirements(isolation=Isolation.MINIMAL),
        environment={"MARKS": str(marks.path)},
    )


def is_all_done(client: Client) -> bool:
    return all(state in ENDED for state, count in client.stats().jobs.items() if count)


def submit_quick(client: Client, marks: Marks) -> list[str]:
    spec = shell(QUICK, marks)
    return client.submit_many(SubmitRequest(spec=spec, jobs=[NewJob() for _ in range(JOBS)])).ids


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_under_load_loses_nothing_and_costs_no_job_anything(tmp_path: Path, number: signal.Signals) -> None:
    with plant(tmp_path, worker__types="process", worker__slots=2) as site:
        marks = Marks(tmp_path / "marks")
        acknowledged: list[str] = []
        for _ in range(ROUNDS):
            server = site.serve()
            if not acknowledged:
                acknowledged = submit_quick(site.client(), marks)
            wait_for_more(marks)
            server.send_signal(number)
            assert server.wait(PATIENCE) == 0
            site.check_nothing_left()
            check_at_rest(site, acknowledged)
        last = site.serve()
        client = site.client()
        until(lambda: is_all_done(client), "all jobs have ended")
        assert site.stop(last) == 0

        history = History(site.data_dir)
        history.check(acknowledged)
        marks.check(history)
        assert {(job.state, job.lost, job.failures) for job in history.jobs.values()} == {("completed", 0, 0)}
        assert history.attempts_with("released"), "no stop came while jobs were waiting in the worker"
        site.check_no_traceback()


def wait_for_more(marks: Marks) -> None:
    before = len(marks.read())
    until(lambda: len(marks.read()) >= before + 20, "jobs are running")


def check_at_rest(site: Plant, acknowledged: list[str]) -> None:
    """After a clean stop nothing is leased: every job has ended or waits for the next server."""
    history = History(site.data_dir)
    assert set(acknowledged) == set(history.jobs)
    states = {job.state for job in history.jobs.values()}
    assert states == {"pending", "completed"}, states


def begin_endless(site: Plant, marks: Marks) -> str:
    client = site.client()
    job = client.submit(shell(ENDLESS, marks))
    until(lambda: client.job(job).state is JobState.IN_PROGRESS and marks.read(), "the endless job runs")
    return job


def test_a_job_that_outlives_the_grace_time_is_given_back(tmp_path: Path) -> None:
    with plant(tmp_path, worker__types="process", server__shutdown_grace="1s") as site:
        marks = Marks(tmp_path / "marks")
        server = site.serve()
        job = begin_endless(site, marks)
        assert site.stop(server) == 0
        site.check_nothing_left()
        assert History(site.data_dir).jobs[job].state == "pending"
        check_goes_on(site, marks, job)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with plant(tmp_path, worker__types="process", server__shutdown_grace=f"{LONG_GRACE:g}s") as site:
        marks = Marks(tmp_path / "marks")
        server = site.serve()
        job = begin_endless(site, marks)
        server.send_signal(signal.SIGTERM)
        until(lambda: not site.answers(), "the server has begun to stop")
        began = time.monotonic()
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 130
        site.check_nothing_left()
        assert time.monotonic() - began < LONG_GRACE / 2
        check_goes_on(site, marks, job)


def check_goes_on(site: Plant, marks: Marks, job: str) -> None:
    server = site.serve()
    assert site.client().result(job, timeout=PATIENCE).state is JobState.COMPLETED
    assert site.stop(server) == 0
    site.check_nothing_left()
    history = History(site.data_dir)
    history.check([job])
    marks.check(history)
    site.check_no_traceback()

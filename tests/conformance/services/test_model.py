"""Random schedules of submissions, claims, reports, repetitions, cancels, retries and deaths, against a model of (state, attempt).

Finds orders of events that nobody thought of; every wrong one shrinks to a short list of steps.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import TypeVar

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from blixard.domain.lease import AttemptRef, FinishedAttempt, StartedAttempt
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.retry import RetryPolicy
from blixard.domain.state_machine import JobState, can_become
from blixard.errors import InvalidTransition, SessionExpired
from blixard.services.control_plane import ControlPlaneConfig, build_control_plane
from blixard.storage.blobs import LocalBlobStore
from blixard.storage.logs import LocalLogStore
from blixard.storage.sqlite import SqliteDatabase
from blixard.testing.clock import FakeClock
from tests.conformance.services.worker import NAMESPACE, ScriptedWorker, completed, failed, make_spec, submit

T = TypeVar("T")
MAX_RETRIES = 1
MAX_LOST = 1
OUTCOMES = {
    OutcomeKind.COMPLETED: completed(),
    OutcomeKind.FAILED: failed(),
    OutcomeKind.TIMED_OUT: failed(kind=OutcomeKind.TIMED_OUT),
    OutcomeKind.CANCELLED: Outcome(kind=OutcomeKind.CANCELLED),
    OutcomeKind.LOST: Outcome(kind=OutcomeKind.LOST),
    OutcomeKind.RELEASED: Outcome(kind=OutcomeKind.RELEASED),
}


class ModelJob(msgspec.Struct):
    state: JobState = JobState.PENDING
    attempt: int = 0
    failures: int = 0
    lost: int = 0
    cancel_requested: bool = False
    holder: str | None = None
    ended_attempts: int = 0


class JobsMachine(RuleBasedStateMachine):
    refs = Bundle("refs")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory()
        self.clock = FakeClock()
        root = Path(self.directory.name)
        self.plane = build_control_plane(
            SqliteDatabase(":memory:"),
            LocalBlobStore(root / "blobs"),
            LocalLogStore(root / "logs"),
            ControlPlaneConfig(),
            self.clock,
        )
        self.jobs: dict[str, ModelJob] = {}
        self.workers: dict[str, ScriptedWorker] = {}
        self.lives = 0
        self.run(self.plane.open())
        for name in ("a", "b"):
            self.run(self.begin_session(name))

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 30))

    async def begin_session(self, name: str) -> None:
        self.lives += 1
        worker = ScriptedWorker(self.plane, f"session_{name}{self.lives}")
        await worker.register()
        self.workers[name] = worker

    def teardown(self) -> None:
        self.run(self.plane.close())
        self.loop.close()
        self.directory.cleanup()

    @rule(count=st.integers(1, 3))
    def submit_jobs(self, count: int) -> None:
        spec = make_spec(retry=RetryPolicy(retries=MAX_RETRIES, delay=0, jitter=0, max_lost=MAX_LOST))
        for job_id in self.run(submit(self.plane, count, spec=spec)):
            self.jobs[job_id] = ModelJob()

    @rule(target=refs, name=st.sampled_from("ab"), want=st.integers(1, 3), repeat=st.booleans())
    def claim(self, name: str, want: int, repeat: bool) -> object:
        worker = self.workers[name]
        request = worker.request(want=want)
        claimed = self.run(self.plane.workers.sync(NAMESPACE, request)).claimed
        if repeat:
            again = self.run(self.plane.workers.sync(NAMESPACE, request)).claimed
            assert [c.ref for c in again] == [c.ref for c in claimed]
        waiting = [j for j, job in self.jobs.items() if job.state is JobState.PENDING]
        assert len(claimed) == min(want, len(waiting))
        for item in claimed:
            job = self.jobs[item.ref.job_id]
            assert job.state is JobState.PENDING
            job.state, job.attempt, job.holder = JobState.CLAIMED, job.attempt + 1, worker.session
            assert item.ref.attempt == job.attempt
        return multiple(*((worker.session, item.ref) for item in claimed))

    @rule(held=refs)
    def start(self, held: tuple[str, AttemptRef]) -> None:
        session, ref = held
        if (worker := self.find_worker(session)) is None:
            return
        self.run(worker.sync(started=[StartedAttempt(ref, 1)]))
        job = self.jobs[ref.job_id]
        if self.owns(job, session, ref) and job.state is JobState.CLAIMED:
            job.state = JobState.IN_PROGRESS

    @rule(held=refs, kind=st.sampled_from(list(OUTCOMES)), name=st.sampled_from(["", "a", "b"]))
    def finish(self, held: tuple[str, AttemptRef], kind: OutcomeKind, name: str) -> None:
        """Report an end: by the holder, or (with a name) by whoever, who may be somebody else."""
        session, ref = held
        worker = self.workers[name] if name else self.find_worker(session)
        if worker is None:
            return
        self.run(worker.sync(finished=[FinishedAttempt(ref=ref, outcome=OUTCOMES[kind])]))
        job = self.jobs[ref.job_id]
        if self.owns(job, worker.session, ref):
            self.end_attempt(job, kind)

    @rule(held=consumes(refs))
    def forget(self, held: tuple[str, AttemptRef]) -> None:
        """The worker lists all that the model says it holds, but for this one."""
        session, ref = held
        if (worker := self.find_worker(session)) is None:
            return
        holding = [
            AttemptRef(NAMESPACE, job_id, job.attempt)
            for job_id, job in self.jobs.items()
            if job.holder == session and job_id != ref.job_id
        ]
        reply = self.run(worker.sync(holding=holding, seen=worker.number))
        assert not reply.lost
        job = self.jobs[ref.job_id]
        if job.holder == session:
            self.lose(job)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.jobs:
            return
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[job_id]
        try:
            state = self.run(self.plane.commands.cancel_job(NAMESPACE, job_id)).state
        except InvalidTransition:
            assert job.state in {JobState.COMPLETED, JobState.FAILED}
            return
        if job.state is JobState.PENDING:
            job.state = JobState.CANCELLED
        elif job.state.is_leased:
            job.cancel_requested = True
        assert state is job.state

    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        if not self.jobs:
            return
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[job_id]
        try:
            self.run(self.plane.commands.retry_job(NAMESPACE, job_id))
        except InvalidTransition:
            assert job.state not in {JobState.FAILED, JobState.CANCELLED}
            return
        assert job.state in {JobState.FAILED, JobState.CANCELLED}
        self.jobs[job_id] = ModelJob(attempt=job.attempt, ended_attempts=job.ended_attempts)

    @rule(name=st.sampled_from("ab"), polite=st.booleans())
    def die(self, name: str, polite: bool) -> None:
        worker = self.workers[name]
        if polite:
            self.run(self.plane.workers.close(NAMESPACE, worker.session))
        else:
            for _ in range(16):
                self.clock.advance(1)
                for other in self.workers.values():
                    if other is not worker:
                        self.run(other.sync())
                self.run(self.plane.maintenance.run_once())
        for job in self.jobs.values():
            if job.holder == worker.session:
                self.lose(job)
        try:
            self.run(worker.sync())
            raise AssertionError("a dead session was served")
        except SessionExpired:
            pass
        self.run(self.begin_session(name))

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        for job_id, expected in self.jobs.items():
            job = self.run(self.plane.queries.find_by_id(NAMESPACE, job_id))
            facts = (job.state, job.metadata.attempt, job.metadata.failures, job.metadata.lost)
            assert facts == (expected.state, expected.attempt, expected.failures, expected.lost), job_id

    @invariant()
    def counters_and_history_are_complete(self) -> None:
        counts: dict[JobState, int] = {}
        for job_id, expected in self.jobs.items():
            counts[expected.state] = counts.get(expected.state, 0) + 1
            detail = self.run(self.plane.queries.job(NAMESPACE, job_id))
            ended = [a for a in detail.attempts if a.outcome is not None]
            assert len(ended) == expected.ended_attempts
        assert self.run(self.plane.queries.stats(NAMESPACE)).jobs == counts

    def find_worker(self, session: str) -> ScriptedWorker | None:
        return next((w for w in self.workers.values() if w.session == session), None)

    @staticmethod
    def owns(job: ModelJob, session: str, ref: AttemptRef) -> bool:
        return job.state.is_leased and job.holder == session and job.attempt == ref.attempt

    def end_attempt(self, job: ModelJob, kind: OutcomeKind) -> None:
        before = job.state
        job.state = self.state_after(job, kind)
        assert can_become(before, job.state)
        job.failures += kind in {OutcomeKind.FAILED, OutcomeKind.TIMED_OUT}
        job.lost += kind is OutcomeKind.LOST
        job.holder = None
        job.ended_attempts += 1

    @staticmethod
    def state_after(job: ModelJob, kind: OutcomeKind) -> JobState:
        if kind is OutcomeKind.COMPLETED:
            return JobState.COMPLETED
        if kind is OutcomeKind.CANCELLED or job.cancel_requested:
            return JobState.CANCELLED
        if kind is OutcomeKind.RELEASED:
            return JobState.PENDING
        used, most = (job.lost, MAX_LOST) if kind is OutcomeKind.LOST else (job.failures, MAX_RETRIES)
        return JobState.PENDING if used < most else JobState.FAILED

    def lose(self, job: ModelJob) -> None:
        if job.state is JobState.IN_PROGRESS:
            before = job.lost
            self.end_attempt(job, OutcomeKind.LOST)
            job.lost = before + 1
        else:
            self.end_attempt(job, OutcomeKind.RELEASED)


JobsMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestJobs = JobsMachine.TestCase

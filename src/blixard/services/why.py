"""Why is this job not running, and what would unblock it: exact reasons from the placement classes and the live workers."""

from __future__ import annotations

from blixard.domain.job import Job
from blixard.domain.placement import PlacementClass, mismatches
from blixard.domain.state_machine import JobState
from blixard.domain.worker import SessionState, WorkerSession
from blixard.protocol.jobs import Reason, WhyView
from blixard.services.clock import Clock
from blixard.services.placement import PlacementService
from blixard.storage.repositories.jobs import JobRepository
from blixard.storage.repositories.sessions import SessionRepository

MAX_COUNTED_AHEAD = 10_000
MAX_WORKERS_NAMED = 10


class WhyService:
    def __init__(
        self, jobs: JobRepository, sessions: SessionRepository, placement: PlacementService, clock: Clock
    ) -> None:
        self._jobs = jobs
        self._sessions = sessions
        self._placement = placement
        self._clock = clock

    async def explain(self, job: Job) -> WhyView:
        """Return the state of a job in words, and for one that waits every reason."""
        if job.state is not JobState.PENDING:
            return WhyView(id=job.id, state=job.state, summary=_summary(job), reasons=[])
        reasons = await self._reasons(job)
        summary = reasons[0].text if reasons else "it is due and a worker is about to take it"
        return WhyView(id=job.id, state=job.state, summary=summary, reasons=reasons)

    async def _reasons(self, job: Job) -> list[Reason]:
        reasons = []
        wait = (job.metadata.run_at - self._clock.now()) / 1e6
        if wait > 0:
            reasons.append(_not_due(job, wait))
        found = await self._jobs.class_of(job.namespace, job.id)
        needs = await self._placement.find_class(found[0]) if found else None
        if needs is None:
            return reasons
        return [*reasons, *await self._worker_reasons(job, needs, due=wait <= 0)]

    async def _worker_reasons(self, job: Job, needs: PlacementClass, *, due: bool) -> list[Reason]:
        workers = await self._sessions.alive(job.namespace)
        able = [w for w in workers if not mismatches(needs, w.offer)]
        if not able:
            return _nobody(needs, workers)
        online = [w for w in able if w.state is SessionState.ONLINE]
        if not online:
            return [_all_draining(able)]
        if not due:
            return []
        ahead = await self._jobs.jobs_ahead(job, MAX_COUNTED_AHEAD)
        busy = [w for w in online if w.leased >= w.offer.slots]
        return [_behind(ahead, online)] if ahead or len(busy) == len(online) else []


def _summary(job: Job) -> str:
    worker = job.assignment.worker if job.assignment else "a worker"
    return {
        JobState.BLOCKED: "it waits for other jobs",
        JobState.CLAIMED: f"{worker} has taken it and will start it as soon as a slot is free",
        JobState.IN_PROGRESS: f"it is running on {worker} (attempt {job.metadata.attempt})",
        JobState.COMPLETED: "it has completed",
        JobState.FAILED: f"it has failed: {job.error.message if job.error else 'no message'}",
        JobState.CANCELLED: "it was cancelled",
    }[job.state]


def _not_due(job: Job, wait: float) -> Reason:
    why = (
        f"after {job.metadata.failures} failure(s) it waits for its next attempt"
        if job.metadata.failures
        else "it is not due yet"
    )
    return Reason(
        code="not_due",
        text=f"{why}: {wait:.1f} s to go",
        unblock="wait; or cancel it and submit it again without a delay",
    )


def _nobody(needs: PlacementClass, workers: list[WorkerSession]) -> list[Reason]:
    if not needs.is_open and not any(w.offer.submitter == needs.submitter for w in workers):
        return [
            Reason(
                code="not_waited_for",
                text="it was submitted without a server, and the process that submitted it does not wait for results",
                unblock="wait for its result there, or let that process end; then `blixard serve` or any waiting command runs it",
            )
        ]
    if not workers:
        return [
            Reason(
                code="no_workers",
                text="no worker is connected",
                unblock="start one: `blixard serve`, or `blixard worker --server URL`",
            )
        ]
    if not needs.is_open:  # the others could not take it whatever they offer
        workers = [w for w in workers if w.offer.submitter == needs.submitter]
    reasons = [
        Reason(
            code="worker_unfit",
            text=f"{w.name} cannot take it: {'; '.join(mismatches(needs, w.offer))}",
            unblock=_unblock(needs),
        )
        for w in workers[:MAX_WORKERS_NAMED]
    ]
    summary = Reason(
        code="no_fitting_worker", text=f"none of {len(workers)} connected worker(s) can run it", unblock=_unblock(needs)
    )
    return [summary, *reasons]


def _unblock(needs: PlacementClass) -> str:
    labels = " ".join(f"--label {name}={value}" for name, value in needs.labels.items())
    wishes = [
        f"gives isolation {needs.isolation}",
        f"serves queue {needs.queue!r}",
        *([f"has {needs.cpus:g} cpus"] if needs.cpus else []),
        *([f"has {needs.memory_mb} MB"] if needs.memory_mb else []),
        *([f"was started with {labels}"] if labels else []),
    ]
    return f"start a {needs.worker_type} worker that {', '.join(wishes)}; `blixard doctor` says what a host can give"


def _all_draining(able: list[WorkerSession]) -> Reason:
    names = ", ".join(w.name for w in able[:MAX_WORKERS_NAMED])
    return Reason(
        code="draining", text=f"the workers that could run it take nothing new: {names}", unblock="start another worker"
    )


def _behind(ahead: int, online: list[WorkerSession]) -> Reason:
    slots = sum(w.offer.slots for w in online)
    count = f"{ahead}{'+' if ahead >= MAX_COUNTED_AHEAD else ''}"
    return Reason(
        code="queue",
        text=f"{count} job(s) with the same needs come first, and {len(online)} worker(s) with {slots} slot(s) serve them",
        unblock="wait; or add workers or slots, or give it a higher priority",
    )

"""What changes jobs: submit, cancel, retry. Each is one guarded statement by primary key."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from blixard.domain.batch import Batch, batch_id, batch_job_id
from blixard.domain.grants import check_input_path
from blixard.domain.ids import check_id, new_job_ids
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_ARGUMENTS_BYTES, MAX_BATCH_JOBS, MAX_INPUTS, MAX_PRIORITY
from blixard.domain.payload import blobs_of
from blixard.domain.requirements import Isolation, check_policy
from blixard.domain.spec import check_spec
from blixard.domain.state_machine import JobState
from blixard.errors import BatchNotFound, IdTaken, InvalidRequest, InvalidTransition, JobNotFound, LimitExceeded
from blixard.protocol.jobs import BatchView, CancelReply, JobView, OpenBatchRequest, SubmitReply, SubmitRequest
from blixard.services.clock import Clock
from blixard.services.placement import PlacementService
from blixard.services.views import batch_view, job_view
from blixard.storage.blobs import BlobStore
from blixard.storage.repositories.batches import BatchRepository
from blixard.storage.repositories.jobs import JobRepository, encode_inputs
from blixard.storage.repositories.placement import StoredSpec

MAX_RUN_AT = 1 << 53
MAX_BATCH_TOTAL = 10_000_000
REOPENABLE = (JobState.FAILED, JobState.CANCELLED)
LIVE = (JobState.BLOCKED, JobState.PENDING, JobState.CLAIMED, JobState.IN_PROGRESS)
_GENERATED = re.compile(r"job_[0-9a-z]{26}|map_[0-9a-f]{24}_\d+\.\d{8,}")
"""Ids that nobody chooses by hand: one that exists already is a repetition."""
NamedJob = tuple[str, NewJob]


class JobCommandService:
    def __init__(
        self,
        jobs: JobRepository,
        batches: BatchRepository,
        placement: PlacementService,
        blobs: BlobStore,
        clock: Clock,
        expect: Callable[[int], None],
        minimum_isolation: Isolation = Isolation.MINIMAL,
    ) -> None:
        """``expect`` is told the placement class of each submission just before it is stored. Jobs below ``minimum_isolation`` are refused."""
        self._jobs = jobs
        self._batches = batches
        self._placement = placement
        self._blobs = blobs
        self._clock = clock
        self._expect = expect
        self._minimum_isolation = minimum_isolation

    async def submit(self, namespace: str, request: SubmitRequest, *, submitter: str = "") -> SubmitReply:
        """Store up to 1,000 jobs of one spec, all or none; on disk when this returns.

        A repeated id with the same content is the same job. Raises ``InvalidRequest``, ``LimitExceeded``,
        ``BlobNotFound``, ``IdTaken``; nothing is stored then.
        """
        check_policy(request.spec.requirements, self._minimum_isolation)
        named, chosen = _named_jobs(request)
        stored = self._placement.remembered(namespace, request.spec, submitter)
        if stored is None:
            check_spec(request.spec)
            await self._check_blobs(blobs_of(request.spec.payload))
            stored = await self._placement.store(namespace, request.spec, submitter)
        await self._check_blobs(_blobs_of_jobs(request.jobs))
        await self._check_repetitions(namespace, stored, chosen)
        created = await self._add(namespace, stored, named, request)
        if len(created) < len(named):
            new = set(created)
            await self._check_repetitions(namespace, stored, [pair for pair in named if pair[0] not in new])
        return SubmitReply(ids=[job_id for job_id, _ in named], created=len(created))

    async def _add(
        self, namespace: str, stored: StoredSpec, named: Sequence[NamedJob], request: SubmitRequest
    ) -> list[str]:
        retry = request.spec.retry
        self._expect(stored.class_id)
        return await self._jobs.add(
            namespace,
            stored,
            named,
            max_retries=retry.retries,
            max_lost=retry.max_lost,
            now=self._clock.now(),
            batch=request.batch,
        )

    async def _check_blobs(self, digests: Sequence[str]) -> None:
        for digest in digests:
            await self._blobs.stat(digest)  # raises BlobNotFound

    async def _check_repetitions(self, namespace: str, stored: StoredSpec, named: Sequence[NamedJob]) -> None:
        if not named:
            return
        known = await self._jobs.identities(namespace, [job_id for job_id, _ in named])
        for job_id, job in named:
            other = known.get(job_id)
            if other is not None and (
                other.spec_digest != stored.digest
                or other.arguments != bytes(job.arguments).decode()
                or other.arguments_blob != job.arguments_blob
                or other.inputs != encode_inputs(job)
            ):
                raise IdTaken(job_id)

    async def open_batch(self, namespace: str, request: OpenBatchRequest) -> BatchView:
        """Return the newest batch of this identity, its failed jobs reopened, or a new one."""
        _check_batch_request(request)
        newest = await self._batches.find_newest(namespace, request.identity)
        if newest is None or request.fresh:
            return await self._create_batch(namespace, request, newest.generation + 1 if newest else 1)
        if newest.total != request.total:
            raise InvalidRequest(f"the batch has {newest.total} jobs, not {request.total}", field="total")
        if request.rerun:
            await self._reopen_batch(namespace, newest.id)
        return await self._view_batch(newest)

    async def _create_batch(self, namespace: str, request: OpenBatchRequest, generation: int) -> BatchView:
        batch = Batch(
            id=batch_id(request.identity, generation),
            namespace=namespace,
            name=request.name,
            identity=request.identity,
            generation=generation,
            total=request.total,
            created_at=self._clock.now(),
        )
        created = await self._batches.add(batch)
        other = await self._batches.find_other_of_name(namespace, request.name, request.identity)
        unfinished = other is not None and not await self._is_finished(other)
        counts = await self._batches.count(namespace, batch.id)
        replaces = other.id if other is not None and unfinished else None
        return batch_view(batch, counts, sum(counts.values()), created=created, replaces=replaces)

    async def _is_finished(self, batch: Batch) -> bool:
        counts = await self._batches.count(batch.namespace, batch.id)
        return sum(n for state, n in counts.items() if state.is_terminal) >= batch.total

    async def _reopen_batch(self, namespace: str, batch: str) -> None:
        after = ""
        while ids := await self._batches.ids(namespace, batch, REOPENABLE, after=after, limit=MAX_BATCH_JOBS):
            await self._jobs.retry(namespace, ids, self._clock.now())
            after = ids[-1]

    async def _view_batch(self, batch: Batch) -> BatchView:
        counts = await self._batches.count(batch.namespace, batch.id)
        return batch_view(batch, counts, await contiguous(self._batches, batch, sum(counts.values())))

    async def cancel_job(self, namespace: str, job_id: str) -> CancelReply:
        """Cancel a job: at once if nobody runs it, else by request to its worker, which obeys within a second.

        Cancelling a cancelled job again is harmless. Raises ``JobNotFound``, ``InvalidTransition`` for other ended jobs.
        """
        changed = await self._jobs.cancel(namespace, [check_id(job_id)], self._clock.now())
        if changed:
            return CancelReply(id=job_id, state=changed[0].state)
        job = await self._jobs.find_by_id(namespace, job_id)
        if job is None:
            raise JobNotFound(job_id)
        if job.state is not JobState.CANCELLED:
            raise InvalidTransition(job_id, job.state, JobState.CANCELLED, hint="it has ended already")
        return CancelReply(id=job_id, state=job.state)

    async def cancel_batch(self, namespace: str, batch: str) -> int:
        """Cancel every job of a batch that has not ended; return how many. Raises ``BatchNotFound``."""
        if await self._batches.find(namespace, batch) is None:
            raise BatchNotFound(batch)
        cancelled, after = 0, ""
        while ids := await self._batches.ids(namespace, batch, LIVE, after=after, limit=MAX_BATCH_JOBS):
            cancelled += len(await self._jobs.cancel(namespace, ids, self._clock.now()))
            after = ids[-1]
        return cancelled

    async def retry_job(self, namespace: str, job_id: str) -> JobView:
        """Make a failed or cancelled job pending again with its counters set back.

        Raises ``JobNotFound``, ``InvalidTransition``.
        """
        reopened = await self._jobs.retry(namespace, [check_id(job_id)], self._clock.now())
        job = await self._jobs.find_by_id(namespace, job_id)
        if job is None:
            raise JobNotFound(job_id)
        if not reopened:
            raise InvalidTransition(
                job_id, job.state, JobState.PENDING, hint="only failed and cancelled jobs can be retried"
            )
        return job_view(job)


async def contiguous(batches: BatchRepository, batch: Batch, count: int) -> int:
    """Return how many first jobs of a batch exist without a gap; 0 if there is one, for then submitting all again is harmless."""
    return count if count == 0 or await batches.last_index(batch.namespace, batch.id) == count - 1 else 0


def _check_batch_request(request: OpenBatchRequest) -> None:
    if not re.fullmatch(r"[0-9a-f]{64}", request.identity):
        raise InvalidRequest("identity is not a SHA-256 in hexadecimal", field="identity")
    if not 0 <= request.total <= MAX_BATCH_TOTAL:
        raise LimitExceeded(
            f"total is {request.total}; up to {MAX_BATCH_TOTAL} jobs are allowed in a batch", field="total"
        )
    if not 1 <= len(request.name) <= 255:
        raise InvalidRequest("name must have 1 to 255 characters", field="name")


def _named_jobs(request: SubmitRequest) -> tuple[list[NamedJob], list[NamedJob]]:
    """Return the checked jobs with their ids, and those among them whose ids were chosen by hand."""
    jobs = request.jobs
    if not 1 <= len(jobs) <= MAX_BATCH_JOBS:
        raise LimitExceeded(f"a request takes 1 to {MAX_BATCH_JOBS} jobs, not {len(jobs)}", field="jobs")
    for place, job in enumerate(jobs):
        if job.priority or job.run_at is not None or job.inputs or len(job.arguments) > MAX_ARGUMENTS_BYTES:
            _check_job(job, place)
    if (request.batch is None) != (request.first_index is None):
        raise InvalidRequest("batch and first_index go together", field="first_index")
    if request.batch is not None and request.first_index is not None:
        return _jobs_of_batch(check_id(request.batch, field="batch"), request.first_index, jobs)
    named: list[NamedJob] = []
    chosen: list[NamedJob] = []
    fresh = iter(new_job_ids(sum(job.id is None for job in jobs)))
    for job in jobs:
        if job.id is None:
            named.append((next(fresh), job))
        elif _GENERATED.fullmatch(job.id):
            named.append((job.id, job))
        else:
            chosen.append((check_id(job.id), job))
            named.append(chosen[-1])
    if len({job_id for job_id, _ in named}) < len(named):
        raise InvalidRequest("the request names an id twice", field="jobs")
    return named, chosen


def _jobs_of_batch(batch: str, first: int, jobs: Sequence[NewJob]) -> tuple[list[NamedJob], list[NamedJob]]:
    named = [(batch_job_id(batch, first + place), job) for place, job in enumerate(jobs)]
    return named, [] if _GENERATED.fullmatch(named[0][0]) else named


def _check_job(job: NewJob, place: int) -> None:
    if len(job.arguments) > MAX_ARGUMENTS_BYTES:
        raise LimitExceeded(
            f"the arguments are {len(job.arguments)} bytes; {MAX_ARGUMENTS_BYTES} are allowed",
            field=f"jobs[{place}].arguments",
            hint="pass large data as an input file (a blob)",
        )
    if not -MAX_PRIORITY <= job.priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority is {job.priority}; -{MAX_PRIORITY} to {MAX_PRIORITY} is allowed", field=f"jobs[{place}].priority"
        )
    if job.run_at is not None and not 0 <= job.run_at <= MAX_RUN_AT:
        raise InvalidRequest("run_at is not a time in microseconds since 1970", field=f"jobs[{place}].run_at")
    if job.inputs:
        _check_inputs(job, place)


def _check_inputs(job: NewJob, place: int) -> None:
    if len(job.inputs) > MAX_INPUTS:
        raise LimitExceeded(f"{len(job.inputs)} input files; {MAX_INPUTS} are allowed", field=f"jobs[{place}].inputs")
    for item in job.inputs:
        check_input_path(item.path)


def _blobs_of_jobs(jobs: Sequence[NewJob]) -> list[str]:
    digests = {item.digest for job in jobs for item in job.inputs}
    digests |= {job.arguments_blob for job in jobs if job.arguments_blob is not None}
    return sorted(digests)

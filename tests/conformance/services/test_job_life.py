"""A job's life from submission to its end, and everything that must not change it."""

from __future__ import annotations

import msgspec
import pytest

from blixard.domain.event import EventType
from blixard.domain.grants import Grants, InputFile
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_ARGUMENTS_BYTES, MAX_BATCH_JOBS, MAX_PRIORITY
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import CommandPayload, ScriptPayload
from blixard.domain.requirements import Isolation, JobRequirements, WorkerType
from blixard.domain.retry import RetryPolicy
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.errors import BlobNotFound, IdTaken, InvalidRequest, InvalidTransition, JobNotFound, LimitExceeded
from blixard.protocol.jobs import SubmitRequest
from blixard.services.control_plane import ControlPlane
from blixard.testing.clock import FakeClock
from tests.conformance.services.worker import NAMESPACE, ScriptedWorker, completed, failed, make_spec, submit


async def state_of(plane: ControlPlane, job_id: str) -> JobState:
    return (await plane.queries.find_by_id(NAMESPACE, job_id)).state


async def test_a_job_goes_from_pending_to_completed_with_its_history(
    plane: ControlPlane, worker: ScriptedWorker, clock: FakeClock
) -> None:
    (job_id,) = await submit(plane, spec=make_spec(tags=("nightly",)), arguments=[[3], {}])
    assert await state_of(plane, job_id) is JobState.PENDING
    ref = await worker.claim_one()
    assert (ref.job_id, ref.attempt) == (job_id, 1)
    await worker.start(ref)
    assert await state_of(plane, job_id) is JobState.IN_PROGRESS
    clock.advance(1)
    await worker.finish(ref)
    detail = await plane.queries.job(NAMESPACE, job_id)
    assert (detail.state, detail.outcome, detail.exit_code) == (JobState.COMPLETED, OutcomeKind.COMPLETED, 0)
    assert msgspec.json.decode(detail.result or b"") == {"n": 1}
    assert detail.duration == pytest.approx(0.25)
    assert detail.worker == "worker-session_a"
    assert [a.outcome for a in detail.attempts] == [OutcomeKind.COMPLETED]
    events = await plane.queries.events(NAMESPACE, job_id)
    assert [e.type for e in events] == [EventType.SUBMITTED, EventType.CLAIMED, EventType.STARTED, EventType.COMPLETED]
    assert [e.seq for e in events] == sorted({e.seq for e in events})


async def test_a_short_job_may_end_without_ever_being_reported_as_started(
    plane: ControlPlane, worker: ScriptedWorker
) -> None:
    (job_id,) = await submit(plane)
    await worker.finish(await worker.claim_one())
    assert await state_of(plane, job_id) is JobState.COMPLETED


async def test_submitting_the_same_id_again_is_the_same_job(plane: ControlPlane) -> None:
    request = SubmitRequest(spec=make_spec(), jobs=[NewJob(id="mine", arguments=msgspec.Raw(b"[[1],{}]"))])
    first = await plane.commands.submit(NAMESPACE, request)
    second = await plane.commands.submit(NAMESPACE, request)
    assert (first.created, second.created, first.ids, second.ids) == (1, 0, ["mine"], ["mine"])


@pytest.mark.parametrize(
    ("spec", "job"),
    [
        (make_spec("other"), NewJob(id="mine", arguments=msgspec.Raw(b"[[1],{}]"))),
        (make_spec(), NewJob(id="mine", arguments=msgspec.Raw(b"[[2],{}]"))),
    ],
)
async def test_an_id_of_a_different_job_is_refused_and_nothing_is_stored(
    plane: ControlPlane, spec: JobSpec, job: NewJob
) -> None:
    first = NewJob(id="mine", arguments=msgspec.Raw(b"[[1],{}]"))
    await plane.commands.submit(NAMESPACE, SubmitRequest(spec=make_spec(), jobs=[first]))
    with pytest.raises(IdTaken):
        await plane.commands.submit(NAMESPACE, SubmitRequest(spec=spec, jobs=[NewJob(id="new"), job]))
    with pytest.raises(JobNotFound):
        await plane.queries.find_by_id(NAMESPACE, "new")


async def test_better_jobs_are_claimed_first_and_equal_ones_in_order_of_submission(
    plane: ControlPlane, worker: ScriptedWorker
) -> None:
    first, second = await submit(plane), await submit(plane)
    urgent = await submit(plane, priority=5)
    late = await submit(plane, priority=-5)
    other_class = await submit(plane, spec=make_spec(queue="other"), priority=3)
    claimed = [job.ref.job_id for job in await worker.claim(want=10)]
    assert claimed == [*urgent, *other_class, *first, *second, *late]


async def test_a_job_in_the_future_is_claimed_only_when_due(
    plane: ControlPlane, worker: ScriptedWorker, clock: FakeClock
) -> None:
    (job_id,) = await submit(plane, run_at=clock.now() + 60_000_000)
    assert not await worker.claim()
    clock.advance(59)
    assert (await plane.maintenance.run_once())["jobs_promoted"] == 0
    clock.advance(2)
    assert (await plane.maintenance.run_once())["jobs_promoted"] == 1
    assert (await worker.claim_one()).job_id == job_id


async def test_a_failed_attempt_is_tried_again_after_its_delay_until_the_retries_are_used_up(
    plane: ControlPlane, worker: ScriptedWorker, clock: FakeClock
) -> None:
    (job_id,) = await submit(plane, spec=make_spec(retry=RetryPolicy(retries=2, delay=10, factor=2, jitter=0)))
    for delay in (10, 20):
        await worker.finish(await worker.claim_one(), failed())
        job = await plane.queries.find_by_id(NAMESPACE, job_id)
        assert job.state is JobState.PENDING
        assert job.metadata.run_at == clock.now() + delay * 1_000_000
        assert not await worker.claim()
        clock.advance(delay + 0.1)
        await plane.maintenance.run_once()
    await worker.finish(await worker.claim_one(), failed())
    detail = await plane.queries.job(NAMESPACE, job_id)
    assert (detail.state, detail.failures, detail.attempt) == (JobState.FAILED, 3, 3)
    assert [a.outcome for a in detail.attempts] == [OutcomeKind.FAILED] * 3
    assert detail.error is not None
    assert detail.error.traceback == "Traceback …"


async def test_an_error_that_is_not_retryable_ends_the_job_at_once(plane: ControlPlane, worker: ScriptedWorker) -> None:
    (job_id,) = await submit(plane, spec=make_spec(retry=RetryPolicy(retries=5)))
    await worker.finish(await worker.claim_one(), failed(retryable=False))
    assert await state_of(plane, job_id) is JobState.FAILED


async def test_a_timeout_costs_a_retry_and_says_so(plane: ControlPlane, worker: ScriptedWorker) -> None:
    (job_id,) = await submit(plane)
    await worker.finish(await worker.claim_one(), failed(kind=OutcomeKind.TIMED_OUT))
    detail = await plane.queries.job(NAMESPACE, job_id)
    assert (detail.state, detail.outcome) == (JobState.FAILED, OutcomeKind.TIMED_OUT)


async def test_giving_back_costs_nothing(plane: ControlPlane, worker: ScriptedWorker) -> None:
    (job_id,) = await submit(plane)
    await worker.finish(await worker.claim_one(), Outcome(kind=OutcomeKind.RELEASED))
    job = await plane.queries.find_by_id(NAMESPACE, job_id)
    assert (job.state, job.metadata.failures, job.metadata.lost) == (JobState.PENDING, 0, 0)
    assert (await worker.claim_one()).attempt == 2


async def test_lost_attempts_are_repeated_max_lost_times_and_then_the_job_fails(
    plane: ControlPlane, worker: ScriptedWorker
) -> None:
    (job_id,) = await submit(plane, spec=make_spec(retry=RetryPolicy(max_lost=2)))
    for _ in range(3):
        assert await state_of(plane, job_id) is JobState.PENDING
        await worker.finish(await worker.claim_one(), Outcome(kind=OutcomeKind.LOST))
    detail = await plane.queries.job(NAMESPACE, job_id)
    assert (detail.state, detail.outcome, detail.lost, detail.failures) == (JobState.FAILED, OutcomeKind.LOST, 3, 0)


async def test_cancelling_what_waits_ends_it_at_once_and_twice_is_harmless(plane: ControlPlane) -> None:
    (job_id,) = await submit(plane)
    for _ in range(2):
        assert (await plane.commands.cancel_job(NAMESPACE, job_id)).state is JobState.CANCELLED


async def test_cancelling_what_runs_reaches_the_worker_and_its_end_is_cancelled(
    plane: ControlPlane, worker: ScriptedWorker
) -> None:
    (job_id,) = await submit(plane, spec=make_spec(retry=RetryPolicy(retries=3)))
    ref = await worker.claim_one()
    assert (await plane.commands.cancel_job(NAMESPACE, job_id)).state is JobState.CLAIMED
    assert (await worker.sync()).cancelled == [ref]
    await worker.finish(ref, failed())  # the failure that the cancel caused is no reason to try again
    assert await state_of(plane, job_id) is JobState.CANCELLED


async def test_a_job_that_completes_before_the_cancel_arrives_stays_completed(
    plane: ControlPlane, worker: ScriptedWorker
) -> None:
    (job_id,) = await submit(plane)
    ref = await worker.claim_one()
    await plane.commands.cancel_job(NAMESPACE, job_id)
    await worker.finish(ref, completed())
    assert await state_of(plane, job_id) is JobState.COMPLETED
    with pytest.raises(InvalidTransition):
        await plane.commands.cancel_job(NAMESPACE, job_id)


async def test_retry_reopens_failed_and_cancelled_jobs_only(plane: ControlPlane, worker: ScriptedWorker) -> None:
    (job_id,) = await submit(plane)
    with pytest.raises(InvalidTransition):
        await plane.commands.retry_job(NAMESPACE, job_id)
    await worker.finish(await worker.claim_one(), failed())
    view = await plane.commands.retry_job(NAMESPACE, job_id)
    assert (view.state, view.failures, view.error, view.finished_at) == (JobState.PENDING, 0, None, None)
    ref = await worker.claim_one()
    assert ref.attempt == 2  # the fencing token never goes back
    await worker.finish(ref)
    with pytest.raises(InvalidTransition):
        await plane.commands.retry_job(NAMESPACE, job_id)
    assert len((await plane.queries.job(NAMESPACE, job_id)).attempts) == 2


async def test_unknown_jobs_are_not_found(plane: ControlPlane) -> None:
    for call in (plane.queries.job, plane.commands.cancel_job, plane.commands.retry_job, plane.queries.why):
        with pytest.raises(JobNotFound):
            await call(NAMESPACE, "nothing")


async def test_a_job_of_another_namespace_does_not_exist(plane: ControlPlane) -> None:
    (job_id,) = await submit(plane)
    with pytest.raises(JobNotFound):
        await plane.queries.job("elsewhere", job_id)
    assert not (await plane.queries.wait("elsewhere", [job_id], wait=0)).ended


BAD_SPECS = [
    (make_spec(name=""), "name"),
    (make_spec(name="x" * 256), "name"),
    (make_spec(queue="a\nb"), "queue"),
    (make_spec(timeout=-1.0), "timeout"),
    (make_spec(timeout=0.0), "timeout"),
    (make_spec(timeout=float("nan")), "timeout"),
    (make_spec(retry=RetryPolicy(retries=-1)), "retry.retries"),
    (make_spec(retry=RetryPolicy(retries=1001)), "retry.retries"),
    (make_spec(retry=RetryPolicy(factor=0.5)), "retry.factor"),
    (make_spec(retry=RetryPolicy(delay=600)), "retry.delay"),
    (make_spec(requirements=JobRequirements(cpus=0)), "requirements.cpus"),
    (make_spec(requirements=JobRequirements(memory_mb=-5)), "requirements.memory_mb"),
    (make_spec(requirements=JobRequirements(worker_types=(WorkerType.WASM,))), "requirements.worker_types"),
    (make_spec(payload=CommandPayload(argv=())), "payload.argv"),
    (make_spec(grants=Grants(read=("relative",))), "grants.read"),
    (make_spec(grants=Grants(write=("/a/../b",))), "grants.write"),
    (make_spec(grants=Grants(read=("/",))), "grants.read"),
    (make_spec(environment={"A=B": "c"}), "environment"),
    (make_spec(environment={f"A{n}": "" for n in range(257)}), "environment"),
    (make_spec(tags=tuple(f"t{n}" for n in range(33))), "tags"),
    (make_spec(max_output_bytes=-1), "max_output_bytes"),
]


@pytest.mark.parametrize(("spec", "field"), BAD_SPECS)
async def test_a_wrong_spec_is_refused_with_the_name_of_the_field(
    plane: ControlPlane, spec: JobSpec, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await submit(plane, spec=spec)
    assert caught.value.field == field
    assert not (await plane.queries.stats(NAMESPACE)).jobs


BAD_JOBS = [
    (NewJob(id=""), "id"),
    (NewJob(id="x" * 256), "id"),
    (NewJob(id="a b"), "id"),
    (NewJob(id="../etc"), "id"),
    (NewJob(priority=MAX_PRIORITY + 1), "jobs[0].priority"),
    (NewJob(run_at=-1), "jobs[0].run_at"),
    (NewJob(arguments=msgspec.Raw(b'"' + b"x" * MAX_ARGUMENTS_BYTES + b'"')), "jobs[0].arguments"),
    (NewJob(inputs=(InputFile(path="../up", digest="0" * 64),)), "inputs"),
    (NewJob(inputs=tuple(InputFile(path=f"f{n}", digest="0" * 64) for n in range(257))), "jobs[0].inputs"),
]


@pytest.mark.parametrize(("job", "field"), BAD_JOBS)
async def test_a_wrong_job_is_refused_with_the_name_of_the_field(plane: ControlPlane, job: NewJob, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await plane.commands.submit(NAMESPACE, SubmitRequest(spec=make_spec(), jobs=[job]))
    assert caught.value.field == field


async def test_limits_are_allowed_at_their_edge_and_refused_beyond(plane: ControlPlane) -> None:
    assert len(await submit(plane, MAX_BATCH_JOBS)) == MAX_BATCH_JOBS
    with pytest.raises(LimitExceeded):
        await submit(plane, MAX_BATCH_JOBS + 1)
    with pytest.raises(LimitExceeded):
        await submit(plane, 0)
    edge = NewJob(id="x" * 255, arguments=msgspec.Raw(b'"' + b"x" * (MAX_ARGUMENTS_BYTES - 2) + b'"'))
    reply = await plane.commands.submit(NAMESPACE, SubmitRequest(spec=make_spec(), jobs=[edge]))
    job = await plane.queries.find_by_id(NAMESPACE, reply.ids[0])
    assert bytes(job.arguments) == bytes(edge.arguments)
    timed = make_spec("timed", timeout=30 * 24 * 3600.0, requirements=JobRequirements(isolation=Isolation.STANDARD))
    assert await submit(plane, spec=timed)


async def test_a_blob_that_is_not_there_is_refused_at_the_door(plane: ControlPlane) -> None:
    with pytest.raises(BlobNotFound):
        await submit(plane, spec=make_spec(payload=ScriptPayload(path="a.py", bundle="0" * 64)))
    with pytest.raises(BlobNotFound):
        await submit(plane, inputs=[{"path": "data.csv", "digest": "0" * 64}])
    digest = await plane.blobs.put(b"content")
    assert await submit(plane, inputs=[{"path": "data.csv", "digest": digest}])


async def test_the_same_id_twice_in_a_request_is_refused(plane: ControlPlane) -> None:
    with pytest.raises(InvalidRequest):
        await plane.commands.submit(NAMESPACE, SubmitRequest(spec=make_spec(), jobs=[NewJob(id="a"), NewJob(id="a")]))

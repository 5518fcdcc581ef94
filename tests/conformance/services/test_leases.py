"""Fencing, repetition, parking, rescue: what keeps a job from being lost or run by two owners at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from blixard.domain.lease import AttemptRef, FinishedAttempt
from blixard.domain.outcome import OutcomeKind
from blixard.domain.requirements import Isolation, JobRequirements, WorkerType
from blixard.domain.retry import RetryPolicy
from blixard.domain.state_machine import JobState
from blixard.domain.worker import SessionState, WorkerOffer
from blixard.errors import InvalidRequest, LeaseLost, SessionExpired
from blixard.protocol.workers import LogBatch
from blixard.services.control_plane import ControlPlane
from blixard.services.placement import RELOAD_SECONDS
from blixard.storage.locks import FileLock, boot_id
from blixard.testing.clock import FakeClock
from tests.conformance.services.worker import NAMESPACE, OFFER, ScriptedWorker, completed, failed, make_spec, submit

LEASE = 10.0
DEADLINE = 20.0


async def pass_lease_time(plane: ControlPlane, clock: FakeClock, seconds: float = LEASE + 4) -> int:
    """Let the rescuer watch for so long, a second at a time; return the leases it took."""
    taken = 0
    for _ in range(int(seconds)):
        taken += (await plane.maintenance.run_once())["leases_lost"]
        clock.advance(1)
    return taken + (await plane.maintenance.run_once())["leases_lost"]


async def test_repeating_a_sync_gives_the_same_claims_and_claims_nothing_more(
    plane: ControlPlane, worker: ScriptedWorker
) -> None:
    await submit(plane, 5)
    request = worker.request(want=2)
    first = await plane.workers.sync(NAMESPACE, request)
    again = await plane.workers.sync(NAMESPACE, request)
    assert [c.ref for c in first.claimed] == [c.ref for c in again.claimed]
    assert len(first.claimed) == 2
    assert set(again.specs) == {c.spec for c in again.claimed}


async def test_a_repeated_report_is_a_success_and_changes_nothing(plane: ControlPlane, worker: ScriptedWorker) -> None:
    (job_id,) = await submit(plane)
    ref = await worker.claim_one()
    request = worker.request(finished=[FinishedAttempt(ref=ref, outcome=completed())])
    for _ in range(2):
        assert not (await plane.workers.sync(NAMESPACE, request)).lost
    late = await worker.finish(ref, failed())  # and a later contradiction does not undo it
    assert not late.lost
    assert (await plane.queries.find_by_id(NAMESPACE, job_id)).state is JobState.COMPLETED
    assert len((await plane.queries.job(NAMESPACE, job_id)).attempts) == 1


async def test_a_stale_attempt_changes_nothing_and_is_told(
    plane: ControlPlane, worker: ScriptedWorker, clock: FakeClock
) -> None:
    (job_id,) = await submit(plane)
    stale = await worker.claim_one()
    assert await pass_lease_time(plane, clock) == 1
    other = ScriptedWorker(plane, "session_b")
    await other.register()
    fresh = await other.claim_one()
    assert (fresh.job_id, fresh.attempt) == (job_id, stale.attempt + 1)
    with pytest.raises(SessionExpired):
        await worker.finish(stale, failed())
    theirs = await other.finish(AttemptRef(NAMESPACE, job_id, stale.attempt), failed())
    assert theirs.lost == [AttemptRef(NAMESPACE, job_id, stale.attempt)]
    assert (await plane.queries.find_by_id(NAMESPACE, job_id)).state is JobState.CLAIMED
    await other.finish(fresh)
    assert (await plane.queries.find_by_id(NAMESPACE, job_id)).state is JobState.COMPLETED


async def test_no_worker_can_report_what_another_claimed(plane: ControlPlane, worker: ScriptedWorker) -> None:
    (job_id,) = await submit(plane)
    ref = await worker.claim_one()
    thief = ScriptedWorker(plane, "session_thief")
    await thief.register()
    assert (await thief.finish(ref)).lost == [ref]
    with pytest.raises(LeaseLost):
        await plane.workers.append_logs(NAMESPACE, "session_thief", [LogBatch(ref=ref, offset=0)])
    assert (await plane.queries.find_by_id(NAMESPACE, job_id)).state is JobState.CLAIMED


async def test_only_the_token_that_registered_a_session_can_speak_for_it(plane: ControlPlane) -> None:
    worker = ScriptedWorker(plane, "session_of_a_token")
    worker.token = "token_a"
    await worker.register()
    (job_id,) = await submit(plane)
    ref = await worker.claim_one()
    for owner, token in ((NAMESPACE, "token_b"), (NAMESPACE, ""), ("other", "token_a")):
        report = worker.request(finished=[FinishedAttempt(ref=ref, outcome=completed())])
        with pytest.raises(SessionExpired):
            await plane.workers.sync(owner, report, token=token)
        with pytest.raises(SessionExpired):
            await plane.workers.append_logs(owner, worker.session, [LogBatch(ref=ref, offset=0)], token=token)
        await plane.workers.close(owner, worker.session, token=token)
    await worker.register(name="a repetition by the owner")
    assert (await plane.queries.find_by_id(NAMESPACE, job_id)).state is JobState.CLAIMED
    await worker.finish(ref)
    assert (await plane.queries.find_by_id(NAMESPACE, job_id)).state is JobState.COMPLETED


async def test_a_lease_that_the_worker_does_not_list_is_taken_back(plane: ControlPlane, worker: ScriptedWorker) -> None:
    kept_id, dropped_id = await submit(plane, 2)
    kept, dropped = [c.ref for c in await worker.claim(want=2)]
    await worker.start(dropped)
    reply = await worker.sync(holding=[kept, AttemptRef(NAMESPACE, "ghost", 1)], seen=worker.number)
    assert reply.lost == [AttemptRef(NAMESPACE, "ghost", 1)]
    assert (await plane.queries.find_by_id(NAMESPACE, kept_id)).state is JobState.CLAIMED
    job = await plane.queries.find_by_id(NAMESPACE, dropped_id)
    assert (job.state, job.metadata.lost) == (JobState.PENDING, 1)


async def test_a_claim_whose_answer_is_under_way_is_not_taken_for_lost(
    plane: ControlPlane, worker: ScriptedWorker
) -> None:
    (job_id,) = await submit(plane)
    await worker.claim_one()
    await worker.sync(holding=[], seen=worker.number - 1)
    assert (await plane.queries.find_by_id(NAMESPACE, job_id)).state is JobState.CLAIMED


async def test_the_rescuer_takes_leases_only_after_watching_the_lease_time(
    plane: ControlPlane, worker: ScriptedWorker, clock: FakeClock
) -> None:
    (job_id,) = await submit(plane)
    await worker.claim_one()
    assert await pass_lease_time(plane, clock, LEASE - 2) == 0
    await worker.sync()
    assert await pass_lease_time(plane, clock, LEASE - 2) == 0
    assert await pass_lease_time(plane, clock, 6) == 1
    assert (await plane.queries.find_by_id(NAMESPACE, job_id)).state is JobState.PENDING


async def test_a_jump_of_the_clock_or_a_paused_rescuer_expires_nothing(
    plane: ControlPlane, worker: ScriptedWorker, clock: FakeClock
) -> None:
    await submit(plane)
    await worker.claim_one()
    await plane.maintenance.run_once()
    clock.jump(24 * 3600)
    assert (await plane.maintenance.run_once())["leases_lost"] == 0
    clock.jump(-48 * 3600)
    clock.advance(3600)  # the rescuer slept for an hour: that counts for two intervals
    assert (await plane.maintenance.run_once())["leases_lost"] == 0
    await worker.sync()


async def test_a_free_lock_ends_a_session_of_this_machine_at_once(
    plane: ControlPlane, worker: ScriptedWorker, tmp_path: Path
) -> None:
    await submit(plane)
    local = ScriptedWorker(plane, "session_local")
    await local.register(host=boot_id())
    lock = FileLock.create(tmp_path / "sessions" / "session_local.lock")
    ref = await local.claim_one()
    await local.start(ref)
    assert (await plane.maintenance.run_once())["leases_lost"] == 0
    lock.release()
    assert (await plane.maintenance.run_once())["leases_lost"] == 1
    job = await plane.queries.find_by_id(NAMESPACE, ref.job_id)
    assert (job.state, job.metadata.lost) == (JobState.PENDING, 1)


async def test_what_was_only_claimed_goes_back_for_nothing_when_its_worker_dies(
    plane: ControlPlane, clock: FakeClock
) -> None:
    (job_id,) = await submit(plane, spec=make_spec(retry=RetryPolicy(max_lost=0)))
    for n in range(5):
        worker = ScriptedWorker(plane, f"session_{n}")
        await worker.register()
        await worker.claim_one()
        await pass_lease_time(plane, clock)
    job = await plane.queries.find_by_id(NAMESPACE, job_id)
    assert (job.state, job.metadata.lost, job.metadata.attempt) == (JobState.PENDING, 0, 5)


async def test_a_started_job_whose_workers_die_fails_after_max_lost(plane: ControlPlane, clock: FakeClock) -> None:
    (job_id,) = await submit(plane, spec=make_spec(retry=RetryPolicy(max_lost=1)))
    for n in range(2):
        worker = ScriptedWorker(plane, f"session_{n}")
        await worker.register()
        await worker.start(await worker.claim_one())
        await pass_lease_time(plane, clock)
    detail = await plane.queries.job(NAMESPACE, job_id)
    assert (detail.state, detail.outcome) == (JobState.FAILED, OutcomeKind.LOST)
    assert detail.error is not None
    assert detail.error.type == "WorkerLost"


async def test_a_cancelled_job_whose_worker_dies_is_cancelled_not_repeated(
    plane: ControlPlane, worker: ScriptedWorker, clock: FakeClock
) -> None:
    (job_id,) = await submit(plane)
    await worker.start(await worker.claim_one())
    await plane.commands.cancel_job(NAMESPACE, job_id)
    await pass_lease_time(plane, clock)
    assert (await plane.queries.find_by_id(NAMESPACE, job_id)).state is JobState.CANCELLED


async def test_good_bye_gives_back_what_is_left_and_may_be_repeated(
    plane: ControlPlane, worker: ScriptedWorker
) -> None:
    (job_id,) = await submit(plane)
    await worker.claim_one()
    for _ in range(2):
        await plane.workers.close(NAMESPACE, worker.session)
    assert (await plane.queries.find_by_id(NAMESPACE, job_id)).state is JobState.PENDING
    with pytest.raises(SessionExpired):
        await worker.sync()


async def test_a_draining_worker_gets_nothing_new_and_is_told(plane: ControlPlane, worker: ScriptedWorker) -> None:
    await submit(plane)
    view = await plane.workers.drain(NAMESPACE, worker.session)
    assert view.state is SessionState.DRAINING
    reply = await worker.sync(want=1)
    assert (reply.drain, reply.claimed) == (True, [])


async def test_a_parked_sync_wakes_for_a_job_a_cancel_and_its_successor(
    plane: ControlPlane, worker: ScriptedWorker
) -> None:
    parked = asyncio.create_task(worker.claim(wait=3))
    (job_id,) = await submit(plane)
    claimed = await asyncio.wait_for(parked, DEADLINE)
    assert [c.ref.job_id for c in claimed] == [job_id]
    full = asyncio.create_task(worker.sync(want=0, wait=3))
    await plane.commands.cancel_job(NAMESPACE, job_id)
    assert (await asyncio.wait_for(full, DEADLINE)).cancelled == [claimed[0].ref]
    await worker.finish(claimed[0].ref, failed())
    old = asyncio.create_task(worker.claim(wait=3))
    await asyncio.sleep(0)
    assert not await worker.claim(wait=0)
    assert not await asyncio.wait_for(old, DEADLINE)


async def test_sizes_labels_queues_and_isolation_decide_who_may_claim(plane: ControlPlane) -> None:
    needs = JobRequirements(isolation=Isolation.STANDARD, labels={"zone": "a"}, cpus=1.5, memory_mb=600)
    (job_id,) = await submit(plane, spec=make_spec(queue="images", requirements=needs))
    good: dict[str, object] = {"labels": {"zone": "a", "x": "y"}, "cpus": 2.0, "memory_mb": 1024, "queues": ("images",)}
    bad: list[dict[str, object]] = [
        {"labels": {"zone": "b"}},
        {"cpus": 1.0},
        {"memory_mb": 512},
        {"queues": ("default",)},
        {"capabilities": {WorkerType.PROCESS: (Isolation.MINIMAL,)}},
        {"capabilities": {WorkerType.WASM: (Isolation.STANDARD,)}},
    ]
    changes: list[dict[str, object]] = [*bad, {}]
    for number, change in enumerate(changes):
        offer = WorkerOffer(capabilities=OFFER.capabilities)
        for name, value in {**good, **change}.items():
            offer = _with(offer, name, value)
        worker = ScriptedWorker(plane, f"session_{number}", offer)
        await worker.register()
        claimed = await worker.sync(want=1, free_cpus=offer.cpus, free_memory_mb=offer.memory_mb)
        assert [c.ref.job_id for c in claimed.claimed] == ([] if change else [job_id]), change


def _with(offer: WorkerOffer, name: str, value: object) -> WorkerOffer:
    return msgspec.structs.replace(offer, **{name: value})


async def test_free_size_bounds_a_claim(plane: ControlPlane, worker: ScriptedWorker) -> None:
    await submit(plane, spec=make_spec(requirements=JobRequirements(isolation=Isolation.MINIMAL, cpus=2)))
    assert not (await worker.sync(want=1, free_cpus=1)).claimed
    assert (await worker.sync(want=1, free_cpus=2)).claimed


async def test_an_embedded_workers_jobs_are_its_own_until_its_process_dies(
    plane: ControlPlane, tmp_path: Path, clock: FakeClock
) -> None:
    lock = FileLock.create(tmp_path / "submitters" / "me.lock")
    (job_id,) = await submit(plane, submitter="me")
    mine = ScriptedWorker(plane, "session_mine", _with(OFFER, "submitter", "me"))
    server = ScriptedWorker(plane, "session_server")
    for worker in (mine, server):
        await worker.register()
    await plane.maintenance.run_once()
    assert not await server.claim()
    (theirs,) = await submit(plane)
    claimed = await mine.claim(want=10)
    assert [c.ref.job_id for c in claimed] == [job_id]
    await plane.workers.close(NAMESPACE, mine.session)
    lock.release()
    assert (await plane.maintenance.run_once())["classes_opened"] == 1
    clock.advance(RELOAD_SECONDS)
    assert sorted(c.ref.job_id for c in await server.claim(want=10)) == sorted([job_id, theirs])


async def test_an_embedded_worker_takes_its_own_jobs_before_orphans(plane: ControlPlane, tmp_path: Path) -> None:
    (orphan,) = await submit(plane, submitter="dead", priority=5)
    lock = FileLock.create(tmp_path / "submitters" / "me.lock")
    (own,) = await submit(plane, submitter="me")
    await plane.maintenance.run_once()
    mine = ScriptedWorker(plane, "session_mine", _with(OFFER, "submitter", "me"))
    await mine.register()
    assert [c.ref.job_id for c in await mine.claim(want=10)] == [own]
    assert [c.ref.job_id for c in await mine.claim(want=10)] == [orphan]
    lock.release()


async def test_requests_beyond_the_limits_are_refused(plane: ControlPlane, worker: ScriptedWorker) -> None:
    for fields in ({"want": 1001}, {"want": -1}, {"wait": 4.0}, {"number": 0}):
        with pytest.raises(InvalidRequest):
            await worker.sync(**fields)

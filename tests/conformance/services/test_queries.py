"""Listing, waiting, batches, why, statistics."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib

import msgspec
import pytest

from blixard.domain.batch import batch_identity, batch_job_id
from blixard.domain.job import NewJob
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.retry import RetryPolicy
from blixard.domain.state_machine import JobState
from blixard.errors import BatchNotFound, InvalidRequest, LimitExceeded
from blixard.protocol.jobs import BatchView, JobFilter, OpenBatchRequest, SubmitRequest
from blixard.services.control_plane import ControlPlane
from blixard.testing.clock import FakeClock
from tests.conformance.services.worker import NAMESPACE, OFFER, ScriptedWorker, failed, make_spec, submit

IDENTITY = hashlib.sha256(b"a map").hexdigest()
DEADLINE = 20.0


async def ids_of(plane: ControlPlane, **where: object) -> list[str]:
    page = await plane.queries.jobs(NAMESPACE, msgspec.convert(where, JobFilter), limit=1000)
    return [job.id for job in page.jobs]


async def test_a_listing_is_newest_first_and_continues_at_its_cursor(plane: ControlPlane) -> None:
    ids = await submit(plane, 25)
    seen: list[str] = []
    cursor = None
    while True:
        page = await plane.queries.jobs(NAMESPACE, JobFilter(), limit=10, cursor=cursor)
        seen += [job.id for job in page.jobs]
        cursor = page.cursor
        if cursor is None:
            break
        await submit(plane)  # what comes in between does not disturb the rest
    assert seen == ids[::-1]


async def test_ids_chosen_by_users_do_not_disturb_the_order_of_time(plane: ControlPlane, clock: FakeClock) -> None:
    chosen = []
    for job_id in ("zebra", "alpha", "mmm"):
        await plane.commands.submit(NAMESPACE, SubmitRequest(spec=make_spec(), jobs=[NewJob(id=job_id)]))
        clock.advance(1)
        chosen.append(job_id)
    assert await ids_of(plane) == chosen[::-1]
    assert await ids_of(plane, name="noop") == chosen[::-1]
    assert await ids_of(plane, states=["pending"]) == chosen[::-1]
    first = await plane.queries.jobs(NAMESPACE, JobFilter(), limit=2)
    rest = await plane.queries.jobs(NAMESPACE, JobFilter(), limit=2, cursor=first.cursor)
    assert [job.id for job in rest.jobs] == ["zebra"]


async def test_filters_name_tag_queue_state_and_time(
    plane: ControlPlane, worker: ScriptedWorker, clock: FakeClock
) -> None:
    (plain,) = await submit(plane)
    (tagged,) = await submit(plane, spec=make_spec("other", tags=("nightly", "big"), queue="q2"))
    await worker.finish((await worker.claim())[0].ref)
    running = await worker.claim_one()
    clock.advance(3600)
    (late,) = await submit(plane)
    assert running.job_id == tagged
    assert await ids_of(plane, name="other") == [tagged]
    assert await ids_of(plane, tag="big") == [tagged]
    assert await ids_of(plane, queue="q2") == [tagged]
    assert await ids_of(plane, queue="default") == [late, plain]
    assert await ids_of(plane, states=["completed"]) == [plain]
    assert await ids_of(plane, states=["claimed", "in_progress"]) == [tagged]
    assert await ids_of(plane, states=["completed", "claimed", "pending"]) == [late, tagged, plain]
    assert await ids_of(plane, name="other", states=["pending"]) == []
    assert await ids_of(plane, tag="none") == []
    border = dt.datetime.fromtimestamp(clock.now() / 1e6 - 60, tz=dt.UTC)
    assert await ids_of(plane, since=border) == [late]
    assert await ids_of(plane, until=border) == [tagged, plain]


async def test_wrong_bounds_of_a_listing_are_refused(plane: ControlPlane) -> None:
    for limit in (0, 1001):
        with pytest.raises(LimitExceeded):
            await plane.queries.jobs(NAMESPACE, JobFilter(), limit=limit)
    with pytest.raises(InvalidRequest):
        await plane.queries.jobs(NAMESPACE, JobFilter(), cursor="a b")
    with pytest.raises(InvalidRequest):
        await plane.queries.jobs(NAMESPACE, JobFilter(), cursor="9:")
    with pytest.raises(InvalidRequest):
        await plane.queries.jobs(NAMESPACE, JobFilter(since=dt.datetime(2026, 1, 1)), limit=1)  # noqa: DTZ001 - that is the mistake
    with pytest.raises(InvalidRequest):
        await plane.queries.jobs(NAMESPACE, JobFilter(batch="map_x", name="y"))


async def test_waiting_ends_with_the_first_job_that_ends(plane: ControlPlane, worker: ScriptedWorker) -> None:
    ids = await submit(plane, 3)
    waiting = asyncio.create_task(plane.queries.wait(NAMESPACE, ids, wait=60))
    ref = await worker.claim_one()
    await worker.finish(ref)
    reply = await asyncio.wait_for(waiting, DEADLINE)
    assert [(r.id, r.state) for r in reply.ended] == [(ref.job_id, JobState.COMPLETED)]
    assert (await plane.queries.wait(NAMESPACE, [ids[1], "nothing"], wait=60)).unknown == ["nothing"]
    for wrong in ([], ["x"] * 1001):
        with pytest.raises(LimitExceeded):
            await plane.queries.wait(NAMESPACE, wrong, wait=0)
    with pytest.raises(InvalidRequest):
        await plane.queries.wait(NAMESPACE, ids, wait=-1)


async def open_batch(plane: ControlPlane, total: int, **fields: object) -> BatchView:
    base = OpenBatchRequest(name="measure", identity=IDENTITY, total=total)
    return await plane.commands.open_batch(NAMESPACE, msgspec.structs.replace(base, **fields))


async def fill(plane: ControlPlane, batch: BatchView, first: int, count: int) -> None:
    request = SubmitRequest(spec=make_spec(), jobs=[NewJob() for _ in range(count)], batch=batch.id, first_index=first)
    await plane.commands.submit(NAMESPACE, request)


async def test_a_batch_is_found_again_and_its_results_come_in_the_order_of_their_ends(
    plane: ControlPlane, worker: ScriptedWorker
) -> None:
    batch = await open_batch(plane, 3)
    assert (batch.created, batch.submitted) == (True, 0)
    await fill(plane, batch, 0, 2)
    await fill(plane, batch, 0, 3)  # submitted again after a crash: only the missing one is new
    claimed = [c.ref for c in await worker.claim(want=10)]
    assert [ref.job_id for ref in claimed] == [batch_job_id(batch.id, n) for n in range(3)]
    await worker.finish(claimed[2])
    await worker.finish(claimed[0], failed())
    page = await plane.queries.batch_results(NAMESPACE, batch.id)
    assert [(r.index, r.state) for r in page.results] == [(2, JobState.COMPLETED), (0, JobState.FAILED)]
    assert not page.done
    waiting = asyncio.create_task(plane.queries.batch_results(NAMESPACE, batch.id, after=page.position, wait=60))
    await worker.finish(claimed[1])
    last = await asyncio.wait_for(waiting, DEADLINE)
    assert [r.index for r in last.results] == [1]
    end = await plane.queries.batch_results(NAMESPACE, batch.id, after=last.position, wait=60)
    assert (end.results, end.done, end.position) == ([], True, last.position)
    again = await open_batch(plane, 3)
    assert (again.created, again.id, again.submitted) == (False, batch.id, 3)
    assert again.counts == {JobState.COMPLETED: 2, JobState.PENDING: 1}  # the failed one runs again
    (ref,) = [c.ref for c in await worker.claim(want=10)]
    await worker.finish(ref)
    rest = await plane.queries.batch_results(NAMESPACE, batch.id, after=last.position)
    assert ([r.index for r in rest.results], rest.done) == ([0], True)


async def test_a_fresh_batch_starts_anew_and_changed_code_names_what_it_replaces(plane: ControlPlane) -> None:
    first = await open_batch(plane, 2)
    fresh = await open_batch(plane, 2, fresh=True)
    assert (fresh.generation, fresh.created, fresh.replaces) == (2, True, None)
    assert (await open_batch(plane, 2)).id == fresh.id != first.id
    changed = await open_batch(plane, 2, identity=hashlib.sha256(b"changed").hexdigest())
    assert changed.replaces in {first.id, fresh.id}


async def test_a_gap_in_a_batch_makes_the_client_submit_all_again(plane: ControlPlane) -> None:
    batch = await open_batch(plane, 4)
    await fill(plane, batch, 2, 2)
    assert (await plane.queries.batch(NAMESPACE, batch.id)).submitted == 0
    await fill(plane, batch, 0, 2)
    assert (await plane.queries.batch(NAMESPACE, batch.id)).submitted == 4


async def test_cancelling_a_batch_spares_what_has_ended(plane: ControlPlane, worker: ScriptedWorker) -> None:
    batch = await open_batch(plane, 3)
    await fill(plane, batch, 0, 3)
    await worker.finish(await worker.claim_one())
    assert await plane.commands.cancel_batch(NAMESPACE, batch.id) == 2
    counts = (await plane.queries.batch(NAMESPACE, batch.id)).counts
    assert counts == {JobState.COMPLETED: 1, JobState.CANCELLED: 2}
    for call in (plane.commands.cancel_batch, plane.queries.batch, plane.queries.batch_results):
        with pytest.raises(BatchNotFound):
            await call(NAMESPACE, "map_none_1")


@pytest.mark.parametrize(
    ("fields", "field"), [({"identity": "x"}, "identity"), ({"total": -1}, "total"), ({"name": ""}, "name")]
)
async def test_a_wrong_batch_is_refused(plane: ControlPlane, fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await open_batch(plane, **{"total": 1, **fields})  # type: ignore[arg-type]  # the table gives every field its type
    assert caught.value.field == field


async def test_an_empty_batch_is_done(plane: ControlPlane) -> None:
    batch = await open_batch(plane, 0)
    assert (await plane.queries.batch_results(NAMESPACE, batch.id, wait=60)).done


def test_the_identity_of_a_map_tells_apart_what_differs() -> None:
    same = batch_identity("default", "spec", [b"ab", b"c"])
    assert same == batch_identity("default", "spec", iter([b"ab", b"c"]))
    others = {
        batch_identity("other", "spec", [b"ab", b"c"]),
        batch_identity("default", "spec2", [b"ab", b"c"]),
        batch_identity("default", "spec", [b"a", b"bc"]),
        batch_identity("default", "spec", [b"c", b"ab"]),
        batch_identity("default", "spec", [b"ab", b"c", b""]),
    }
    assert len(others | {same}) == 6


async def codes(plane: ControlPlane, job_id: str) -> list[str]:
    return [reason.code for reason in (await plane.queries.why(NAMESPACE, job_id)).reasons]


async def test_why_gives_every_reason_and_what_would_unblock_it(plane: ControlPlane, clock: FakeClock) -> None:
    (job_id,) = await submit(plane)
    assert await codes(plane, job_id) == ["no_workers"]
    wasm_only = ScriptedWorker(plane, "session_small", msgspec.structs.replace(OFFER, queues=("other",), slots=1))
    await wasm_only.register()
    view = await plane.queries.why(NAMESPACE, job_id)
    assert [r.code for r in view.reasons] == ["no_fitting_worker", "worker_unfit"]
    assert "does not serve queue 'default'" in view.reasons[1].text
    (sized,) = await submit(plane, spec=make_spec(requirements=JobRequirements(cpus=64, isolation=Isolation.MINIMAL)))
    assert "wants 64" in (await plane.queries.why(NAMESPACE, sized)).reasons[-1].text
    worker = ScriptedWorker(plane, "session_good", msgspec.structs.replace(OFFER, slots=1))
    await worker.register()
    assert await codes(plane, job_id) == []
    (second,) = await submit(plane)
    assert await codes(plane, second) == ["queue"]
    ref = await worker.claim_one()
    await worker.start(ref)
    assert "running on worker-session_good" in (await plane.queries.why(NAMESPACE, job_id)).summary
    (later,) = await submit(plane, run_at=clock.now() + 90_000_000)
    assert await codes(plane, later) == ["not_due"]
    await plane.workers.drain(NAMESPACE, worker.session)
    assert await codes(plane, second) == ["draining"]
    await worker.finish(ref)
    assert (await plane.queries.why(NAMESPACE, job_id)).summary == "it has completed"


async def test_why_says_that_nobody_waits_for_an_embedded_submission(plane: ControlPlane) -> None:
    (job_id,) = await submit(plane, submitter="gone")
    assert await codes(plane, job_id) == ["not_waited_for"]


async def test_statistics_are_those_of_the_rows(plane: ControlPlane, worker: ScriptedWorker) -> None:
    await submit(plane, 5)
    await submit(plane, 2, spec=make_spec(queue="q2", retry=RetryPolicy(retries=1, delay=0, jitter=0)))
    refs = [c.ref for c in await worker.claim(want=7)]
    for ref in refs[:3]:
        await worker.finish(ref)
    await worker.finish(refs[6], failed())
    await plane.commands.cancel_job(NAMESPACE, refs[6].job_id)
    stats = await plane.queries.stats(NAMESPACE)
    assert stats.jobs == {JobState.COMPLETED: 3, JobState.CLAIMED: 3, JobState.CANCELLED: 1}
    assert stats.queues["q2"] == {JobState.CLAIMED: 1, JobState.CANCELLED: 1}
    assert stats.workers == {"online": 1}
    (view,) = await plane.workers.workers(NAMESPACE)
    assert view.leased == 3

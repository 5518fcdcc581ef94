"""What every client promises: same calls, same results, same errors."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import msgspec
import pytest

from blixard.client.contract import AsyncClient
from blixard.domain.event import EventType
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_BATCH_JOBS
from blixard.domain.payload import CommandPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.errors import (
    BatchNotFound,
    BlobNotFound,
    IdTaken,
    InvalidRequest,
    InvalidTransition,
    JobNotFound,
    LimitExceeded,
    TokenNotFound,
    WaitTimedOut,
    WorkerNotFound,
)
from blixard.protocol.jobs import JobFilter, OpenBatchRequest, SubmitRequest
from blixard.protocol.workers import CreateTokenRequest, Scope

DEADLINE = 60.0
MISSING = "0" * 64


def spec(*argv: str, **fields: object) -> JobSpec:
    payload = CommandPayload(argv=argv or ("true",))
    needs = JobRequirements(isolation=Isolation.MINIMAL)
    return msgspec.convert({"name": "job", "payload": payload, "requirements": needs, **fields}, JobSpec)


def jobs(count: int) -> list[NewJob]:
    return [NewJob(arguments=msgspec.Raw(b'["%d"]' % n)) for n in range(count)]


async def test_a_job_is_stored_and_found(client: AsyncClient) -> None:
    job = await client.submit(spec(tags=("blue",)), NewJob(arguments=msgspec.Raw(b'["x"]'), priority=3))
    detail = await client.job(job)
    assert (detail.id, detail.state, detail.priority, detail.tags) == (job, JobState.PENDING, 3, ("blue",))
    assert bytes(detail.arguments) == b'["x"]'
    assert detail.spec == spec(tags=("blue",))
    assert detail.attempts == []


async def test_a_repeated_id_is_the_same_job_and_other_content_is_refused(client: AsyncClient) -> None:
    request = SubmitRequest(spec=spec(), jobs=[NewJob(id="mine"), NewJob(id="yours")])
    first = await client.submit_many(request)
    again = await client.submit_many(request)
    assert (first.ids, first.created) == (["mine", "yours"], 2)
    assert (again.ids, again.created) == (["mine", "yours"], 0)
    with pytest.raises(IdTaken) as caught:
        await client.submit(spec("false"), NewJob(id="mine"))
    assert caught.value.job_id == "mine"


async def test_what_does_not_exist_is_named(client: AsyncClient) -> None:
    for call in (client.job("nobody"), client.cancel("nobody"), client.retry("nobody"), client.why("nobody")):
        with pytest.raises(JobNotFound, match="nobody"):
            await call
    with pytest.raises(JobNotFound, match="nobody"):
        await client.result("nobody")
    with pytest.raises(JobNotFound, match="nobody"):
        await client.events("nobody")
    with pytest.raises(JobNotFound, match="nobody"):
        await client.logs("nobody", wait=5.0)
    with pytest.raises(BatchNotFound):
        await client.batch("map_nothing")
    with pytest.raises(BlobNotFound):
        await client.get_blob(MISSING)
    with pytest.raises(BlobNotFound):
        await client.submit(spec(), NewJob(arguments_blob=MISSING))
    with pytest.raises(TokenNotFound):
        await client.revoke_token("token_none")
    with pytest.raises(WorkerNotFound):
        await client.drain_worker("session_none")
    assert (await client.wait(["nobody"], wait=5.0)).unknown == ["nobody"]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (spec(timeout=-1.0), "timeout"),
        (spec(name=""), "name"),
        (msgspec.structs.replace(spec(), payload=CommandPayload(argv=())), "payload.argv"),
    ],
)
async def test_a_wrong_value_is_named_and_nothing_is_stored(client: AsyncClient, bad: JobSpec, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await client.submit(bad)
    assert caught.value.field == field
    assert (await client.jobs()).jobs == []


@pytest.mark.parametrize("arguments", [b"nonsense", b"[1", b'["\xff"]'])
async def test_arguments_that_are_no_json_are_refused_and_nothing_is_stored(
    client: AsyncClient, arguments: bytes
) -> None:
    with pytest.raises(InvalidRequest):
        await client.submit_many(SubmitRequest(spec=spec(), jobs=[*jobs(2), NewJob(arguments=msgspec.Raw(arguments))]))
    assert (await client.jobs()).jobs == []


async def test_arguments_come_back_as_they_were_written(client: AsyncClient) -> None:
    for text in (b'[ 1,\t"\\u00e4\xc3\xa4" ]', b"null", b'{"a": "\\"quoted\\""}', b"1e400"):
        job = await client.submit(spec(), NewJob(arguments=msgspec.Raw(text)))
        assert bytes((await client.job(job)).arguments) == text
        special = await client.submit(spec(), NewJob(arguments=msgspec.Raw(text), priority=1))
        assert bytes((await client.job(special)).arguments) == text


async def test_limits_are_kept(client: AsyncClient) -> None:
    reply = await client.submit_many(SubmitRequest(spec=spec(), jobs=jobs(MAX_BATCH_JOBS)))
    assert reply.created == MAX_BATCH_JOBS
    with pytest.raises(LimitExceeded):
        await client.submit_many(SubmitRequest(spec=spec(), jobs=jobs(MAX_BATCH_JOBS + 1)))
    for id_ in ("x" * 256, ""):
        with pytest.raises(InvalidRequest):
            await client.submit(spec(), NewJob(id=id_))
    with pytest.raises(InvalidRequest):
        await client.wait(["x"], wait=-1.0)


async def test_listings_filter_and_go_on(client: AsyncClient) -> None:
    blue = (await client.submit_many(SubmitRequest(spec=spec(tags=("blue",)), jobs=jobs(5)))).ids
    await client.submit_many(SubmitRequest(spec=spec(name="other"), jobs=jobs(3)))
    assert len((await client.jobs(JobFilter(name="other"))).jobs) == 3
    assert (await client.jobs(JobFilter(states=(JobState.COMPLETED,)))).jobs == []
    seen = []
    cursor = None
    while True:
        page = await client.jobs(JobFilter(tag="blue"), limit=2, cursor=cursor)
        seen += [job.id for job in page.jobs]
        cursor = page.cursor
        if cursor is None:
            break
    assert seen == sorted(blue, reverse=True)
    stats = await client.stats()
    assert stats.jobs[JobState.PENDING] == 8


async def test_a_pending_job_is_cancelled_and_tried_again(client: AsyncClient) -> None:
    job = await client.submit(spec())
    assert (await client.cancel(job)).state is JobState.CANCELLED
    assert (await client.result(job, timeout=0)).state is JobState.CANCELLED
    assert (await client.retry(job)).state is JobState.PENDING
    with pytest.raises(InvalidTransition):
        await client.retry(job)
    kinds = [event.type for event in await client.events(job)]
    assert kinds[0] is EventType.SUBMITTED
    assert kinds[-1] is EventType.REOPENED
    why = await client.why(job)
    assert why.state is JobState.PENDING
    assert why.reasons


async def test_a_batch_is_found_again(client: AsyncClient) -> None:
    wanted = OpenBatchRequest(name="map", identity="a" * 64, total=5)
    batch = await client.open_batch(wanted)
    assert (batch.created, batch.submitted) == (True, 0)
    await client.submit_many(SubmitRequest(spec=spec(), jobs=jobs(3), batch=batch.id, first_index=0))
    found = await client.open_batch(wanted)
    assert (found.id, found.created, found.submitted) == (batch.id, False, 3)
    await client.submit_many(SubmitRequest(spec=spec(), jobs=jobs(2), batch=batch.id, first_index=3))
    assert (await client.batch(batch.id)).submitted == 5
    assert await client.cancel_batch(batch.id) == 5
    results = await client.batch_results(batch.id)
    assert results.done
    assert sorted(result.index for result in results.results if result.index is not None) == list(range(5))
    fresh = await client.open_batch(msgspec.structs.replace(wanted, fresh=True))
    assert (fresh.created, fresh.generation) == (True, batch.generation + 1)


async def test_blobs_come_back_as_they_went(client: AsyncClient, tmp_path: Path) -> None:
    content = bytes(range(256)) * 8192
    digest = await client.put_blob(content)
    assert digest == hashlib.sha256(content).hexdigest()
    path = tmp_path / "large"
    path.write_bytes(content)
    assert await client.put_blob(path) == digest
    assert await client.get_blob(digest) == content
    assert b"".join([piece async for piece in client.stream_blob(digest)]) == content
    assert await client.get_blob(await client.put_blob(b"")) == b""


async def test_tokens_are_shown_once_and_revoked(client: AsyncClient) -> None:
    made = await client.create_token(CreateTokenRequest(name="ci", scopes=(Scope.SUBMIT,), expires_in=3600.0))
    assert made.secret
    (listed,) = [token for token in await client.tokens() if token.id == made.token.id]
    assert listed.expires_at is not None
    assert (await client.revoke_token(made.token.id)).revoked_at is not None


async def test_health_and_prune(client: AsyncClient) -> None:
    assert (await client.health()).status == "ok"
    assert all(count == 0 for count in (await client.prune()).values())


async def test_jobs_run_and_their_end_is_heard(working_client: AsyncClient) -> None:
    client = working_client
    good = await client.submit(spec("sh", "-c", "echo hello"))
    bad = await client.submit(spec("sh", "-c", "echo no >&2; exit 9"))
    result = await client.result(good, timeout=DEADLINE)
    assert (result.state, result.exit_code) == (JobState.COMPLETED, 0)
    result = await client.result(bad, timeout=DEADLINE)
    assert (result.state, result.exit_code) == (JobState.FAILED, 9)
    page = await client.logs(good, wait=10.0)
    assert [(entry.stream, entry.data) for entry in page.entries] == [("stdout", b"hello\n")]
    assert (await client.logs(good, offset=page.offset)).ended
    detail = await client.job(bad)
    assert [attempt.exit_code for attempt in detail.attempts] == [9]
    (worker,) = await client.workers()
    assert worker.offer.slots == 2
    again = await client.retry(bad)
    assert not again.state.is_terminal, "the worker may have claimed it before the answer was read"


async def test_batch_results_come_as_jobs_end(working_client: AsyncClient) -> None:
    client = working_client
    batch = await client.open_batch(OpenBatchRequest(name="map", identity="b" * 64, total=20))
    await client.submit_many(SubmitRequest(spec=spec("true"), jobs=jobs(20), batch=batch.id, first_index=0))
    seen: list[int | None] = []
    position = 0
    async with asyncio.timeout(DEADLINE):
        while True:
            found = await client.batch_results(batch.id, after=position, limit=7, wait=20.0)
            seen += [result.index for result in found.results]
            position = found.position
            if found.done:
                break
    assert sorted(index for index in seen if index is not None) == list(range(20))


async def test_a_running_job_is_cancelled_and_a_wait_can_end_before(working_client: AsyncClient) -> None:
    client = working_client
    job = await client.submit(spec("sh", "-c", "echo up; exec sleep 1000"))
    page = await client.logs(job, wait=DEADLINE)
    assert page.entries
    with pytest.raises(WaitTimedOut):
        await client.result(job, timeout=0.05)
    await client.cancel(job)
    assert (await client.result(job, timeout=DEADLINE)).state is JobState.CANCELLED

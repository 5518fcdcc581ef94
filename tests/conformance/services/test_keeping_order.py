"""Tokens, retention, and the waits that must end when the control plane does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blixard.domain.lease import AttemptRef
from blixard.domain.log import LogRecord
from blixard.domain.retry import RetryPolicy
from blixard.domain.state_machine import JobState
from blixard.errors import InvalidRequest, JobNotFound, TokenNotFound, Unauthenticated
from blixard.protocol.workers import CreateTokenRequest, LogBatch, Scope
from blixard.services.control_plane import ControlPlane, ControlPlaneConfig, build_control_plane
from blixard.storage.blobs import LocalBlobStore
from blixard.storage.logs import LocalLogStore
from blixard.storage.sqlite import SqliteDatabase
from blixard.testing.clock import FakeClock
from tests.conformance.services.worker import NAMESPACE, ScriptedWorker, failed, make_spec, submit

DAY = 24 * 3600.0
DEADLINE = 20.0


async def test_a_token_is_shown_once_and_counts_until_revoked_or_expired(plane: ControlPlane, clock: FakeClock) -> None:
    assert not await plane.tokens.any_exists()
    request = CreateTokenRequest(name="ci", scopes=(Scope.SUBMIT, Scope.READ), expires_in=60)
    reply = await plane.tokens.create(NAMESPACE, request)
    assert await plane.tokens.any_exists()
    identity = await plane.tokens.authenticate(reply.secret)
    assert (identity.namespace, identity.scopes) == (NAMESPACE, frozenset({Scope.SUBMIT, Scope.READ}))
    (listed,) = await plane.tokens.tokens(NAMESPACE)
    assert listed.last_used_at is not None
    assert reply.secret not in repr(listed)
    for wrong in ("", "blx_", reply.secret + "x", reply.secret[:-1], "Bearer"):
        with pytest.raises(Unauthenticated):
            await plane.tokens.authenticate(wrong)
    clock.advance(61)
    with pytest.raises(Unauthenticated, match="expired"):
        await plane.tokens.authenticate(reply.secret)
    forever = await plane.tokens.create(NAMESPACE, CreateTokenRequest(name="x", scopes=(Scope.ADMIN,)))
    for _ in range(2):
        assert (await plane.tokens.revoke(NAMESPACE, forever.token.id)).revoked_at is not None
    with pytest.raises(Unauthenticated):
        await plane.tokens.authenticate(forever.secret)
    assert not await plane.tokens.any_exists()
    with pytest.raises(TokenNotFound):
        await plane.tokens.revoke(NAMESPACE, "token_none")


@pytest.mark.parametrize(
    "request_",
    [
        CreateTokenRequest(name="", scopes=(Scope.READ,)),
        CreateTokenRequest(name="x", scopes=()),
        CreateTokenRequest(name="x", scopes=(Scope.READ,), expires_in=-1),
        CreateTokenRequest(name="x", scopes=(Scope.READ,), expires_in=1e12),
    ],
)
async def test_a_wrong_token_request_is_refused(plane: ControlPlane, request_: CreateTokenRequest) -> None:
    with pytest.raises(InvalidRequest):
        await plane.tokens.create(NAMESPACE, request_)


async def test_secrets_of_tokens_are_nowhere_on_disk(tmp_path: Path) -> None:
    store = SqliteDatabase(tmp_path / "blixard.db")
    plane = build_control_plane(
        store, LocalBlobStore(tmp_path / "b"), LocalLogStore(tmp_path / "l"), ControlPlaneConfig()
    )
    await plane.open()
    reply = await plane.tokens.create(NAMESPACE, CreateTokenRequest(name="x", scopes=(Scope.READ,)))
    await plane.close()
    stored = await asyncio.to_thread(_read_all, tmp_path)
    assert b"token_" in stored
    assert reply.secret.encode() not in stored


def _read_all(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.glob("blixard.db*"))


async def test_retention_removes_ended_jobs_with_all_that_belongs_to_them(
    plane: ControlPlane, worker: ScriptedWorker, clock: FakeClock
) -> None:
    digest = await plane.blobs.put(b"input")
    inputs = [{"path": "data", "digest": digest}]
    (done,) = await submit(plane, inputs=inputs)
    await worker.claim_one()
    ref = AttemptRef(NAMESPACE, done, 1)
    await plane.workers.append_logs(
        NAMESPACE, worker.session, [LogBatch(ref=ref, offset=0, records=[LogRecord(1, "stdout", b"hello")])]
    )
    await worker.finish(ref)
    (broken,) = await submit(plane, spec=make_spec(retry=RetryPolicy()))
    await worker.finish(await worker.claim_one(), failed())
    (waiting,) = await submit(plane)
    clock.advance(7 * DAY - 60)
    assert (await plane.maintenance.prune_now())["jobs"] == 0
    clock.advance(120)
    assert (await plane.maintenance.prune_now())["jobs"] == 1
    with pytest.raises(JobNotFound):
        await plane.queries.job(NAMESPACE, done)
    assert not (await plane.log_store.read(NAMESPACE, done, 1)).entries
    assert (await plane.queries.find_by_id(NAMESPACE, broken)).state is JobState.FAILED
    clock.advance(30 * DAY)
    assert (await plane.maintenance.prune_now())["jobs"] == 1
    assert (await plane.queries.find_by_id(NAMESPACE, waiting)).state is JobState.PENDING
    stats = await plane.queries.stats(NAMESPACE)
    assert stats.jobs == {JobState.PENDING: 1}


async def test_a_blob_that_anything_refers_to_is_never_collected(
    plane: ControlPlane, worker: ScriptedWorker, clock: FakeClock
) -> None:
    used, unused = await plane.blobs.put(b"used"), await plane.blobs.put(b"unused")
    await submit(plane, inputs=[{"path": "data", "digest": used}])
    assert (await plane.maintenance.prune_now())["blobs"] == 0  # both are young
    clock.jump(365 * 10 * DAY)  # far behind the files' own times
    assert (await plane.maintenance.prune_now())["blobs"] == 1
    assert (await plane.blobs.stat(used)).size == 4
    assert unused not in [digest async for digest in plane.blobs.list_digests()]


async def test_unused_specs_classes_and_sessions_go_and_used_ones_stay(
    plane: ControlPlane, worker: ScriptedWorker, clock: FakeClock
) -> None:
    await submit(plane, spec=make_spec("kept", queue="kept"))
    (job_id,) = await submit(plane, spec=make_spec("gone", queue="gone"))
    await plane.commands.cancel_job(NAMESPACE, job_id)
    await plane.workers.close(NAMESPACE, worker.session)
    clock.advance(31 * DAY)
    first = await plane.maintenance.prune_now()
    second = await plane.maintenance.prune_now()  # the class is free once its spec is gone
    total = {name: first[name] + second[name] for name in first}
    assert (total["jobs"], total["specs"], total["classes"], total["sessions"]) == (1, 1, 1, 1)
    assert (await plane.queries.stats(NAMESPACE)).queues == {"kept": {JobState.PENDING: 1}}


async def test_closing_answers_what_is_parked(plane: ControlPlane, worker: ScriptedWorker) -> None:
    (job_id,) = await submit(plane)
    ref = await worker.claim_one()
    parked = asyncio.create_task(worker.sync(want=1, wait=3))
    waiting = asyncio.create_task(plane.queries.wait(NAMESPACE, [job_id], wait=1))
    await asyncio.sleep(0)
    plane.workers.poke_all()
    reply = await asyncio.wait_for(parked, DEADLINE)
    assert not reply.claimed
    await worker.finish(ref)
    await asyncio.wait_for(waiting, DEADLINE)


async def test_the_output_of_an_attempt_can_be_followed_to_its_end(plane: ControlPlane, worker: ScriptedWorker) -> None:
    (job_id,) = await submit(plane)
    following = asyncio.create_task(plane.logs.read(NAMESPACE, job_id, attempt=None, offset=0, wait=30))
    ref = await worker.claim_one()
    record = LogRecord(1, "stdout", b"one\n")
    await plane.workers.append_logs(NAMESPACE, worker.session, [LogBatch(ref=ref, offset=0, records=[record])])
    page = await asyncio.wait_for(following, DEADLINE)
    assert [(e.stream, e.data) for e in page.entries] == [("stdout", b"one\n")]
    rest = asyncio.create_task(plane.logs.read(NAMESPACE, job_id, attempt=1, offset=page.offset, wait=30))
    batch = LogBatch(ref=ref, offset=4, records=[LogRecord(2, "stderr", b"two\n")], ended=True)
    for _ in range(2):  # a repetition adds nothing
        await plane.workers.append_logs(NAMESPACE, worker.session, [batch])
    second = await asyncio.wait_for(rest, DEADLINE)
    assert [e.data for e in second.entries] == [b"two\n"]
    await worker.finish(ref)
    assert (await plane.logs.read(NAMESPACE, job_id, attempt=1, offset=second.offset, wait=30)).ended
    with pytest.raises(InvalidRequest):
        await plane.logs.read(NAMESPACE, job_id, attempt=7, offset=0, wait=0)


async def test_a_silent_job_ends_its_followers(plane: ControlPlane, worker: ScriptedWorker) -> None:
    (job_id,) = await submit(plane)
    await worker.finish(await worker.claim_one())
    page = await asyncio.wait_for(plane.logs.read(NAMESPACE, job_id, attempt=None, offset=0, wait=30), DEADLINE)
    assert (page.entries, page.ended) == ([], True)

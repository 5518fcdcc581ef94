"""The worker against a fake control plane: what it promises about leases, whatever happens to its calls."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest

from blixard.backends.contract import Execution, ExecutionObserver, StopReason, Stream
from blixard.bundling.archive import archive_digest, pack
from blixard.domain.grants import InputFile
from blixard.domain.lease import AttemptRef
from blixard.domain.limits import MAX_INLINE_RESULT_BYTES, MAX_RESULT_BYTES
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import FunctionPayload
from blixard.domain.requirements import Isolation
from blixard.errors import Forbidden, NotSupportedHere
from blixard.testing.clock import FakeClock
from blixard.testing.fake_backend import FakeBackend
from tests.unit.worker.fakes import DEADLINE, BulkFakeBackend, FakeGateway, command_spec, make_worker, running


@pytest.fixture(autouse=True, params=[FakeBackend, BulkFakeBackend], ids=["each awaited", "submitted"])
def kind_of_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this holds for both kinds of backends."""
    monkeypatch.setattr(sys.modules[__name__], "FakeBackend", request.param)


def ref(job: str, attempt: int = 1) -> AttemptRef:
    return AttemptRef("default", job, attempt)


async def test_jobs_are_claimed_run_and_reported(tmp_path: Path) -> None:
    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend()) as rig:
        gateway.submit("a", arguments=b"[1]")
        await gateway.until_ended("a")
        gateway.submit(*[f"j{n}" for n in range(500)])
        await gateway.until_ended(*gateway.jobs)
        assert all(gateway.kind(id_) == "completed" for id_ in gateway.jobs)
        ended = gateway.jobs["a"].ended
        assert ended is not None
        assert ended.outcome.result == msgspec.Raw(b"[1]")
        assert len(rig.backend.executed) == 501


async def test_numbers_rise_by_one_and_holding_is_listed_every_third_of_the_lease(tmp_path: Path) -> None:
    gateway = FakeGateway(lease_seconds=0.6)
    async with running(tmp_path, gateway, FakeBackend(held=True)) as rig:
        gateway.submit("a")
        await gateway.until(lambda: len([r for r in gateway.requests if r.holding == [ref("a")]]) >= 3)
        assert [r.number for r in gateway.requests] == list(range(1, len(gateway.requests) + 1))
        assert all(r.wait <= 0.2 for r in gateway.requests)
        rig.backend.finish("a")
        await gateway.until_ended("a")


async def test_a_lost_answer_is_asked_for_again_with_the_same_number_and_content(tmp_path: Path) -> None:
    gateway = FakeGateway()
    gateway.submit(*[f"j{n}" for n in range(50)])
    gateway.lose_replies = 5
    async with running(tmp_path, gateway, FakeBackend()):
        await gateway.until_ended(*gateway.jobs)
        await gateway.until(lambda: gateway.lost_replies == 5)
    by_number: dict[int, set[bytes]] = {}
    for request in gateway.requests:
        by_number.setdefault(request.number, set()).add(msgspec.json.encode(request))
    assert all(len(contents) == 1 for contents in by_number.values())
    assert gateway.lost_replies == 5
    assert all(job.attempt == 1 for job in gateway.jobs.values())


async def test_a_report_supersedes_the_parked_sync_at_once(tmp_path: Path) -> None:
    gateway = FakeGateway(lease_seconds=300.0)  # a parked call would stay for 100 s
    async with running(tmp_path, gateway, FakeBackend(held=True, slots=2)) as rig:
        gateway.submit("a")
        await gateway.until(lambda: len(gateway.requests) >= 2)
        rig.backend.finish("a")
        await gateway.until_ended("a")
        await gateway.until(lambda: gateway.requests[-1].wait > 0)
        report = next(r for r in gateway.requests if r.finished)
        assert report.wait == 0
        assert report.seen == report.number - 2, "the parked one before it is not answered"


async def test_started_attempts_are_reported_while_they_run(tmp_path: Path) -> None:
    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend(held=True)) as rig:
        gateway.submit("a")
        await gateway.until(lambda: ref("a") in rig.backend.attempts)
        rig.backend.attempts[ref("a")].observer.started(1_234)
        await gateway.until(lambda: gateway.jobs["a"].started_at == 1_234)


async def test_finished_attempts_survive_a_server_that_is_away(tmp_path: Path) -> None:
    gateway = FakeGateway(lease_seconds=60.0)
    async with running(tmp_path, gateway, FakeBackend(held=True)) as rig:
        gateway.submit("a")
        await gateway.until(lambda: ref("a") in rig.backend.attempts)
        gateway.down = True
        gateway.ring()
        rig.backend.finish("a")
        await gateway.until_faults(4)
        gateway.down = False
        await gateway.until_ended("a")
        assert gateway.kind("a") == "completed"
        assert len(gateway.registrations) == 1


async def test_a_lease_that_lapses_by_boot_time_ends_the_jobs_and_opens_a_new_session(tmp_path: Path) -> None:
    gateway = FakeGateway(lease_seconds=1.0)
    clock = FakeClock()
    async with running(tmp_path, gateway, FakeBackend(held=True), clock=clock) as rig:
        gateway.submit("a")
        await gateway.until(lambda: ref("a") in rig.backend.attempts)
        gateway.down = True
        clock.advance(1.01)
        await gateway.until(lambda: (ref("a"), StopReason.KILL) in rig.backend.interrupts)
        gateway.down = False
        await gateway.until(lambda: len(gateway.registrations) == 2)
        assert gateway.kind("a") == "lost"
        assert rig.backend.starts == 1
        gateway.submit("b")
        await gateway.until(lambda: gateway.jobs["b"].session == gateway.registrations[1].session)


async def test_an_expired_session_ends_its_jobs_without_a_report(tmp_path: Path) -> None:
    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend(held=True)) as rig:
        gateway.submit("a")
        await gateway.until(lambda: ref("a") in rig.backend.attempts)
        gateway.jobs["a"].session = "somebody else"
        gateway.expire()
        await gateway.until(lambda: len(gateway.registrations) == 2)
        assert (ref("a"), StopReason.KILL) in rig.backend.interrupts
        assert gateway.jobs["a"].ended is None
        assert gateway.registrations[0].session != gateway.registrations[1].session
        assert gateway.closed == []


async def test_a_lost_attempt_is_killed_and_not_reported(tmp_path: Path) -> None:
    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend(held=True, slots=2)) as rig:
        gateway.submit("a", "b")
        await gateway.until(lambda: len(rig.backend.attempts) == 2)
        gateway.jobs["a"].session = "somebody else"
        gateway.lost = [ref("a")]
        gateway.ring()
        await gateway.until(lambda: (ref("a"), StopReason.KILL) in rig.backend.interrupts)
        rig.backend.finish("b")
        await gateway.until_ended("b")
        assert gateway.jobs["a"].ended is None


async def test_a_cancel_reaches_the_running_job(tmp_path: Path) -> None:
    gateway = FakeGateway(lease_seconds=300.0)
    async with running(tmp_path, gateway, FakeBackend(held=True)):
        gateway.submit("a")
        await gateway.until(lambda: gateway.jobs["a"].session)
        gateway.cancel("a")
        await gateway.until_ended("a")
        assert gateway.kind("a") == "cancelled"


async def test_a_cancel_reaches_a_job_that_waits_for_its_blobs(tmp_path: Path) -> None:
    gateway = FakeGateway(lease_seconds=300.0)

    async def never(digest: str, directory: Path) -> Path:
        await asyncio.Event().wait()
        return directory / digest

    gateway.fetch_blob = never  # type: ignore[method-assign]  # a store that hangs
    async with running(tmp_path, gateway, FakeBackend()):
        gateway.submit("a", arguments_blob="0" * 64)
        await gateway.until(lambda: gateway.jobs["a"].session)
        gateway.cancel("a")
        await gateway.until_ended("a")
        assert gateway.kind("a") == "cancelled"


async def test_a_cancel_that_takes_its_time_does_not_make_both_sides_spin(tmp_path: Path) -> None:
    gateway = FakeGateway(lease_seconds=300.0)
    async with running(tmp_path, gateway, FakeBackend(held=True)) as rig:
        gateway.submit("a")
        await gateway.until(lambda: rig.backend.attempts)
        rig.backend.interrupt = lambda *_: None  # type: ignore[method-assign]  # a job that ignores SIGTERM
        gateway.cancel("a")
        before = len(gateway.requests)
        await asyncio.sleep(0.5)  # sleep: a window to count in: without pacing there are hundreds
        assert len(gateway.requests) - before < 20
        rig.backend.finish("a")
        await gateway.until_ended("a")


async def test_drain_finishes_what_runs_and_releases_the_rest(tmp_path: Path) -> None:
    gateway = FakeGateway()
    gateway.submit("a", "b")
    async with running(tmp_path, gateway, FakeBackend(held=True)) as rig:
        rig.backend.slots = 1
        await gateway.until(lambda: rig.backend.attempts)
        gateway.drain = True
        gateway.ring()
        rig.backend.finish("a")
        await gateway.until_ended("a")
        assert gateway.kind("a") == "completed"
        await gateway.until(lambda: gateway.requests[-1].wait > 0)
        assert gateway.requests[-1].want == 0
        assert gateway.jobs["b"].ended is None
        assert not rig.run.done()


async def test_stop_releases_what_waits_and_finishes_what_runs(tmp_path: Path) -> None:
    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend(held=True, slots=3)) as rig:
        gateway.submit("a", "b", "c")
        await gateway.until(lambda: len(rig.backend.attempts) == 3)
        waiting = rig.backend.attempts[ref("c")]
        waiting.is_running = False  # as if only two ran
        rig.worker.stop()
        await gateway.until_ended("c")
        assert gateway.kind("c") == "released"
        assert not rig.run.done()
        rig.backend.finish("a")
        rig.backend.finish("b")
        await rig.finish()
        assert gateway.kind("a") == gateway.kind("b") == "completed"
        assert gateway.closed == [gateway.registrations[0].session]
        assert rig.backend.stops == 1


async def test_stop_kills_what_outlives_the_grace_time(tmp_path: Path) -> None:
    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend(held=True), grace=0.05) as rig:
        gateway.submit("a")
        await gateway.until(lambda: rig.backend.attempts)
        rig.worker.stop()
        await rig.finish()
        assert gateway.kind("a") == "released", "a stop costs the job nothing"


async def test_kill_ends_everything_at_once(tmp_path: Path) -> None:
    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend(held=True), grace=3600.0) as rig:
        gateway.submit("a")
        await gateway.until(lambda: rig.backend.attempts)
        rig.worker.stop()
        rig.worker.stop()
        rig.worker.kill()
        rig.worker.kill()
        await rig.finish()
        assert gateway.kind("a") == "released", "a stop costs the job nothing"


async def test_a_killed_worker_leaves_even_when_the_server_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blixard.worker.session.GOODBYE_SECONDS", 0.2)
    gateway = FakeGateway(lease_seconds=300.0)
    async with running(tmp_path, gateway, FakeBackend(held=True)) as rig:
        gateway.submit("a")
        await gateway.until(lambda: rig.backend.attempts)
        gateway.down = True
        rig.worker.kill()
        await rig.finish()
        assert gateway.faults
        assert gateway.jobs["a"].ended is None


@pytest.mark.parametrize("moment", ["before", "during"])
async def test_stop_before_and_during_start(tmp_path: Path, moment: str) -> None:
    gateway = FakeGateway()
    gateway.down = True
    worker = make_worker(tmp_path, gateway, FakeBackend())
    if moment == "before":
        worker.stop()
    run = asyncio.create_task(worker.run())
    await asyncio.sleep(0)
    worker.stop()
    async with asyncio.timeout(DEADLINE):
        await run
    assert gateway.registrations == []


async def test_registration_is_repeated_until_the_server_is_there(tmp_path: Path) -> None:
    gateway = FakeGateway()
    gateway.down = True
    worker = make_worker(tmp_path, gateway, FakeBackend())
    run = asyncio.create_task(worker.run())
    await gateway.until_faults(3)
    async with asyncio.timeout(DEADLINE):
        gateway.down = False
        await worker.ready.wait()
        worker.stop()
        await run
    assert len(gateway.registrations) == 1
    assert gateway.registrations[0].session == gateway.closed[0]


async def test_a_worker_that_the_server_refuses_says_so(tmp_path: Path) -> None:
    gateway = FakeGateway()

    async def refuse(request: object) -> object:
        raise Forbidden("this token is no worker's")

    gateway.sync = refuse  # type: ignore[method-assign,assignment]  # a server that changed its mind
    worker = make_worker(tmp_path, gateway, FakeBackend())
    with pytest.raises(Forbidden, match="no worker's"):
        async with asyncio.timeout(DEADLINE):
            await worker.run()


async def test_a_host_that_can_run_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotSupportedHere, match="this fake was told not to"):
        make_worker(tmp_path, FakeGateway(), FakeBackend(isolations=frozenset()))


async def test_only_isolations_that_the_host_gives_are_offered(tmp_path: Path) -> None:
    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend(isolations=frozenset({Isolation.MINIMAL}))):
        (isolations,) = gateway.registrations[0].offer.capabilities.values()
        assert isolations == (Isolation.MINIMAL,)


async def test_results_over_the_inline_limit_become_blobs(tmp_path: Path) -> None:
    sizes = {"at": MAX_INLINE_RESULT_BYTES, "over": MAX_INLINE_RESULT_BYTES + 1, "far": MAX_RESULT_BYTES + 1}

    def script(execution: Execution, observer: ExecutionObserver) -> Outcome:
        text = b'"' + b"x" * (sizes[execution.ref.job_id] - 2) + b'"'
        return Outcome(kind=OutcomeKind.COMPLETED, result=msgspec.Raw(text))

    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend(script=script)):
        gateway.submit(*sizes)
        await gateway.until_ended(*sizes)
        at, over, far = (gateway.jobs[id_].ended for id_ in sizes)
        assert at
        assert over
        assert far
        assert at.outcome.result is not None
        assert over.outcome.result is None
        assert len(gateway.blobs[over.outcome.result_blob or ""]) == MAX_INLINE_RESULT_BYTES + 1
        assert far.outcome.kind is OutcomeKind.FAILED
        assert far.outcome.error is not None
        assert far.outcome.error.type == "ResultTooLarge"


async def test_a_bundle_is_fetched_and_unpacked_once_and_shared(tmp_path: Path) -> None:
    gateway = FakeGateway()
    bundle = pack({"code.py": b"def f(): ...\n"})
    digest = archive_digest(bundle)
    gateway.blobs[digest] = bundle
    large = gateway.add_blob(b"[1, 2, 3]")
    spec = command_spec(FunctionPayload(function="code:f", bundle=digest))
    seen: list[Path] = []

    def script(execution: Execution, observer: ExecutionObserver) -> Outcome:
        path = execution.blobs[digest]
        assert (path / "code.py").read_text() == "def f(): ...\n"
        assert all(execution.blobs[i.digest].read_bytes() == b"[1, 2, 3]" for i in execution.inputs)
        seen.append(path)
        return Outcome(kind=OutcomeKind.COMPLETED, result=msgspec.Raw(execution.arguments))

    async with running(tmp_path, gateway, FakeBackend(script=script)):
        gateway.submit(*[f"j{n}" for n in range(50)], spec=spec)
        gateway.submit("large", spec=spec, arguments_blob=large, inputs=(InputFile(path="in.json", digest=large),))
        await gateway.until_ended(*gateway.jobs)
        assert all(gateway.kind(id_) == "completed" for id_ in gateway.jobs)
        ended = gateway.jobs["large"].ended
        assert ended is not None
        assert ended.outcome.result == msgspec.Raw(b"[1, 2, 3]")
    assert len(set(seen)) == 1
    assert sorted(gateway.fetches) == sorted([digest, large])


async def test_a_missing_blob_fails_the_job_and_says_which(tmp_path: Path) -> None:
    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend()):
        gateway.submit("a", arguments_blob="7" * 64)
        await gateway.until_ended("a")
        ended = gateway.jobs["a"].ended
        assert ended is not None
        assert ended.outcome.error is not None
        assert (ended.outcome.kind, ended.outcome.error.type) == (OutcomeKind.FAILED, "BlobNotFound")
        assert "7" * 64 in ended.outcome.error.message
        assert not ended.outcome.error.retryable


async def test_a_backend_that_breaks_costs_one_job_only(tmp_path: Path) -> None:
    def script(execution: Execution, observer: ExecutionObserver) -> Outcome:
        if execution.ref.job_id == "bad":
            raise RuntimeError("our bug")
        return Outcome(kind=OutcomeKind.COMPLETED)

    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend(script=script)):
        gateway.submit("bad", "good")
        await gateway.until_ended("bad", "good")
        assert (gateway.kind("bad"), gateway.kind("good")) == ("lost", "completed")


async def test_output_is_stored_before_the_end_is_reported(tmp_path: Path) -> None:
    def script(execution: Execution, observer: ExecutionObserver) -> Outcome:
        observer.output(1, Stream.STDOUT, b"one\n")
        observer.output(2, Stream.STDERR, b"two\n")
        return Outcome(kind=OutcomeKind.COMPLETED, output_bytes=8)

    gateway = FakeGateway()
    gateway.lose_log_replies = 3
    async with running(tmp_path, gateway, FakeBackend(script=script)):
        gateway.submit("a", "b")
        await gateway.until_ended("a", "b")
    for id_ in ("a", "b"):
        records = [r for batch in gateway.logs[ref(id_)] for r in batch.records]
        assert [(r.stream, r.data) for r in records] == [("stdout", b"one\n"), ("stderr", b"two\n")]
        assert gateway.logs[ref(id_)][-1].ended
        assert gateway.history.index(f"log {id_}") < gateway.history.index(f"finish {id_}")
    assert gateway.faults == 3


async def test_sized_jobs_do_not_run_together_beyond_the_workers_size(tmp_path: Path) -> None:
    gateway = FakeGateway()
    async with running(tmp_path, gateway, FakeBackend(held=True, slots=4), cpus=2.0) as rig:
        gateway.submit("a", "b", spec=command_spec(cpus=1.5))
        gateway.submit("c")
        await gateway.until(lambda: {r.job_id for r in rig.backend.attempts} == {"a", "c"})
        rig.backend.finish("a")
        await gateway.until(lambda: ref("b") in rig.backend.attempts)
        rig.backend.finish("b")
        await gateway.until_ended("a", "b")

from __future__ import annotations

import msgspec
import pytest

from blixard.domain.outcome import AttemptError, OutcomeKind
from blixard.domain.state_machine import JobState
from blixard.errors import BlixardError, JobCancelled, JobError, JobFailed, JobTimedOut, WorkerLost
from blixard.protocol.jobs import JobResult
from blixard.sdk.ends import error_of, fetch_result
from tests.unit.cli.fake_client import FakeClient, FakeStore

TRACE = "Traceback (most recent call last):\n  File ...\nValueError: no\n"
NO = AttemptError(type="ValueError", message="no", traceback=TRACE, hint="say yes")


def ended(
    state: JobState, outcome: OutcomeKind, exit_code: int | None = None, error: AttemptError | None = None
) -> JobResult:
    return JobResult(id="job_1", state=state, outcome=outcome, exit_code=exit_code, error=error)


@pytest.mark.parametrize(
    ("outcome", "kind", "words"),
    [
        (OutcomeKind.FAILED, JobFailed, "job job_1 failed: ValueError: no"),
        (OutcomeKind.TIMED_OUT, JobTimedOut, "job job_1 ran longer than its timeout: ValueError: no"),
        (OutcomeKind.LOST, WorkerLost, "job job_1 lost its worker too often: ValueError: no"),
    ],
)
def test_every_way_to_fail_has_its_error(outcome: OutcomeKind, kind: type[BlixardError], words: str) -> None:
    error = error_of(ended(JobState.FAILED, outcome, 3, NO))
    assert type(error) is kind
    assert (error.message, error.hint) == (words, "say yes")
    if isinstance(error, JobError):
        assert (error.job_id, error.exit_code, error.traceback) == ("job_1", 3, TRACE)
        assert str(error) == f"{words}\n\n{TRACE}"


def test_no_outcome_is_forgotten_here() -> None:
    tried = {OutcomeKind.FAILED, OutcomeKind.TIMED_OUT, OutcomeKind.LOST, OutcomeKind.CANCELLED, OutcomeKind.COMPLETED}
    assert set(OutcomeKind) - tried <= {OutcomeKind.RELEASED}


def test_a_cancelled_job_is_cancelled_whatever_became_of_its_attempt() -> None:
    for outcome in (OutcomeKind.CANCELLED, OutcomeKind.FAILED):
        error = error_of(ended(JobState.CANCELLED, outcome))
        assert type(error) is JobCancelled
        assert error.job_id == "job_1"


@pytest.mark.parametrize(
    ("code", "words"), [(3, "failed: exit code 3"), (137, "failed: killed by SIGKILL"), (255, "failed: exit code 255")]
)
def test_without_an_error_the_exit_code_tells(code: int, words: str) -> None:
    error = error_of(ended(JobState.FAILED, OutcomeKind.FAILED, code))
    assert isinstance(error, JobFailed)
    assert error.message.endswith(words)
    assert error.exit_code == code


async def test_a_result_is_fetched_wherever_it_lies() -> None:
    store = FakeStore()
    client = FakeClient(store)
    digest = await client.put_blob(b"[1,2]")
    plain = msgspec.structs.replace(ended(JobState.COMPLETED, OutcomeKind.COMPLETED, 0), result=msgspec.Raw(b"3"))
    assert error_of(plain) is None
    assert await fetch_result(client, plain) == b"3"
    assert await fetch_result(client, msgspec.structs.replace(plain, result=None, result_blob=digest)) == b"[1,2]"
    assert await fetch_result(client, msgspec.structs.replace(plain, result=None)) is None
    with pytest.raises(JobFailed):
        await fetch_result(client, ended(JobState.FAILED, OutcomeKind.FAILED))

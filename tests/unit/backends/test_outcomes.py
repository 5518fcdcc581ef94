from __future__ import annotations

import msgspec
import pytest

from blixard.backends.executor.calls import describe, format_traceback
from blixard.backends.executor.messages import Answer
from blixard.backends.outcomes import outcome_of_answer, outcome_of_exit
from blixard.domain.limits import MAX_ERROR_BYTES, MAX_RESULT_BYTES
from blixard.domain.outcome import OutcomeKind


def answer(**fields: object) -> Answer:
    known: dict[str, object] = {
        "number": 1,
        "started_at": 5,
        "finished_at": 6,
        "duration": 0.0,
        "exit_code": 0,
        "result": b"null",
    }
    return msgspec.convert(list({**known, **fields}.values()), Answer)


@pytest.mark.parametrize(
    "result", [b"{", b"", b"nul", b"1 2", b'"\xff"', b"[" * 100_000, b'"' + b"x" * MAX_RESULT_BYTES + b'"']
)
def test_a_result_that_is_no_json_is_a_failure(result: bytes) -> None:
    outcome = outcome_of_answer(answer(result=result))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error is not None
    assert outcome.error.type == "ChannelMisused"


def test_a_result_of_the_largest_size_is_kept() -> None:
    result = b'"' + b"x" * (MAX_RESULT_BYTES - 2) + b'"'
    assert bytes(outcome_of_answer(answer(result=result)).result or b"") == result


@pytest.mark.parametrize(("started", "finished"), [(-1, 5), (6, 5), (5, 2**63)])
def test_impossible_times_are_replaced(started: int, finished: int) -> None:
    outcome = outcome_of_answer(answer(started_at=started, finished_at=finished))
    assert outcome.started_at == outcome.finished_at
    assert 10**15 < (outcome.started_at or 0) < 2**62


@pytest.mark.parametrize(("code", "exit_code", "kind"), [(0, 0, None), (3, 3, "ExitCode"), (-9, 137, "KilledBySignal")])
def test_ends_of_processes_are_told(code: int, exit_code: int, kind: str | None) -> None:
    outcome = outcome_of_exit(code, 1)
    assert outcome.exit_code == exit_code
    assert (outcome.error.type if outcome.error else None) == kind


def test_a_function_owes_an_answer() -> None:
    outcome = outcome_of_exit(0, 1, is_function=True)
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error is not None
    assert outcome.error.type == "ProcessExited"


def test_the_middle_of_a_long_error_is_left_out() -> None:
    ending = describe(ValueError("a" * 10**6 + "end"), None)
    assert ending.error is not None
    assert ending.error.message.endswith("end")
    assert "left out" in ending.error.message
    total = len(ending.error.message.encode()) + len((ending.error.traceback or "").encode())
    assert total <= MAX_ERROR_BYTES


class Worse(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def test_an_exception_that_cannot_be_printed_is_told_all_the_same() -> None:
    ending = describe(Worse(), None)
    assert ending.error is not None
    assert ending.error.type == "Worse"
    assert "RuntimeError" in ending.error.message
    assert "Worse" in format_traceback(Worse())


def test_a_limit_is_told_by_its_name() -> None:
    ending = describe(MemoryError(), 64)
    assert ending.error is not None
    assert (ending.error.type, "64 MB" in ending.error.message) == ("MemoryLimit", True)

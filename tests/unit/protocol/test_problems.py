"""Every error of the tree goes through HTTP and comes back as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import msgspec
import pytest

from blixard import errors
from blixard.errors import BlixardError, InternalError, InvalidRequest
from blixard.protocol.problems import TABLE, error_of, problem_of, status_of
from blixard.protocol.workers import Problem

# Any: what each constructor takes by that name.
ARGUMENTS: dict[str, Any] = {
    "message": "what happened",
    "hint": "what to do",
    "field": "spec.name",
    "job_id": "job_1",
    "exit_code": 3,
    "traceback": "Traceback …",
    "state": "completed",
    "wanted": "pending",
    "worker": "worker_1",
    "batch_id": "map_1",
    "digest": "0" * 64,
    "image": "data-science",
    "reason": "it is damaged",
    "vm": "vm_1",
    "token_id": "token_1",
}


def classes(base: type[BlixardError] = BlixardError) -> Iterator[type[BlixardError]]:
    if base.__module__ == errors.__name__:
        yield base
    for child in base.__subclasses__():
        yield from classes(child)


def example(kind: type[BlixardError]) -> BlixardError:
    names = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    return kind(**{name: ARGUMENTS[name] for name in names})


ALL = list(classes())


def test_the_table_has_one_row_for_every_class() -> None:
    assert len(ALL) > 25
    assert [row.error for row in TABLE] == sorted(set(ALL), key=[row.error for row in TABLE].index)
    assert len({row.error.code for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize("kind", ALL)
def test_an_error_comes_back_as_the_same_class_with_its_fields(kind: type[BlixardError]) -> None:
    sent = example(kind)

    travelled = msgspec.json.decode(msgspec.json.encode(problem_of(sent, request_id="r1")), type=Problem)
    back = error_of(travelled)

    assert type(back) is kind
    if not isinstance(sent, InternalError):
        assert vars(back) == vars(sent)
        assert str(back) == str(sent)


@pytest.mark.parametrize("kind", ALL)
def test_a_problem_names_its_status_code_and_request(kind: type[BlixardError]) -> None:
    problem = problem_of(example(kind), request_id="r1")

    assert problem.status == status_of(example(kind))
    assert problem.title == HTTPStatus(problem.status).phrase
    assert problem.type.endswith(problem.code)
    assert problem.request_id == "r1"


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("secret"), InternalError("secret"), errors.ConstraintFailed("secret")]
)
def test_a_bug_keeps_its_words_to_itself(error: Exception) -> None:
    problem = problem_of(error, request_id="r1")

    assert problem.status == 500
    assert "secret" not in repr(problem)
    hint = error_of(problem).hint
    assert hint is not None
    assert "r1" in hint


def test_a_class_added_to_the_tree_is_answered_as_its_parent() -> None:
    class Newer(InvalidRequest):
        code = "newer"

    problem = problem_of(Newer("what", field="f"))

    assert (problem.status, problem.code, problem.field) == (400, "invalid_request", "f")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, errors.Unauthenticated),
        (404, errors.NotFound),
        (418, errors.CallerError),
        (503, errors.Unavailable),
        (599, errors.InternalError),
    ],
)
def test_an_unknown_code_becomes_the_nearest_class_by_status(status: int, kind: type[BlixardError]) -> None:
    problem = Problem(type="about:blank", title="?", status=status, detail="words", code="of_the_future")

    back = error_of(problem)

    assert type(back) is kind
    assert back.message == "words"


def test_optional_fields_that_are_missing_come_back_as_none() -> None:
    sent = errors.JobFailed("it failed", job_id="job_1")

    back = error_of(problem_of(sent))

    assert isinstance(back, errors.JobFailed)
    assert (back.job_id, back.exit_code, back.traceback) == ("job_1", None, None)

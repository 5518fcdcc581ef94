"""Bad input gets one clear problem: the right status, a stable code, the field that is wrong, and the request's id."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from blixard.domain.limits import MAX_REQUEST_BYTES
from blixard.protocol.routes import PROBLEM_JSON, REQUEST_ID_HEADER
from blixard.protocol.workers import Problem
from tests.unit.api.harness import SPEC, Api

# Any: bodies of any wrong form.
Json = dict[str, Any]
JSON = {"content-type": "application/json"}


def problem_in(response: httpx.Response) -> Problem:
    """Return the problem of an error answer after checking what every problem must have."""
    assert response.headers["content-type"] == PROBLEM_JSON
    problem = msgspec.json.decode(response.content, type=Problem)
    assert problem.status == response.status_code
    assert problem.request_id == response.headers[REQUEST_ID_HEADER]
    assert problem.detail
    assert "Traceback" not in response.text
    return problem


def submission(**spec: object) -> Json:
    return {"spec": {**SPEC, **spec}, "jobs": [{}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"hello", "not JSON"),
        (b'{"spec": {"name": "x", "payload": {"kind": "command", "argv": ["true"]}}, "jobs": [{}]} more', "not JSON"),
        (b'{"spec": "\xff"}', "not JSON"),
        (b'{"spec": {"name": {' + b'"a": {' * 100_000, "Expected `str`"),
        (b'{"jobs": [{"arguments": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]}", "nested too deeply"),
    ],
)
async def test_a_body_that_is_not_json_says_so(api: Api, content: bytes, words: str) -> None:
    problem = problem_in(await api.client.post("/jobs", content=content, headers=JSON))

    assert (problem.status, problem.code) == (400, "invalid_request")
    assert words in problem.detail


@pytest.mark.parametrize("media", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_a_wrong_content_type_is_refused(api: Api, media: str | None) -> None:
    headers = {} if media is None else {"content-type": media}
    problem = problem_in(await api.client.post("/jobs", content=b"{}", headers=headers))

    assert (problem.status, problem.code) == (415, "invalid_request")
    assert problem.hint == "send Content-Type: application/json"


async def test_json_with_a_charset_is_json(api: Api) -> None:
    content = msgspec.json.encode(submission())
    headers = {"content-type": "Application/JSON; charset=utf-8"}

    assert (await api.client.post("/jobs", content=content, headers=headers)).status_code == 201


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({**submission(), "extra": 1}, "extra"),
        ({"spec": {**SPEC, "tmeout": 3}, "jobs": [{}]}, "spec.tmeout"),
        ({"spec": SPEC, "jobs": [{"prio": 3}]}, "jobs[0].prio"),
        ({"spec": SPEC}, "jobs"),
        ({"spec": {"name": "x"}, "jobs": [{}]}, "spec.payload"),
        (submission(timeout="soon"), "spec.timeout"),
        (submission(payload={"kind": "magic"}), "spec.payload.kind"),
        (submission(requirements={"isolation": "none"}), "spec.requirements.isolation"),
        (submission(timeout=-1), "timeout"),
        (submission(timeout=0), "timeout"),
        (submission(name=""), "name"),
        (submission(name="x" * 256), "name"),
        (submission(name="a\nb"), "name"),
        (submission(retry={"retries": -1}), "retry.retries"),
        (submission(payload={"kind": "command", "argv": []}), "payload.argv"),
        ({"spec": SPEC, "jobs": [{"id": ""}]}, "id"),
        ({"spec": SPEC, "jobs": [{"id": "x" * 256}]}, "id"),
        ({"spec": SPEC, "jobs": [{"id": "a/b"}]}, "id"),
        ({"spec": SPEC, "jobs": [{"run_at": 10**30}]}, None),
    ],
)
async def test_a_wrong_field_is_named(api: Api, body: Json, field: str | None) -> None:
    problem = problem_in(await api.client.post("/jobs", json=body))

    assert problem.status in {400, 413}
    assert problem.code in {"invalid_request", "limit_exceeded"}
    if field is not None:
        assert problem.field is not None
        assert problem.field.endswith(field)


async def test_ids_of_1_and_255_characters_are_fine(api: Api) -> None:
    body = {"spec": SPEC, "jobs": [{"id": "x"}, {"id": "y" * 255}]}

    assert (await api.client.post("/jobs", json=body)).status_code == 201
    assert (await api.client.get(f"/jobs/{'y' * 255}")).status_code == 200


async def test_an_id_of_256_characters_is_refused_in_a_path(api: Api) -> None:
    problem = problem_in(await api.client.get(f"/jobs/{'x' * 256}"))

    assert (problem.status, problem.field) == (400, "job_id")
    assert "256 characters" in problem.detail


async def test_a_batch_of_1000_jobs_is_taken_and_one_of_1001_refused(api: Api) -> None:
    assert (await api.client.post("/jobs", json={"spec": SPEC, "jobs": [{}] * 1000})).status_code == 201

    problem = problem_in(await api.client.post("/jobs", json={"spec": SPEC, "jobs": [{}] * 1001}))

    assert (problem.status, problem.code) == (413, "limit_exceeded")


async def test_arguments_over_a_mebibyte_are_refused(api: Api) -> None:
    body = {"spec": SPEC, "jobs": [{"arguments": "x" * (1024 * 1024)}]}

    problem = problem_in(await api.client.post("/jobs", json=body))

    assert (problem.status, problem.code) == (413, "limit_exceeded")


def padded(size: int) -> bytes:
    body = msgspec.json.encode(submission())
    return body + b" " * (size - len(body))


async def in_pieces(content: bytes, size: int = 1 << 20) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def test_a_body_of_exactly_16_mib_is_read(api: Api) -> None:
    content = padded(MAX_REQUEST_BYTES)

    assert (await api.client.post("/jobs", content=content, headers=JSON)).status_code == 201
    assert (await api.client.post("/jobs", content=in_pieces(content), headers=JSON)).status_code == 201


async def test_a_body_one_byte_over_16_mib_is_refused(api: Api) -> None:
    content = padded(MAX_REQUEST_BYTES + 1)

    announced = problem_in(await api.client.post("/jobs", content=content, headers=JSON))
    in_chunks = problem_in(await api.client.post("/jobs", content=in_pieces(content), headers=JSON))

    assert announced.status == in_chunks.status == 413
    assert announced.code == in_chunks.code == "limit_exceeded"
    assert str(MAX_REQUEST_BYTES) in in_chunks.detail


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/jobs?limit=0", "limit"),
        ("/jobs?limit=1001", "limit"),
        ("/jobs?limit=many", "limit"),
        ("/jobs?limit=" + "9" * 40, "limit"),
        ("/jobs?state=done", "state[0]"),
        ("/jobs?status=pending", "status"),
        ("/jobs?name=a&name=b", "name"),
        ("/jobs?since=yesterday", "since"),
        ("/jobs?cursor=%20", "cursor"),
        ("/batches/m/results?after=-1", "after"),
        ("/batches/m/results?after=" + "9" * 40, "after"),
    ],
)
async def test_a_wrong_query_parameter_is_named(api: Api, path: str, field: str) -> None:
    problem = problem_in(await api.client.get(path))

    assert problem.status in {400, 413}
    assert problem.field == field


async def test_listings_of_1_and_1000_are_fine(api: Api) -> None:
    assert (await api.client.get("/jobs?limit=1")).status_code == 200
    assert (await api.client.get("/jobs?limit=1000")).status_code == 200


@pytest.mark.parametrize("query", ["wait=-1", "wait=nan", "offset=-1", "attempt=7", "attempt=" + "9" * 40])
async def test_wrong_places_in_logs_are_refused(api: Api, query: str) -> None:
    (job,) = await api.submit()

    assert problem_in(await api.client.get(f"/jobs/{job}/logs?{query}")).status == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("PUT", "/jobs", 405, "invalid_request"),
        ("DELETE", "/jobs/x", 405, "invalid_request"),
        ("GET", "/jobs/nobody", 404, "job_not_found"),
        ("GET", "/batches/nobody", 404, "batch_not_found"),
        ("POST", "/workers/nobody/drain", 404, "worker_not_found"),
        ("GET", f"/blobs/{'0' * 64}", 404, "blob_not_found"),
        ("GET", "/blobs/xyz", 400, "invalid_request"),
        ("DELETE", "/tokens/nobody", 404, "token_not_found"),
    ],
)
async def test_what_is_not_there_is_a_problem(api: Api, method: str, path: str, status: int, code: str) -> None:
    problem = problem_in(await api.client.request(method, path))

    assert (problem.status, problem.code) == (status, code)


async def test_content_that_is_not_what_its_name_says_is_not_stored(api: Api) -> None:
    problem = problem_in(await api.client.put(f"/blobs/{'0' * 64}", content=b"something else"))

    assert (problem.status, problem.field) == (400, "digest")
    assert (await api.client.head(f"/blobs/{'0' * 64}")).status_code == 404


async def test_an_expired_session_is_told_so(api: Api) -> None:
    body = {"session": "nobody", "number": 1}

    assert problem_in(await api.client.post("/workers/nobody/sync", json=body)).code == "session_expired"


async def test_a_sync_for_another_session_than_the_path_is_refused(api: Api) -> None:
    body = {"session": "a", "number": 1}

    assert problem_in(await api.client.post("/workers/b/sync", json=body)).field == "session"


@pytest.mark.parametrize("number", [0, -1, 10**30])
async def test_a_sync_with_an_impossible_number_is_refused(api: Api, number: int) -> None:
    session = await api.register()
    body = {"session": session, "number": number}

    assert problem_in(await api.client.post(f"/workers/{session}/sync", json=body)).status == 400


async def test_a_sane_request_id_is_kept_and_another_replaced(api: Api) -> None:
    kept = await api.client.get("/stats", headers={REQUEST_ID_HEADER: "mine-1"})
    odd = await api.client.get("/stats", headers={REQUEST_ID_HEADER: "x" * 65})

    assert kept.headers[REQUEST_ID_HEADER] == "mine-1"
    assert len(odd.headers[REQUEST_ID_HEADER]) == 16


async def test_a_bug_shows_nothing_but_the_request_id(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(namespace: str) -> None:
        raise ZeroDivisionError("secret internals")

    monkeypatch.setattr(api.plane.queries, "stats", fail)

    response = await api.client.get("/stats")

    problem = problem_in(response)
    assert (problem.status, problem.code) == (500, "internal_error")
    assert "secret" not in response.text

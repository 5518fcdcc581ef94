"""Every route's ordinary use."""

from __future__ import annotations

import asyncio
import hashlib
import itertools

import msgspec
import pytest

from blixard.domain.lease import AttemptRef, SyncRequest
from blixard.domain.log import LogRecord
from blixard.protocol import routes
from blixard.protocol.jobs import JobDetail, JobPage
from blixard.protocol.workers import LogBatch
from tests.unit.api.harness import Api


async def test_submitted_jobs_are_found_by_id_and_in_listings(api: Api) -> None:
    body = {
        "spec": {"name": "greet", "payload": {"kind": "command", "argv": ["echo"]}, "tags": ["a"]},
        "jobs": [{"id": "one", "arguments": ["x", {"é": 1.5}]}, {"id": "two"}],
    }
    response = await api.client.post("/jobs", json=body)

    assert response.status_code == 201
    assert response.json() == {"ids": ["one", "two"], "created": 2}
    detail = msgspec.json.decode((await api.client.get("/jobs/one")).content, type=JobDetail)
    assert msgspec.json.decode(detail.arguments) == ["x", {"é": 1.5}]
    page = msgspec.json.decode((await api.client.get("/jobs", params={"tag": "a"})).content, type=JobPage)
    assert [job.id for job in page.jobs] == ["two", "one"]


async def test_a_repeated_submission_is_the_same_job(api: Api) -> None:
    body = {"spec": {"name": "greet", "payload": {"kind": "command", "argv": ["true"]}}, "jobs": [{"id": "one"}]}
    await api.client.post("/jobs", json=body)

    assert (await api.client.post("/jobs", json=body)).json() == {"ids": ["one"], "created": 0}


async def test_a_listing_goes_on_at_its_cursor(api: Api) -> None:
    ids = await api.submit(5)
    seen: list[str] = []
    cursor: str | None = None
    while True:
        params = {"limit": "2", "state": "pending"} | ({"cursor": cursor} if cursor else {})
        page = msgspec.json.decode((await api.client.get("/jobs", params=params)).content, type=JobPage)
        seen += [job.id for job in page.jobs]
        cursor = page.cursor
        if cursor is None:
            break
    assert seen == ids[::-1]


async def test_states_may_be_repeated_in_a_filter(api: Api) -> None:
    first, second = await api.submit(2)
    await api.client.post(f"/jobs/{first}/cancel")

    both = await api.client.get("/jobs", params=[("state", "pending"), ("state", "cancelled")])
    only = await api.client.get("/jobs", params=[("state", "cancelled")])

    assert [job["id"] for job in both.json()["jobs"]] == [second, first]
    assert [job["id"] for job in only.json()["jobs"]] == [first]


async def test_a_cancelled_job_can_be_retried_and_tells_its_story(api: Api) -> None:
    (job,) = await api.submit()

    assert (await api.client.post(f"/jobs/{job}/cancel")).json() == {"id": job, "state": "cancelled"}
    assert (await api.client.post(f"/jobs/{job}/retry")).json()["state"] == "pending"
    events = (await api.client.get(f"/jobs/{job}/events")).json()
    assert [event["type"] for event in events] == ["submitted", "cancelled", "reopened"]
    why = (await api.client.get(f"/jobs/{job}/why")).json()
    assert [reason["code"] for reason in why["reasons"]] == ["no_workers"]


async def test_wait_answers_with_what_has_ended_and_what_is_unknown(api: Api) -> None:
    (job,) = await api.submit()
    await api.client.post(f"/jobs/{job}/cancel")

    reply = (await api.client.post("/jobs/wait", json={"ids": [job, "nobody"], "wait": 0})).json()

    assert [ended["id"] for ended in reply["ended"]] == [job]
    assert reply["unknown"] == ["nobody"]


async def test_a_batch_is_opened_filled_read_and_cancelled(api: Api) -> None:
    opened = await api.client.post("/batches", json={"name": "m", "identity": "a" * 64, "total": 2})
    assert opened.status_code == 200
    batch = opened.json()["id"]
    body = {
        "spec": {"name": "greet", "payload": {"kind": "command", "argv": ["true"]}},
        "jobs": [{}, {}],
        "batch": batch,
        "first_index": 0,
    }
    assert (await api.client.post("/jobs", json=body)).status_code == 201

    assert (await api.client.get(f"/batches/{batch}")).json()["submitted"] == 2
    assert (await api.client.post(f"/batches/{batch}/cancel")).json() == {"id": batch, "cancelled": 2}
    results = (await api.client.get(f"/batches/{batch}/results", params={"after": 0, "limit": 10, "wait": 1})).json()
    assert [result["state"] for result in results["results"]] == ["cancelled", "cancelled"]
    assert results["done"] is True


async def test_a_worker_runs_a_job_by_registering_syncing_and_saying_good_bye(api: Api) -> None:
    (job,) = await api.submit()
    session = await api.register()
    numbers = itertools.count(1)
    claim = {"session": session, "number": next(numbers), "want": 1, "free_cpus": 4, "free_memory_mb": 4096}

    reply = (await api.client.post(f"/workers/{session}/sync", json=claim)).json()

    (claimed,) = reply["claimed"]
    assert claimed["ref"] == ["default", job, 1]
    assert reply["specs"][str(claimed["spec"])]["name"] == "greet"
    ref = AttemptRef("default", job, 1)
    logged = LogBatch(ref=ref, offset=0, records=[LogRecord(1, "stdout", b"hello\n")], ended=True)
    packed = await api.client.post(
        f"/workers/{session}/logs",
        content=msgspec.msgpack.encode([logged]),
        headers={"content-type": routes.MSGPACK},
    )
    assert packed.status_code == 204
    report = {
        "session": session,
        "number": next(numbers),
        "finished": [{"ref": claimed["ref"], "outcome": {"kind": "completed", "exit_code": 0, "result": 42}}],
    }
    reported = await api.client.post(f"/workers/{session}/sync", json=report)
    assert reported.status_code == 200, reported.text
    detail = (await api.client.get(f"/jobs/{job}")).json()
    assert (detail["state"], detail["result"]) == ("completed", 42)
    logs = (await api.client.get(f"/jobs/{job}/logs")).json()
    assert logs["entries"][0]["data"] == "aGVsbG8K"
    assert (await api.client.delete(f"/workers/{session}")).status_code == 204
    assert (await api.client.get("/workers")).json() == []


async def test_a_worker_is_drained(api: Api) -> None:
    session = await api.register()

    assert (await api.client.post(f"/workers/{session}/drain")).json()["state"] == "draining"
    assert [worker["state"] for worker in (await api.client.get("/workers")).json()] == ["draining"]


@pytest.mark.parametrize("size", [0, 1, 3 * 1024 * 1024 + 1])
async def test_a_blob_comes_back_as_it_was(api: Api, size: int) -> None:
    content = bytes(index % 251 for index in range(1000)) * (size // 1000 + 1)
    content = content[:size]
    digest = hashlib.sha256(content).hexdigest()

    assert (await api.client.head(f"/blobs/{digest}")).status_code == 404
    assert (await api.client.put(f"/blobs/{digest}", content=content)).status_code == 201
    head = await api.client.head(f"/blobs/{digest}")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(size), b"")
    assert (await api.client.get(f"/blobs/{digest}")).content == content


async def test_tokens_are_made_listed_and_revoked(api: Api) -> None:
    made = await api.trusted.post("/tokens", json={"name": "ci", "scopes": ["read"], "expires_in": 60})
    assert made.status_code == 201
    token = made.json()["token"]["id"]

    assert [view["id"] for view in (await api.trusted.get("/tokens")).json()] == [token]
    assert (await api.trusted.delete(f"/tokens/{token}")).json()["revoked_at"] is not None


async def test_the_server_tells_of_itself(api: Api) -> None:
    await api.submit(3)

    assert (await api.client.get("/stats")).json()["jobs"] == {"pending": 3}
    assert (await api.client.get("/health/live")).json()["status"] == "ok"
    assert (await api.client.get("/health/ready")).json()["checks"] == {"store": "ok"}
    assert set((await api.client.post("/prune")).json().values()) == {0}


async def test_a_closed_store_is_not_ready(api: Api) -> None:
    await api.plane.database.close()

    response = await api.client.get("/health/ready")

    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["code"] == "store_unavailable"


async def test_metrics_count_what_happened(api: Api) -> None:
    await api.submit()
    await api.client.get("/jobs/nobody")
    session = await api.register()
    claim = {"session": session, "number": 1, "want": 1, "free_cpus": 4, "free_memory_mb": 4096}
    await api.client.post(f"/workers/{session}/sync", json=claim)

    lines = (await api.client.get("/metrics")).text.splitlines()

    assert 'blixard_http_requests_total{route="submit",status="201"} 1.0' in lines
    assert 'blixard_http_requests_total{route="job",status="404"} 1.0' in lines
    assert "blixard_jobs_claimed_total 1.0" in lines
    assert 'blixard_jobs{state="claimed"} 1.0' in lines
    assert 'blixard_workers{state="online"} 1.0' in lines


async def test_the_root_leads_to_the_page_which_needs_nothing_from_elsewhere(api: Api) -> None:
    root = await api.client.get("http://127.0.0.1:3020/")
    assert (root.status_code, root.headers["location"]) == (302, "/api/v1/docs")

    page = await api.client.get("/docs")

    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert "src=" not in page.text
    for route in routes.ROUTES:
        assert f"id='{route.name}'" in page.text


async def test_a_sync_whose_client_hangs_up_in_the_queue_leaves_no_trace(api: Api) -> None:
    session = await api.register()
    await api.client.post(f"/workers/{session}/sync", json={"session": session, "number": 1})
    life = api.plane.workers._lives[session]
    await life.turn.acquire()
    queued = asyncio.create_task(api.plane.workers.sync("default", SyncRequest(session=session, number=2)))
    while not life.waiting:  # noqa: ASYNC110 - a number of the service, which rings no bell
        await asyncio.sleep(0)

    queued.cancel()
    await asyncio.gather(queued, return_exceptions=True)
    life.turn.release()

    assert (life.waiting, life.poke.is_set()) == (0, False)

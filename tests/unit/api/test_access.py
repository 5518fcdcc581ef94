"""Who may do what: every route with every scope, and what keeps browsers out of an open loopback server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blixard.protocol.routes import PREFIX, ROUTES
from blixard.protocol.workers import Scope
from tests.unit.api.harness import OFFER, Api, open_api

DIGEST = "0" * 64


def address_of(path: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: DIGEST if match[1] == "digest" else "nobody", path)


async def test_every_scope_opens_its_own_routes_and_no_others(api: Api) -> None:
    refused = admitted = 0
    for scope in Scope:
        headers = await api.token(scope)
        for route in ROUTES:
            status = (await api.client.request(route.method, address_of(route.path), headers=headers)).status_code
            may = not route.scopes or scope in route.scopes or scope is Scope.ADMIN
            assert (status == 403) is not may, f"{route.name} with {scope}: {status}"
            assert status != 401
            admitted += may
            refused += not may
    assert refused > 40
    assert admitted > 40


async def test_a_worker_s_token_can_only_do_a_worker_s_work(api: Api) -> None:
    open_to_workers = {route.name for route in ROUTES if Scope.WORKER in route.scopes}

    assert open_to_workers == {"register", "sync", "worker_logs", "goodbye", "put_blob", "get_blob", "head_blob"}


async def test_a_worker_s_token_cannot_speak_for_another_one_s_session(api: Api) -> None:
    mine, yours = await api.token("worker"), await api.token("worker")
    body = {"name": "w", "offer": OFFER, "session": "mine"}
    assert (await api.client.post("/workers", json=body, headers=mine)).status_code == 201
    sync = {"session": "mine", "number": 1}
    for headers, status in ((yours, 410), (mine, 200)):
        answer = await api.client.post("/workers/mine/sync", json=sync, headers=headers)
        assert answer.status_code == status, answer.text
    await api.client.delete("/workers/mine", headers=yours)
    again = await api.client.post("/workers/mine/sync", json={**sync, "number": 2}, headers=mine)
    assert again.status_code == 200, "a stranger's good-bye changes nothing"


async def test_loopback_is_open_until_the_first_token_and_closed_for_good_afterwards(api: Api) -> None:
    assert (await api.client.get("/stats")).status_code == 200
    made = await api.trusted.post("/tokens", json={"name": "first", "scopes": ["admin"]})

    refused = await api.client.get("/stats")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert "blixard token create" in refused.json()["hint"]

    await api.trusted.delete(f"/tokens/{made.json()['token']['id']}")
    assert (await api.client.get("/stats")).status_code == 401


async def test_the_socket_needs_no_token_but_a_wrong_one_is_refused_there_too(api: Api) -> None:
    await api.token("admin")

    assert (await api.trusted.get("/tokens")).status_code == 200
    assert (await api.trusted.get("/tokens", headers={"Authorization": "Bearer blx_wrong"})).status_code == 401
    only_read = await api.token("read")
    assert (await api.trusted.get("/tokens", headers=only_read)).status_code == 403


async def test_another_address_than_loopback_is_never_open(tmp_path: Path) -> None:
    async with open_api(tmp_path, host="0.0.0.0") as api:
        assert (await api.client.get("/stats")).status_code == 401
        assert (await api.client.get("/health/live")).status_code == 200


@pytest.mark.parametrize(
    "header", ["", "blx_abc", "Basic abc", "Bearer", "Bearer ", "Bearer blx_" + "a" * 43, "Bearer " + "x" * 10_000]
)
async def test_a_malformed_or_unknown_token_is_refused_even_where_none_is_needed(api: Api, header: str) -> None:
    response = await api.client.get("/stats", headers={"Authorization": header})

    assert response.status_code == 401
    assert response.json()["code"] == "unauthenticated"


async def test_a_revoked_token_is_worthless_at_once(api: Api) -> None:
    made = (await api.trusted.post("/tokens", json={"name": "t", "scopes": ["read"]})).json()
    headers = {"Authorization": f"Bearer {made['secret']}"}
    assert (await api.client.get("/stats", headers=headers)).status_code == 200

    await api.trusted.delete(f"/tokens/{made['token']['id']}")

    assert (await api.client.get("/stats", headers=headers)).status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:3020", "127.0.0.1.evil.example", "", "[::", "10.0.0.1"])
async def test_a_foreign_host_name_is_refused_without_a_token(api: Api, host: str) -> None:
    response = await api.client.get("/stats", headers={"Host": host})

    assert response.status_code == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:3020", "127.0.0.1:3020", "127.1.2.3", "[::1]:3020"])
async def test_the_names_of_this_machine_are_fine(api: Api, host: str) -> None:
    assert (await api.client.get("/stats", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:3020", 200),
        ("http://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1:8000", 403),
        ("http://[", 403),
    ],
)
async def test_only_pages_of_this_server_may_use_it_without_a_token(api: Api, origin: str, status: int) -> None:
    assert (await api.client.get("/stats", headers={"Origin": origin})).status_code == status


async def test_a_token_makes_host_and_origin_irrelevant(api: Api) -> None:
    headers = {**await api.token("read"), "Host": "blixard.example", "Origin": "https://dashboard.example"}

    assert (await api.client.get("/stats", headers=headers)).status_code == 200


async def test_no_route_is_open_by_oversight() -> None:
    assert {route.name for route in ROUTES if not route.scopes} == {"live", "ready"}
    assert PREFIX == "/api/v1"

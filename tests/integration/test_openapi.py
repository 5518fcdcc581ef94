"""The live API against its own OpenAPI document: generated requests, valid and not, get documented answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from blixard.api.application import OPERATIONS
from blixard.api.openapi import build_document
from blixard.protocol.routes import ROUTES
from tests.integration.serve_rig import DEADLINE
from tests.integration.test_api_live import live_api

EXAMPLES = 12
"""Requests of each operation."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
schema = schemathesis.openapi.from_dict(build_document([operation.route for operation in OPERATIONS]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A live API on a thread of its own: the generated tests are not asynchronous."""
    directory: Path = tmp_path_factory.mktemp("openapi")
    started: list[str] = []
    ready, stop = threading.Event(), []

    async def serve() -> None:
        end = asyncio.Event()
        stop.append((asyncio.get_running_loop(), end))
        async with live_api(directory) as live:
            started.append(f"http://127.0.0.1:{live.port}")
            ready.set()
            await end.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="api")
    thread.start()
    assert ready.wait(DEADLINE)
    yield started[0]
    loop, end = stop[0]
    loop.call_soon_threadsafe(end.set)
    thread.join(DEADLINE)
    assert not thread.is_alive()


# Any: the case's store of test data, which is not used here.


@pytest.mark.filterwarnings("ignore:Skipped test cases with unsupported payload media types")  # MessagePack logs
@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
def test_every_answer_is_documented(case: Case[Any], server: str) -> None:
    if isinstance(case.body, dict) and "wait" in case.body:
        case.body["wait"] = 0
    if isinstance(case.query, dict) and "wait" in case.query:
        case.query["wait"] = "0"
    case.call_and_validate(base_url=server, checks=CHECKS, timeout=DEADLINE)


def test_every_operation_is_tried_and_the_server_is_well(server: str) -> None:
    found = [item.ok() for item in schema.get_all_operations() if isinstance(item, Ok)]
    assert {str(operation.definition.raw["operationId"]) for operation in found} == {route.name for route in ROUTES}
    assert httpx.get(f"{server}/api/v1/health/ready").status_code == 200

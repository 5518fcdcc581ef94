"""The document says what the decoders do, and its examples work."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from blixard.api.application import OPERATIONS
from blixard.api.examples import EXAMPLES
from blixard.api.openapi import build_document
from blixard.protocol.routes import PREFIX, ROUTES

# Any: an OpenAPI document is free-form JSON.
Json = dict[str, Any]


@pytest.fixture(scope="module")
def document() -> Json:
    return build_document([operation.route for operation in OPERATIONS])


def test_every_route_is_served_and_described(document: Json) -> None:
    described = {
        (method.upper(), path.removeprefix(PREFIX)) for path, item in document["paths"].items() for method in item
    }

    assert {operation.route.name for operation in OPERATIONS} == {route.name for route in ROUTES}
    assert described == {(route.method, route.path) for route in ROUTES}


def test_every_reference_leads_somewhere(document: Json) -> None:
    text = msgspec.json.encode(document).decode()
    names = set(re.findall(r"#/components/schemas/(\w+)", text))

    assert len(names) > 30
    assert names <= set(document["components"]["schemas"])


def test_every_schema_of_ours_is_explained_in_words(document: Json) -> None:
    schemas = document["components"]["schemas"]

    assert schemas["SubmitRequest"]["description"].startswith("At most 1,000 jobs")
    assert schemas["NewJob"]["additionalProperties"] is False
    assert set(schemas["JobState"]["enum"]) >= {"pending", "completed"}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_example_is_a_body_that_the_server_reads(name: str) -> None:
    route = next(route for route in ROUTES if route.name == name)

    msgspec.json.decode(msgspec.json.encode(EXAMPLES[name]), type=route.request)


def test_every_route_with_a_body_has_an_example() -> None:
    with_body = {route.name for route in ROUTES if route.request not in (type(None), bytes)}

    assert with_body == set(EXAMPLES)


def test_query_parameters_are_described(document: Json) -> None:
    parameters = document["paths"]["/api/v1/jobs"]["get"]["parameters"]

    assert [parameter["name"] for parameter in parameters] == [
        "state", "name", "tag", "queue", "batch", "since", "until", "limit", "cursor",
    ]  # fmt: skip
    assert parameters[0]["schema"]["type"] == "array"

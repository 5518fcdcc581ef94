"""What `--json` prints: whole objects, so that a reader needs to know no defaults."""

from __future__ import annotations

import json

import msgspec
import pytest

from blixard.cli.output import complete, print_json
from blixard.domain.payload import CommandPayload
from blixard.domain.requirements import Isolation, WorkerType
from blixard.domain.spec import JobSpec
from blixard.domain.worker import WorkerOffer


def test_json_has_the_fields_that_are_left_out_on_the_wire(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    offer = WorkerOffer(capabilities={WorkerType.PROCESS: (Isolation.MINIMAL,)})
    assert "slots" not in json.loads(msgspec.json.encode(offer))
    print_json([offer])
    (shown,) = json.loads(capfdbinary.readouterr().out)
    assert shown == {
        "capabilities": {"process": ["minimal"]},
        "queues": [],
        "labels": {},
        "cpus": 1.0,
        "memory_mb": 1024,
        "slots": 1,
        "submitter": None,
    }


def test_complete_objects_can_be_read_back() -> None:
    spec = JobSpec(name="a", payload=CommandPayload(argv=("true",)))
    whole = msgspec.json.encode(complete(spec))
    assert msgspec.json.decode(whole, type=JobSpec) == spec
    assert set(json.loads(whole)) == {field.encode_name for field in msgspec.structs.fields(JobSpec)}
    assert json.loads(whole)["payload"]["argv"] == ["true"]


def test_raw_json_is_left_as_it_is() -> None:
    assert msgspec.json.encode(complete({"result": msgspec.Raw(b'{"a": 1}')})) == b'{"result":{"a": 1}}'

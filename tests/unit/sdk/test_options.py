from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from blixard import App, RetryPolicy
from blixard.client.blocking import Client
from blixard.domain.grants import Grants
from blixard.domain.limits import MAX_PRIORITY
from blixard.domain.payload import Encoding, FunctionPayload, blobs_of
from blixard.domain.requirements import Isolation, JobRequirements, VmMode
from blixard.domain.spec import JobSpec
from blixard.errors import BlobNotFound, InvalidRequest
from blixard.protocol.jobs import SubmitReply, SubmitRequest
from blixard.sdk.options import TAKES, JobOptions, OptionArguments
from tests.unit.cli.fake_client import FakeClient
from tests.unit.sdk import jobs
from tests.unit.sdk.conftest import Store

# Any: what a program without a type checker may pass.
Options = Mapping[str, Any]


def spec_of(options: Options) -> JobSpec:
    return JobOptions().changed(options).spec("shop.f", FunctionPayload(function="m:f"))  # type: ignore[arg-type]  # see Options


EVERY_OPTION: list[tuple[Options, Options]] = [
    ({"name": "nightly"}, {"name": "nightly"}),
    ({"queue": "slow"}, {"queue": "slow"}),
    ({"isolation": "minimal"}, {"requirements": JobRequirements(isolation=Isolation.MINIMAL)}),
    ({"retries": 3}, {"retry": RetryPolicy(retries=3)}),
    ({"retry": RetryPolicy(retries=2, delay=5)}, {"retry": RetryPolicy(retries=2, delay=5)}),
    ({"timeout": 1.5}, {"timeout": 1.5}),
    ({"timeout": 30}, {"timeout": 30.0}),
    ({"timeout": None}, {"timeout": None}),
    ({"env": {"A": "1"}}, {"environment": {"A": "1"}}),
    ({"allow_read": ["/data"]}, {"grants": Grants(read=("/data",))}),
    ({"allow_write": [Path("/out")]}, {"grants": Grants(write=("/out",))}),
    ({"allow_net": True}, {"grants": Grants(network=True)}),
    ({"labels": {"zone": "a"}}, {"requirements": JobRequirements(labels={"zone": "a"})}),
    ({"cpus": 2}, {"requirements": JobRequirements(cpus=2.0)}),
    ({"memory_mb": 512}, {"requirements": JobRequirements(memory_mb=512)}),
    (
        {"image": "data-science", "isolation": "maximum"},
        {"requirements": JobRequirements(image="data-science", isolation=Isolation.MAXIMUM)},
    ),
    ({"vm_mode": "service"}, {"requirements": JobRequirements(vm_mode=VmMode.SERVICE)}),
    ({"tags": ["x", "y"]}, {"tags": ("x", "y")}),
    ({"max_output_bytes": 10}, {"max_output_bytes": 10}),
]
ELSEWHERE = {"encoding", "include", "input", "priority"}
"""What is not part of the spec: see the tests below."""


@pytest.mark.parametrize(("options", "fields"), EVERY_OPTION, ids=lambda case: next(iter(case)))
def test_every_option_lands_in_the_spec(options: Options, fields: Options) -> None:
    spec = spec_of(options)
    plain = spec_of({})
    assert {name: getattr(spec, name) for name in fields} == dict(fields)
    assert [name for name in JobSpec.__struct_fields__ if getattr(spec, name) != getattr(plain, name)] in (
        list(fields),
        [],
    )


def test_no_option_is_forgotten_here() -> None:
    assert {name for options, _ in EVERY_OPTION for name in options} | ELSEWHERE == set(get_type_hints(OptionArguments))
    assert set(get_type_hints(OptionArguments)) == {*JobOptions.__struct_fields__, "retries"}


def test_encoding_priority_and_included_files_reach_the_job(app: App, client: FakeClient) -> None:
    job = app.job(encoding="msgpack", priority=7, include=["tests/unit/sdk/jobs.py"])(jobs.add)
    job.submit(1)
    request = client.requests[-1]
    assert isinstance(request.spec.payload, FunctionPayload)
    assert request.spec.payload.encoding is Encoding.MSGPACK
    assert request.jobs[0].priority == 7
    with pytest.raises(InvalidRequest, match=r"there is no file .*absent\.txt to include"):
        job.options(include=["absent.txt"]).submit(1)


def test_an_unknown_option_lists_those_that_exist() -> None:
    with pytest.raises(InvalidRequest, match="there is no option 'retrys'") as caught:
        spec_of({"retrys": 1})
    assert "retries" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"retries": "3"}, "retries", "no whole number"),
        ({"retries": True}, "retries", "no whole number"),
        ({"retries": -1}, "retries", "0 to"),
        ({"timeout": 0}, "timeout", "above 0"),
        ({"timeout": -3.0}, "timeout", "above 0"),
        ({"timeout": "30s"}, "timeout", "Expected"),
        ({"isolation": "none"}, "isolation", "none"),
        ({"encoding": "yaml"}, "encoding", "yaml"),
        ({"env": {"A": 1}}, "env", "str"),
        ({"env": ["A"]}, "env", "Expected"),
        ({"allow_read": "/data"}, "allow_read", "a list of paths"),
        ({"allow_write": 3}, "allow_write", "a list of paths"),
        ({"allow_read": [3]}, "allow_read", "3"),
        ({"allow_read": ["/"]}, "allow_read", "whole file system"),
        ({"allow_net": "yes"}, "allow_net", "bool"),
        ({"include": "data.csv"}, "include", "a list of paths"),
        ({"tags": "nightly"}, "tags", "Expected"),
        ({"cpus": 0}, "cpus", "above 0"),
        ({"memory_mb": 1.5}, "memory_mb", "int"),
        ({"priority": "high"}, "priority", "int"),
        ({"name": ""}, "name", "characters"),
        ({"queue": ""}, "queue", "characters"),
        ({"retries": 1, "retry": RetryPolicy()}, "retries", "the same thing"),
        ({"retry": RetryPolicy(factor=0)}, "retry", "factor is 0"),
        ({"env": {"A=B": "1"}}, "env", "A=B"),
        ({"tags": ["x"] * 33}, "tags", "33 entries"),
        ({"vm_mode": "service", "isolation": "minimal"}, "vm_mode", "isolation standard"),
        ({"image": "debian"}, "image", "asks for none"),
        ({"allow_write": ["data/../.."], "isolation": 3}, "isolation", "Expected"),
        ({"input": "data.csv"}, "input", "a list of paths"),
        ({"input": [3]}, "input", "3 is no path"),
        ({"input": {3: "data.csv"}}, "input", "3 is no place"),
        ({"input": {"../data.csv": "data.csv"}}, "input", "cannot be the place"),
        ({"input": ["/a/data.csv", "/b/data.csv"]}, "input", "would both be data.csv"),
        ({"input": {f"f{number}": "data.csv" for number in range(257)}}, "input", "MAX_INPUTS"),
    ],
)
def test_a_wrong_value_names_the_option(options: Options, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        JobOptions().changed(options)  # type: ignore[arg-type]  # see Options
    assert caught.value.field == field
    assert caught.value.hint, "it must say what to do"


def test_the_option_that_was_meant_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        spec_of({"timout": 3})
    assert (caught.value.field, (caught.value.hint or "").partition("?")[0]) == ("timout", "did you mean timeout")


def test_every_option_says_what_it_takes() -> None:
    assert set(TAKES) == set(get_type_hints(OptionArguments))


def test_a_wrong_option_is_told_where_it_is_declared(app: App) -> None:
    with pytest.raises(InvalidRequest, match="isolation"):
        app.job(isolation="strong")


def test_a_priority_out_of_range_is_refused_where_it_is_declared() -> None:
    with pytest.raises(InvalidRequest, match=f"{MAX_PRIORITY}"):
        spec_of({"priority": MAX_PRIORITY + 1})


def test_relative_paths_become_absolute_and_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    grants = spec_of({"allow_read": ["data", "./more/../less"], "allow_write": ["~/out"]}).grants
    assert grants == Grants(read=(f"{tmp_path}/data", f"{tmp_path}/less"), write=("/home/somebody/out",))


def test_options_change_one_thing_and_leave_the_declared_ones(app: App, client: FakeClient) -> None:
    declared = app.job(retry=RetryPolicy(delay=9.0), tags=["a"])(jobs.add)
    declared.options(retries=2).submit(1)
    declared.submit(1)
    first, second = (request.spec for request in client.requests)
    assert first.retry == RetryPolicy(delay=9.0, retries=2)
    assert second.retry == RetryPolicy(delay=9.0)
    assert first.tags == second.tags == ("a",)


def test_input_files_travel_with_the_job(app: App, client: FakeClient, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("bread")
    (tmp_path / "b.txt").write_text("milk")
    job = app.job(input={"in/a.txt": tmp_path / "a.txt", "b.txt": tmp_path / "b.txt"})(jobs.add)
    job.submit(1)
    inputs = client.requests[-1].jobs[0].inputs
    assert [item.path for item in inputs] == ["b.txt", "in/a.txt"]
    assert [client.store.blobs[item.digest] for item in inputs] == [b"milk", b"bread"]
    assert list(job.map([1, 2])) == [2, 3]
    assert [found.inputs for found in client.requests[-1].jobs] == [inputs, inputs]


def test_input_files_are_placed_as_the_command_line_places_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    given: list[str | Path] = ["data/a.txt", "./b.txt", "../c.txt", "/far/d.txt", "~/e.txt", Path("f.txt")]
    assert JobOptions().changed({"input": given}).input == {
        "data/a.txt": f"{tmp_path}/data/a.txt",
        "b.txt": f"{tmp_path}/b.txt",
        "c.txt": f"{tmp_path.parent}/c.txt",
        "d.txt": "/far/d.txt",
        "e.txt": "/home/somebody/e.txt",
        "f.txt": f"{tmp_path}/f.txt",
    }


def test_an_input_file_that_is_missing_is_told_before_anything_is_stored(
    app: App, client: FakeClient, tmp_path: Path
) -> None:
    for path, words in ((tmp_path / "none.txt", "not there"), (tmp_path, "a directory")):
        with pytest.raises(InvalidRequest, match=words) as caught:
            app.job(input=[path])(jobs.add).submit(1)
        assert caught.value.field == "input"
    assert client.requests == []


def test_an_input_file_is_sent_again_only_when_it_changes(app: App, client: FakeClient, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("bread")
    job = app.job(input=[file])(jobs.add)
    digests = []
    for text in ("bread", "bread", "milk and honey"):
        file.write_text(text)
        job.submit(1)
        digests.append(client.requests[-1].jobs[0].inputs[0].digest)
    assert digests[0] == digests[1] != digests[2]


def test_other_content_of_an_input_file_is_another_map(app: App, client: FakeClient, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    job = app.job(input=[file])(jobs.add)
    for text in ("bread", "bread", "milk and honey"):
        file.write_text(text)
        assert list(job.map([1], resume=True)) == [2]
    assert len(client.store.batches) == 2


class Forgetful(FakeClient):
    """Refuses jobs whose blobs it does not have."""

    async def submit_many(self, request: SubmitRequest) -> SubmitReply:
        for digest in {item.digest for job in request.jobs for item in job.inputs} | set(
            blobs_of(request.spec.payload)
        ):
            if digest not in self.store.blobs:
                raise BlobNotFound(digest)
        return await super().submit_many(request)


def test_what_was_uploaded_and_is_gone_is_sent_again(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("bread")
    with Client(lambda: Forgetful(store, store.run)) as client:
        job = App("shop", client=client).job(input=[file])(jobs.add)
        job.submit(1)
        sent = set(store.blobs)
        store.blobs.clear()
        job.submit(1)
    assert len(sent) == 2
    assert set(store.blobs) == sent
    assert len(store.jobs) == 2

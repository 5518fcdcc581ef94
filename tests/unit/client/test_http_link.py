"""What a broken connection means: nothing sent, sent and perhaps done, or answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import pytest

from blixard.client import http_link
from blixard.client.http import HttpClient
from blixard.client.http_link import RETRY_PAUSES, ServerAddress
from blixard.domain.job import NewJob
from blixard.domain.payload import CommandPayload
from blixard.domain.spec import JobSpec
from blixard.errors import (
    BlobNotFound,
    ConfigError,
    InternalError,
    InvalidRequest,
    JobNotFound,
    NotFound,
    OutcomeUnknown,
    ServerUnreachable,
    WaitTimedOut,
)
from blixard.protocol.jobs import OpenBatchRequest, SubmitRequest
from blixard.protocol.problems import problem_of
from blixard.protocol.routes import PROTOCOL_HEADER

SPEC = JobSpec(name="greet", payload=CommandPayload(argv=("true",)))
TRIES = 1 + len(RETRY_PAUSES)
OURS = {PROTOCOL_HEADER: "1"}
Answer = httpx.Response | Exception


class Wire(httpx.AsyncBaseTransport):
    """Gives its answers in turn, the last one for ever, and keeps what was sent."""

    def __init__(self, *answers: Answer | Callable[[httpx.Request], Answer]) -> None:
        self.answers = list(answers)
        self.sent: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.sent.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_link, "RETRY_PAUSES", tuple(0.0 for _ in RETRY_PAUSES))


def reply(value: object, status: int = 200) -> httpx.Response:
    return httpx.Response(status, content=msgspec.json.encode(value), headers=OURS)


def client_on(wire: Wire, url: str = "http://blixard") -> HttpClient:
    return HttpClient(ServerAddress(url=url), transport=wire)


async def test_a_refused_connection_is_an_unreachable_server_and_not_tried_again() -> None:
    wire = Wire(httpx.ConnectError("refused"))
    async with client_on(wire) as client:
        with pytest.raises(ServerUnreachable, match="refused") as caught:
            await client.submit(SPEC)
    assert len(wire.sent) == 1
    assert caught.value.hint is not None
    assert "blixard serve" in caught.value.hint


async def test_a_write_whose_answer_was_lost_is_repeated_with_the_same_id() -> None:
    wire = Wire(httpx.ReadError("reset"), httpx.RemoteProtocolError("gone"), reply({"ids": ["x"], "created": 1}, 201))
    async with client_on(wire) as client:
        assert await client.submit(SPEC) == "x"
    bodies = [msgspec.json.decode(request.content, type=SubmitRequest) for request in wire.sent]
    assert len(bodies) == 3
    assert len({body.jobs[0].id for body in bodies}) == 1
    assert bodies[0].jobs[0].id is not None


async def test_a_write_that_is_never_answered_has_an_unknown_outcome() -> None:
    wire = Wire(httpx.ReadTimeout("slow"))
    async with client_on(wire) as client:
        with pytest.raises(OutcomeUnknown):
            await client.cancel("job_1")
    assert len(wire.sent) == TRIES


async def test_a_server_that_goes_away_after_a_lost_answer_leaves_the_outcome_unknown() -> None:
    wire = Wire(httpx.ReadError("reset"), httpx.ConnectError("refused"))
    async with client_on(wire) as client:
        with pytest.raises(OutcomeUnknown):
            await client.submit(SPEC)
    assert len(wire.sent) == 2


async def test_a_read_that_is_never_answered_is_an_unreachable_server() -> None:
    wire = Wire(httpx.ReadError("reset"))
    async with client_on(wire) as client:
        with pytest.raises(ServerUnreachable):
            await client.job("job_1")
    assert len(wire.sent) == TRIES


async def test_what_would_be_done_twice_is_not_repeated() -> None:
    wire = Wire(httpx.ReadError("reset"))
    async with client_on(wire) as client:
        with pytest.raises(OutcomeUnknown):
            await client.retry("job_1")
        with pytest.raises(OutcomeUnknown):
            await client.open_batch(OpenBatchRequest(name="m", identity="a", total=1, fresh=True))
    assert len(wire.sent) == 2


async def test_the_server_s_error_is_raised_here() -> None:
    problem = problem_of(JobNotFound("job_1"))
    wire = Wire(reply(problem, 404))
    async with client_on(wire) as client:
        with pytest.raises(JobNotFound) as caught:
            await client.job("job_1")
    assert caught.value.job_id == "job_1"


async def test_an_answer_of_something_else_is_no_blixard_server() -> None:
    wire = Wire(httpx.Response(200, text="<html>It works!"))
    async with client_on(wire) as client:
        with pytest.raises(ServerUnreachable, match="no Blixard server"):
            await client.stats()


async def test_another_version_of_the_protocol_is_named() -> None:
    wire = Wire(httpx.Response(200, text="{}", headers={PROTOCOL_HEADER: "2"}))
    async with client_on(wire) as client:
        with pytest.raises(ServerUnreachable, match="version 2"):
            await client.stats()


async def test_a_reply_that_cannot_be_read_is_our_bug() -> None:
    async with client_on(Wire(reply({"odd": 1}))) as client:
        with pytest.raises(InternalError):
            await client.stats()


@pytest.mark.parametrize("job_id", ["", "x" * 256, "..", "a/b", "a?b"])
async def test_what_is_no_id_is_never_sent(job_id: str) -> None:
    wire = Wire(reply({}))
    async with client_on(wire) as client:
        with pytest.raises(InvalidRequest):
            await client.job(job_id)
    assert wire.sent == []


@pytest.mark.parametrize("url", ["", "blixard", "ftp://x", "http://", "http://h:port", "http://h:99999"])
def test_what_is_no_url_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError):
        HttpClient(ServerAddress(url=url))


def test_a_certificate_file_that_is_none_is_a_configuration_error(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("nothing")

    with pytest.raises(ConfigError, match=r"ca\.pem"):
        http_link._verification(ServerAddress(url="https://h", ca_file=file))


async def test_a_stored_blob_is_not_sent_again_and_a_missing_one_is_streamed(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(b"x" * 1_000_000)
    missing = Wire(httpx.Response(404, headers=OURS), httpx.ReadError("reset"), httpx.Response(201, headers=OURS))
    async with client_on(missing) as client:
        digest = await client.put_blob(file)
    assert [request.method for request in missing.sent] == ["HEAD", "PUT", "PUT"]
    assert missing.sent[2].content == missing.sent[1].content == file.read_bytes()
    assert missing.sent[1].headers["content-length"] == "1000000"

    there = Wire(httpx.Response(200, headers=OURS))
    async with client_on(there) as client:
        assert await client.put_blob(file) == digest
    assert [request.method for request in there.sent] == ["HEAD"]


async def test_a_missing_blob_is_told(tmp_path: Path) -> None:
    wire = Wire(reply(problem_of(BlobNotFound("0" * 64)), 404))
    async with client_on(wire) as client:
        with pytest.raises(NotFound):
            await client.get_blob("0" * 64)


async def test_damaged_content_is_never_returned() -> None:
    async with client_on(Wire(httpx.Response(200, content=b"other", headers=OURS))) as client:
        with pytest.raises(Exception, match="damaged"):
            await client.get_blob("0" * 64)


async def test_result_waits_until_the_end_and_no_longer_than_asked() -> None:
    ended = {"ended": [{"id": "j", "state": "completed", "outcome": "completed", "exit_code": 0, "result": [1]}]}
    wire = Wire(reply({"ended": []}), reply(ended))
    async with client_on(wire) as client:
        result = await client.result("j")
    assert result.result is not None
    assert bytes(result.result) == b"[1]"

    async with client_on(Wire(reply({"ended": []}))) as client:
        with pytest.raises(WaitTimedOut):
            await client.result("j", timeout=0)
    async with client_on(Wire(reply({"ended": [], "unknown": ["j"]}))) as client:
        with pytest.raises(JobNotFound):
            await client.result("j", timeout=0)


async def test_jobs_get_their_ids_before_they_are_sent_but_for_those_of_a_batch() -> None:
    wire = Wire(reply({"ids": ["a", "b"], "created": 2}, 201))
    async with client_on(wire) as client:
        await client.submit_many(SubmitRequest(spec=SPEC, jobs=[NewJob(id="a"), NewJob()]))
        await client.submit_many(SubmitRequest(spec=SPEC, jobs=[NewJob()], batch="m", first_index=0))
    first, second = (msgspec.json.decode(request.content, type=SubmitRequest) for request in wire.sent)
    assert first.jobs[0].id == "a"
    assert first.jobs[1].id is not None
    assert second.jobs[0].id is None


async def test_a_closed_client_says_so_and_closing_twice_is_harmless() -> None:
    client = client_on(Wire(reply({})))
    async with client:
        pass
    await client.__aexit__()
    with pytest.raises(InternalError, match="async with"):
        await client.stats()

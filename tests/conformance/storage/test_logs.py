"""What every ``LogStore`` promises."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from blixard.domain.log import LogRecord
from blixard.errors import InvalidRequest
from blixard.storage.logs import LogAppend, LogPage, LogStore

PATIENCE = 60.0
LIMIT = 1_000_000


def record(data: bytes, at: int = 1, stream: str = "stdout") -> LogRecord:
    return LogRecord(at, stream, data)


def batch(
    *records: LogRecord, job: str = "job", offset: int | None = None, ended: bool = False, dropped: int = 0
) -> LogAppend:
    return LogAppend(
        namespace="default", job_id=job, attempt=1, records=records, offset=offset, ended=ended, dropped=dropped
    )


async def read(logs: LogStore, job: str = "job", after: int = 0) -> LogPage:
    return await logs.read("default", job, 1, after)


def text(entries: Sequence[LogRecord]) -> bytes:
    return b"".join(entry.data for entry in entries)


async def test_output_comes_back_in_order_with_its_times_and_streams(logs: LogStore) -> None:
    records = [record(b"line %d\n" % number, number, "stderr" if number % 3 else "stdout") for number in range(100)]
    for start in range(0, 100, 10):
        await logs.append([batch(*records[start : start + 10])])
    await logs.append([batch(ended=True)])
    page = await read(logs)
    assert page.entries == tuple(records)
    assert page.ended
    assert page.dropped == 0
    assert await read(logs, after=page.next_offset) == LogPage(entries=(), next_offset=page.next_offset)


async def test_an_attempt_that_wrote_nothing_has_an_empty_page(logs: LogStore) -> None:
    await logs.append([batch(ended=True)])
    assert await read(logs) == LogPage(entries=(), next_offset=0)


async def test_pages_join_to_the_whole(logs: LogStore) -> None:
    records = [record(b"%05d" % number * 100) for number in range(2_000)]
    await logs.append([batch(*records, ended=True)])
    got: list[LogRecord] = []
    page = await logs.read("default", "job", 1, 0, 100_000)
    pages = 1
    while not page.ended:
        got += page.entries
        page = await logs.read("default", "job", 1, page.next_offset, 100_000)
        pages += 1
    assert [*got, *page.entries] == records
    assert pages > 5


async def test_a_repeated_append_is_recognised_by_its_offset(logs: LogStore) -> None:
    await logs.append([batch(record(b"abc"), record(b"def"), offset=0)])
    await logs.append([batch(record(b"abc"), record(b"def"), offset=0)])
    await logs.append([batch(record(b"ef"), record(b"ghi"), offset=4)])
    await logs.append([batch(offset=9, ended=True)])
    await logs.append([batch(record(b"late"), offset=9, ended=True)])
    page = await read(logs)
    assert text(page.entries) == b"abcdefghi"
    assert page.ended


async def test_output_over_the_limit_is_cut_with_a_mark(logs: LogStore) -> None:
    await logs.append([batch(record(b"x" * (LIMIT - 10)))])
    await logs.append([batch(record(b"y" * 25, stream="stderr"))])
    await logs.append([batch(record(b"z" * 5), ended=True, dropped=3)])
    entries: list[LogRecord] = []
    page = await read(logs)
    while not page.ended:
        entries += page.entries
        page = await read(logs, after=page.next_offset)
    entries += page.entries
    assert text(entries[:-1]) == b"x" * (LIMIT - 10) + b"y" * 10
    assert page.dropped == 23
    assert entries[-1].data == b"\n[output truncated: 23 bytes dropped]\n"


async def test_output_of_exactly_the_limit_has_no_mark(logs: LogStore) -> None:
    await logs.append([batch(*(record(b"x" * (LIMIT // 100)) for _ in range(100)), ended=True)])
    page = await logs.read("default", "job", 1, 0, 2 * LIMIT)
    assert len(text(page.entries)) == LIMIT
    assert page.dropped == 0
    assert page.ended


async def test_attempts_and_jobs_are_kept_apart(logs: LogStore) -> None:
    for job in ("a", "a.1", "a.1.1", "A", "x" * 255, "x" * 254 + "y"):
        await logs.append([batch(record(job.encode()), job=job, ended=True)])
    second = LogAppend(namespace="default", job_id="a", attempt=2, records=[record(b"second")])
    other = LogAppend(namespace="other", job_id="a", attempt=1, records=[record(b"other")])
    await logs.append([second, other])
    for job in ("a", "a.1", "a.1.1", "A", "x" * 255, "x" * 254 + "y"):
        assert text((await read(logs, job)).entries) == job.encode()
    await logs.delete([("default", "a", 1), ("default", "nobody", 7)])
    assert (await read(logs, "a")).entries == ()
    assert text((await logs.read("default", "a", 2)).entries) == b"second"
    assert text((await logs.read("other", "a", 1)).entries) == b"other"
    assert text((await read(logs, "a.1")).entries) == b"a.1"


@pytest.mark.parametrize(
    ("namespace", "job"), [("default", "../x"), ("..", "job"), ("default", ""), ("default", "x" * 256)]
)
async def test_names_that_are_no_ids_are_refused(logs: LogStore, namespace: str, job: str) -> None:
    with pytest.raises(InvalidRequest):
        await logs.read(namespace, job, 1)
    with pytest.raises(InvalidRequest):
        await logs.append([LogAppend(namespace=namespace, job_id=job, attempt=1, records=[record(b"x")])])


async def test_a_follower_hears_everything_until_the_end(logs: LogStore) -> None:
    async def follow() -> bytes:
        return b"".join([text(page.entries) async for page in logs.watch("default", "job", 1)])

    followers = [asyncio.ensure_future(follow()) for _ in range(3)]
    for number in range(50):
        await logs.append([batch(record(b"%d " % number), ended=number == 49)])
    heard = await asyncio.wait_for(asyncio.gather(*followers), PATIENCE)
    assert heard == [b"".join(b"%d " % number for number in range(50))] * 3


async def test_waiting_ends_with_output_or_with_its_time(logs: LogStore) -> None:
    assert not await logs.wait("default", "job", 1, 0, 0.01)
    waiting = asyncio.ensure_future(logs.wait("default", "job", 1, 0, PATIENCE))
    await logs.append([batch(record(b"x"))])
    assert await asyncio.wait_for(waiting, PATIENCE)


async def test_closing_twice_is_harmless_and_appending_opens_again(logs: LogStore) -> None:
    await logs.append([batch(record(b"a"))])
    await logs.close()
    await logs.close()
    await logs.append([batch(record(b"b"), ended=True)])
    page = await read(logs)
    assert text(page.entries) == b"ab"
    assert page.ended


async def test_many_attempts_at_once_are_kept_apart(logs: LogStore) -> None:
    jobs = [f"job_{number}" for number in range(300)]
    for part in range(3):
        await logs.append([batch(record(f"{job} {part};".encode()), job=job, ended=part == 2) for job in jobs])
    for job in jobs:
        page = await read(logs, job)
        assert text(page.entries) == "".join(f"{job} {part};" for part in range(3)).encode()
        assert page.ended

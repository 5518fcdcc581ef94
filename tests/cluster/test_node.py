"""One node in this process: what the binding promises, and what the store makes of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import apsw
import blixard_hiqlite
import msgspec
import pytest
from blixard_hiqlite import Failure, Node, Operation

from blixard.errors import ConfigError, InternalError, StoreFull, StoreUnavailable
from blixard.storage.database import Statement
from blixard.storage.hiqlite.consistency import LOCAL_READS
from blixard.storage.hiqlite.crash_mark import CrashMark
from blixard.storage.hiqlite.database import HiqliteDatabase, to_engine
from blixard.storage.hiqlite.lane import MAX_BATCH, MAX_QUEUED, Lane
from blixard.storage.hiqlite.operations import Outcome, translate_trouble
from blixard.storage.hiqlite.settings import Member, NodeSettings, check_settings
from blixard.storage.statements import load_statements
from tests.cluster.addresses import make_single

SECONDS = 30.0
ORIGIN = b"one origin"


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = await blixard_hiqlite.start(to_engine(make_single(tmp_path / "node")))
    yield made
    await asyncio.to_thread(made.end, SECONDS)


async def write(node: Node, number: int, *operations: Operation, origin: bytes = ORIGIN) -> tuple[int, list[Outcome]]:
    return await node.write(operations, origin, number, node.progress()[0], SECONDS)


async def test_a_repeated_request_gets_its_first_answer_and_is_not_carried_out_again(node: Node) -> None:
    await write(node, 1, Operation.script("CREATE TABLE t (n INTEGER) STRICT"))
    insert = Operation.rows("INSERT INTO t VALUES (:n) RETURNING n", {"n": 7})
    first = await write(node, 2, insert)
    assert first[1] == [[(7,)]]
    assert await write(node, 2, insert) == first
    with pytest.raises(blixard_hiqlite.Stale):
        await write(node, 1, insert)
    _, outcomes = await node.read([Operation.rows("SELECT count(*) FROM t", {})], True, 0, SECONDS)
    assert outcomes == [[(1,)]]


async def test_a_large_request_is_carried_out_once_however_often_its_parts_arrive(node: Node) -> None:
    await write(node, 1, Operation.script("CREATE TABLE t (text TEXT) STRICT"))
    large = Operation.rows("INSERT INTO t VALUES (:text) RETURNING length(text)", {"text": "x" * 1_000_000})
    answers = await asyncio.gather(*(write(node, 2, large) for _ in range(3)))
    assert answers[0][1] == [[(1_000_000,)]]
    assert answers[1:] == answers[:1] * 2
    reads = [Operation.rows(f"SELECT count(*) FROM {table}", {}) for table in ("t", "_blixard_parts")]
    assert (await node.read(reads, True, 0, SECONDS))[1] == [[(1,)], [(0,)]]


async def test_no_statement_of_any_kind_brings_the_node_down(node: Node) -> None:
    """Typed columns that hold another type, wrong SQL, functions that are forbidden, what rolls back everything, no table at all."""
    await write(node, 1, Operation.script("CREATE TABLE loose (n INTEGER, b BLOB, r REAL, t TEXT, d DATETIME, j JSON)"))
    values: dict[str, str | int | float | bytes | None] = {
        "a": "text in a number",
        "b": 1,
        "c": b"\xff",
        "d": b"blob in a text",
        "e": "no date",
        "f": b"no json",
    }
    odd = [
        Operation.rows("INSERT INTO loose VALUES (:a, :b, :c, :d, :e, :f) RETURNING n, b, r, t, d, j", values),
        Operation.rows("SELECT * FROM loose", {}),
        Operation.rows("SELECT CAST(x'ff' AS TEXT)", {}),
        Operation.rows("SELECT randomblob(4)", {}),
        Operation.rows("SELECT load_extension('x')", {}),
        Operation.rows("ROLLBACK", {}),
        Operation.rows("SELECT json('{')", {}),
        Operation.rows("", {}),
        Operation.rows("SELECT :a, ?2", {"a": 1}),
        Operation.rows("PRAGMA journal_mode = DELETE", {}),
        Operation.rows("VACUUM", {}),
        Operation.rows("SELECT blixard_apply(x'01')", {}),
        Operation.script("CREATE TABLE x (y); SELECT nothing"),
        Operation.counts([]),
    ]
    _, outcomes = await write(node, 2, *odd)
    assert len(outcomes) == len(odd)
    assert outcomes[0] == [tuple(values.values())]
    assert isinstance(outcomes[3], Failure)
    assert outcomes[3].code == blixard_hiqlite.FAILURE_FORBIDDEN
    _, [tables] = await write(node, 3, Operation.rows("SELECT count(*) FROM sqlite_schema WHERE name = 'x'", {}))
    assert tables == [(0,)]


async def test_a_read_must_not_write(node: Node) -> None:
    read = Operation.rows("CREATE TABLE t (n)", {})
    for is_consistent in (True, False):
        _, [outcome] = await node.read([read], is_consistent, 0, SECONDS)
        assert isinstance(outcome, Failure)


async def test_a_node_that_is_ended_leaves_nobody_waiting(node: Node) -> None:
    change, read = node.next_change(10**6), node.read([Operation.rows("SELECT 1", {})], False, 10**6, SECONDS)
    await asyncio.to_thread(node.end, SECONDS)
    async with asyncio.timeout(SECONDS):
        with pytest.raises(blixard_hiqlite.Closed):
            await change
        # The end may also have met it while it was with the engine, which says only that nobody knows.
        with pytest.raises((blixard_hiqlite.Closed, blixard_hiqlite.OutcomeUnknown)):
            await read
    with pytest.raises(blixard_hiqlite.Closed):
        node.next_change(0)


async def test_what_cannot_be_stored_is_refused_with_the_parameter_s_name() -> None:
    for value in (1 << 63, "\ud800", object(), [1]):
        with pytest.raises((TypeError, ValueError, UnicodeError)):
            Operation.rows("SELECT :what", {"what": value})  # type: ignore[dict-item]  # wrong on purpose


async def test_an_unclean_end_loses_nothing(tmp_path: Path) -> None:
    settings = make_single(tmp_path / "node")
    database = HiqliteDatabase(settings)
    add = Statement(
        "add", "INSERT INTO tokens (id, namespace, name, hash, scopes, created_at) VALUES (:id, '', '', :id, '', 1)"
    )
    for life in range(3):
        await database.open()
        assert await database.read(Statement("count", "SELECT count(*) FROM tokens")) == [(life,)]
        await database.write(add, {"id": str(life)})
        await database.abandon()
    assert (settings.data_dir / "running").exists()
    await database.open()
    await database.close()
    assert not (settings.data_dir / "running").exists()


async def test_no_node_gathers_statistics_of_its_own(tmp_path: Path) -> None:
    """They would make nodes choose different plans, and so change the rows of one statement in different orders."""
    database = HiqliteDatabase(make_single(tmp_path / "node"))
    for _ in range(2):
        await database.open()
        await database.close()
    with apsw.Connection(str(tmp_path / "node" / "state_machine" / "db" / "hiqlite.db")) as file:
        kept = file.execute("SELECT name FROM sqlite_schema WHERE name LIKE 'sqlite_stat%'").fetchall()
        assert [file.execute(f"SELECT count(*) FROM {name}").fetchall() for (name,) in kept] == [[(0,)]] * len(kept)


def test_the_mark_of_a_crash_makes_the_engine_rebuild(tmp_path: Path) -> None:
    mark = CrashMark(tmp_path)
    mark.set()
    (tmp_path / "state_machine").mkdir()
    assert not (tmp_path / "state_machine" / "lock").exists()
    mark.set()
    assert (tmp_path / "state_machine" / "lock").exists()
    mark.clear()
    (tmp_path / "state_machine" / "lock").unlink()
    mark.set()
    assert not (tmp_path / "state_machine" / "lock").exists()


def test_every_local_read_is_a_statement_that_exists() -> None:
    known = {statement.name: statement for statement in load_statements(files("blixard.storage") / "sql")}
    assert LOCAL_READS - set(known) == set()
    assert [name for name in LOCAL_READS if "RETURNING" in known[name].sql] == []


# Any: whatever a field of the settings may be.
BAD_SETTINGS: dict[str, dict[str, Any]] = {
    "same id": {"members": (Member(id=1, raft="a:1", api="a:2"), Member(id=1, raft="b:1", api="b:2"))},
    "not among": {"node_id": 3},
    "no member has the id 1": {"members": (Member(id=2, raft="a:1", api="a:2"),), "node_id": 2},
    "addresses": {"members": (Member(id=1, raft="a:1", api="a:1"),)},
    "is not an address": {"members": (Member(id=1, raft="a:1", api="a:99999"),)},
    "raft_secret": {"raft_secret": "short"},
    "api_secret": {"api_secret": ""},
    "heartbeat_seconds": {"heartbeat_seconds": 1.0},
    "entries_until_snapshot": {"entries_until_snapshot": 0},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
async def test_settings_that_cannot_work_are_refused_before_anything_is_made(tmp_path: Path, message: str) -> None:
    settings: NodeSettings = msgspec.structs.replace(make_single(tmp_path / "node"), **BAD_SETTINGS[message])
    with pytest.raises(ConfigError, match=message):
        check_settings(settings)
    with pytest.raises(ConfigError, match=message):
        await HiqliteDatabase(settings).open()
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - only the names


async def test_a_port_that_is_taken_and_a_directory_in_use_are_said(tmp_path: Path) -> None:
    settings = make_single(tmp_path / "node")
    first, same_port = (
        HiqliteDatabase(settings),
        HiqliteDatabase(msgspec.structs.replace(settings, data_dir=tmp_path / "b")),
    )
    await first.open()
    try:
        with pytest.raises(StoreUnavailable, match="bind"):
            await same_port.open()
        with pytest.raises(StoreUnavailable, match="another process uses"):
            await HiqliteDatabase(settings).open()
    finally:
        await first.close()


class Wire:
    """Stands in for a cluster: holds batches until the test lets them go."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def send(self, operations: Sequence[Operation]) -> Sequence[Outcome]:
        self.batches.append(len(operations))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [[operation.size] for operation in operations]


OPERATION = Operation.rows("SELECT 1", {})


async def test_what_waits_while_one_batch_is_away_goes_with_the_next() -> None:
    wire = Wire()
    lane = Lane(wire.send, name="lane")
    lane.start()
    calls = [asyncio.ensure_future(lane.call(OPERATION, "x"))]
    await asyncio.sleep(0)  # sleep: lets the first call be sent
    await asyncio.sleep(0)
    calls += [asyncio.ensure_future(lane.call(OPERATION, "x")) for _ in range(MAX_QUEUED + 500)]
    await asyncio.sleep(0)
    calls[5].cancel()
    wire.gate.set()
    answers = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), SECONDS)
    assert sum(isinstance(answer, asyncio.CancelledError) for answer in answers) == 1
    assert sum(wire.batches) == len(calls) - 1
    assert max(wire.batches) == MAX_BATCH
    await lane.stop()
    await lane.stop()
    with pytest.raises(StoreUnavailable):
        await lane.call(OPERATION, "x")


async def test_an_error_of_a_batch_is_told_to_all_of_it_and_the_lane_goes_on() -> None:
    wire = Wire()
    wire.gate.set()
    lane = Lane(wire.send, name="lane")
    lane.start()
    for error, expected in ((StoreUnavailable("gone"), StoreUnavailable), (ValueError("bug"), InternalError)):
        wire.error = error
        answers = await asyncio.gather(*(lane.call(OPERATION, "x") for _ in range(3)), return_exceptions=True)
        assert {type(answer) for answer in answers} == {expected}
    wire.error = None
    assert await lane.call(OPERATION, "x") == [OPERATION.size]
    await lane.stop()


def test_a_full_disk_is_called_so() -> None:
    assert isinstance(translate_trouble("database or disk is full"), StoreFull)
    assert not isinstance(translate_trouble("disk I/O error"), StoreFull)

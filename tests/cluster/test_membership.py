"""Nodes that join, leave, come back empty, and a cluster that starts from a single machine's database."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import msgspec
import pytest

from blixard.errors import ConfigError
from blixard.storage.database import Statement
from blixard.storage.hiqlite.database import HiqliteDatabase
from blixard.storage.hiqlite.founding import found_from
from blixard.storage.sqlite import SqliteDatabase
from tests.cluster.addresses import make_member, make_settings, make_single
from tests.cluster.nodes import Cluster

SCHEMA = "CREATE TABLE items (name TEXT NOT NULL PRIMARY KEY) STRICT, WITHOUT ROWID;"
ADD = "INSERT INTO items (name) VALUES (:name) RETURNING name"
LIST = "SELECT name FROM items ORDER BY name"
TOKENS = 1_000
COUNT_TOKENS = Statement("count_tokens", "SELECT count(*), min(id), max(id) FROM tokens")


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path / "cluster", SCHEMA)
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


@pytest.mark.timeout(240)
async def test_a_node_joins_one_is_removed_and_one_returns_without_its_data(cluster: Cluster) -> None:
    first, second, third = cluster.nodes
    await first.write(ADD, name="before")

    fourth = await cluster.add()
    status = await first.status()
    assert sorted(member[0] for member in status["members"] if member[3]) == [1, 2, 3, 4]
    assert await fourth.write(ADD, name="by the fourth") == [["by the fourth"]]

    await third.kill()
    await first.ask("remove", node_id=3)
    status = await first.status()
    assert sorted(member[0] for member in status["members"]) == [1, 2, 4]
    cluster.nodes.remove(third)

    await second.kill()
    shutil.rmtree(second.settings.data_dir)
    await second.start()
    assert await first.write(ADD, name="after") == [["after"]]

    contents = await cluster.contents(LIST)
    assert contents == [[["after"], ["before"], ["by the fourth"]]] * 3


@pytest.mark.timeout(240)
async def test_a_cluster_starts_with_all_that_a_single_machine_had(tmp_path: Path) -> None:
    source = tmp_path / "blixard.db"
    await _fill(source)
    members = tuple(make_member(number) for number in (1, 2, 3))
    await found_from(source, make_settings(1, members, tmp_path / "node-1"))
    nodes = [HiqliteDatabase(make_settings(number, members, tmp_path / f"node-{number}")) for number in (1, 2, 3)]
    try:
        await asyncio.gather(*(node.open() for node in nodes))
        local = msgspec.structs.replace(COUNT_TOKENS, name="count_jobs")
        await nodes[2].write(Statement("use", "UPDATE tokens SET last_used_at = 5 WHERE id = 'token 000'"))
        for node in nodes:
            assert await node.read(COUNT_TOKENS) == [(TOKENS, "token 000", "token 999")]
        assert await nodes[2].read(local) == [(TOKENS, "token 000", "token 999")]
    finally:
        await asyncio.gather(*(node.abandon() for node in nodes))
    with apsw.Connection(str(source)) as untouched:
        assert untouched.execute(
            "SELECT count(*) FROM sqlite_schema WHERE name LIKE '\\_%' ESCAPE '\\'"
        ).fetchall() == [(0,)]


async def _fill(source: Path) -> None:
    database = SqliteDatabase(source)
    await database.open()
    names = msgspec.json.encode([f"token {number:03}" for number in range(TOKENS)]).decode()
    insert = (
        "INSERT INTO tokens (id, namespace, name, hash, scopes, created_at) "
        "SELECT value, 'default', value, value, '[]', 1 FROM json_each(:names)"
    )
    await database.write(Statement("fill", insert), {"names": names})
    await database.close()


async def test_a_cluster_is_not_founded_over_data_or_by_another_node(tmp_path: Path) -> None:
    source = tmp_path / "blixard.db"
    source.touch()
    settings = make_single(tmp_path / "node")
    with pytest.raises(ConfigError, match="no database"):
        await found_from(tmp_path / "gone.db", settings)
    with pytest.raises(ConfigError, match="node 1"):
        await found_from(source, msgspec.structs.replace(settings, node_id=2))
    settings.data_dir.mkdir()
    (settings.data_dir / "something").touch()
    with pytest.raises(ConfigError, match="not empty"):
        await found_from(source, settings)
    assert [entry.name for entry in settings.data_dir.iterdir()] == ["something"]


async def test_who_is_no_member_and_who_is_the_last_cannot_be_removed(tmp_path: Path) -> None:
    database = HiqliteDatabase(make_single(tmp_path / "node"))
    await database.open()
    try:
        with pytest.raises(ConfigError, match="not a member"):
            await database.remove_member(7)
        with pytest.raises(ConfigError, match="last node"):
            await database.remove_member(1)
    finally:
        await database.close()

"""What the contract promises, asked of three real nodes: the smaller half of the storage suite, with every node as the door."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.cluster.nodes import Cluster, RemoteError

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = """
CREATE TABLE items (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, size INTEGER NOT NULL DEFAULT 0 CHECK (size >= 0)
) STRICT;
"""
ADD = "INSERT INTO items (name, size) VALUES (:name, :size) RETURNING id, name"
SIZE = "SELECT size FROM items WHERE name = :name"
PATIENCE = 30.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    made = Cluster(Path(tmp_path_factory.mktemp("cluster")), SCHEMA)
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


async def test_all_nodes_belong_and_one_leads(cluster: Cluster) -> None:
    leader = await cluster.find_leader()
    status = await leader.status()
    assert sorted(member[0] for member in status["members"] if member[3]) == [1, 2, 3]
    assert status["failure"] is None


async def test_a_write_through_any_node_is_seen_by_every_other_at_once(cluster: Cluster) -> None:
    for door in cluster.nodes:
        name = f"seen {door.node_id}"
        assert (await door.write(ADD, name=name, size=door.node_id))[0][1] == name
        for other in cluster.nodes:
            assert await other.ask("read", name="find_size", sql=SIZE, params={"name": name}) == [[door.node_id]]


async def test_a_local_read_sees_what_its_own_node_has_acknowledged(cluster: Cluster) -> None:
    for round_number in range(30):
        door = cluster.nodes[round_number % 3]
        name = f"own {round_number}"
        await door.write(ADD, name=name, size=round_number)
        assert await door.ask("read", name="count_jobs", sql=SIZE, params={"name": name}) == [[round_number]]


async def test_one_of_many_nodes_wins_a_unique_row_and_the_others_hear_of_the_constraint(cluster: Cluster) -> None:
    for number in range(20):
        calls = [node.write(ADD, name=f"unique {number}", size=0) for node in cluster.nodes for _ in range(3)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(answer, list) for answer in answers) == 1
        assert all(answer.code == "constraint_failed" for answer in answers if isinstance(answer, RemoteError))


async def test_a_transaction_is_all_or_nothing_through_any_node(cluster: Cluster) -> None:
    for node in cluster.nodes:
        good = [[ADD, {"name": f"{part} of {node.node_id}", "size": 1}] for part in "ab"]
        assert await node.ask("transaction", statements=good) == [1, 1]
        bad = [[ADD, {"name": f"c of {node.node_id}", "size": 1}], [ADD, {"name": f"a of {node.node_id}", "size": 1}]]
        with pytest.raises(RemoteError, match="constraint_failed"):
            await node.ask("transaction", statements=bad)
        assert await node.ask("read", name="x", sql=SIZE, params={"name": f"c of {node.node_id}"}) == []


async def test_a_change_wakes_the_watchers_of_every_node(cluster: Cluster) -> None:
    for door in cluster.nodes:
        waiting = [asyncio.ensure_future(node.ask("changed")) for node in cluster.nodes]
        await asyncio.gather(*(node.status() for node in cluster.nodes))  # the watches are there once this is answered
        await door.write(ADD, name=f"wakes {door.node_id}", size=0)
        await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE)


async def test_a_wrong_statement_is_our_bug_and_disturbs_no_node(cluster: Cluster) -> None:
    for node in cluster.nodes:
        for sql in (
            "SELEC 1",
            "SELECT nothing FROM nowhere",
            "SELECT random()",
            "INSERT INTO items (name) VALUES (:gone)",
        ):
            with pytest.raises(RemoteError, match="internal_error"):
                await node.write(sql)
    assert {len(rows) for rows in await cluster.contents("SELECT 1")} == {1}


async def test_statements_of_every_size_arrive_as_they_were(cluster: Cluster) -> None:
    """Small batches, and one of 8 MiB, which travels in parts."""
    for node in cluster.nodes:
        text = str(node.node_id) * (8 << 20)
        rows = await node.write("INSERT INTO items (name) VALUES (:text) RETURNING length(name)", text=text)
        assert rows == [[len(text)]]
    with pytest.raises(RemoteError, match="a cluster takes"):
        await cluster.nodes[0].write("SELECT :text", text="x" * (33 << 20))


async def test_concurrent_writes_through_all_nodes_add_up_and_all_nodes_end_alike(cluster: Cluster) -> None:
    await cluster.nodes[0].write(ADD, name="counter", size=0)
    grow = "UPDATE items SET size = size + 1 WHERE name = 'counter' RETURNING size"
    many = json.dumps([[f"many {number}", number] for number in range(500)])
    calls = [node.write(grow) for node in cluster.nodes for _ in range(200)]
    insert = "INSERT INTO items (name, size) SELECT value ->> 0, value ->> 1 FROM json_each(:many) RETURNING id"
    *sizes, added = await asyncio.gather(*calls, cluster.nodes[1].write(insert, many=many))
    assert sorted(rows[0][0] for rows in sizes) == list(range(1, 601))
    assert len(added) == 500
    first, *others = await cluster.contents("SELECT id, name, size FROM items ORDER BY id")
    assert len(first) > 500
    assert all(rows == first for rows in others)


async def test_no_node_has_written_a_panic_or_a_traceback(cluster: Cluster) -> None:
    for node in cluster.nodes:
        assert "panicked" not in node.log
        assert "Traceback" not in node.log

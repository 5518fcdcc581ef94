"""Nodes that die, stand still and come back under load: nothing acknowledged is lost, and nothing happens twice."""

from __future__ import annotations

import asyncio
import random
import secrets
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cluster.nodes import Cluster, NodeGone, NodeProcess, RemoteError

SCHEMA = """
CREATE TABLE items (name TEXT NOT NULL PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TABLE counters (name TEXT NOT NULL PRIMARY KEY, n INTEGER NOT NULL) STRICT, WITHOUT ROWID;
"""
ADD = "INSERT INTO items (name) VALUES (:name) RETURNING name"
GROW = "INSERT INTO counters (name, n) VALUES (:name, 1) ON CONFLICT DO UPDATE SET n = n + 1 RETURNING n"
KILLS = 3
PAUSES = 1
PAUSE_SECONDS = 4.0
CALM_WRITES = 100
"""Acknowledged writes between two faults, so that each fault meets a cluster that works."""


class Load:
    """Writers on every node. Counts what was acknowledged, and what nobody knows about."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stopping = False
        self.acknowledged: set[str] = set()
        self.grown = 0
        self.unknown = 0
        self.refused = 0
        self.longest_gap = 0.0
        self._last = time.monotonic()
        self._progress = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for node in self._cluster.nodes:
                for writer in range(4):
                    group.create_task(self._write(node, f"{node.node_id}.{writer}"))

    def stop(self) -> None:
        self._stopping = True

    async def _write(self, node: NodeProcess, name: str) -> None:
        number = 0
        while not self._stopping:
            number += 1
            await self._one(node, f"{name}.{number}", is_counter=number % 2 == 0)

    async def _one(self, node: NodeProcess, name: str, *, is_counter: bool) -> None:
        try:
            if is_counter:
                await node.write(GROW, name="all")
                self.grown += 1
            else:
                await node.write(ADD, name=name)
                self.acknowledged.add(name)
        except NodeGone:
            self.unknown += is_counter
            await asyncio.sleep(0.1)  # sleep: the node is down until whoever killed it starts it again
        except RemoteError as error:
            assert error.code in {"outcome_unknown", "store_unavailable"}, error  # noqa: PT017 - codes of the two that may happen
            self.unknown += is_counter and error.code == "outcome_unknown"
            self.refused += 1
        else:
            now = time.monotonic()
            self.longest_gap = max(self.longest_gap, now - self._last)
            self._last = now
            self._progress.set()

    async def wait_for_writes(self, count: int) -> None:
        """Wait for so many further acknowledgements."""
        until = len(self.acknowledged) + count
        async with asyncio.timeout(60):
            while True:
                if len(self.acknowledged) >= until:
                    return
                self._progress.clear()
                await self._progress.wait()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path / "cluster", SCHEMA)
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_kills_and_pauses_under_load_lose_nothing_and_repeat_nothing(cluster: Cluster) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown when the test fails
    chance = random.Random(seed)
    load = Load(cluster)
    running = asyncio.create_task(load.run())
    gaps: list[float] = []
    faults = chance.sample([_kill] * KILLS + [_pause] * PAUSES, KILLS + PAUSES)
    try:
        for fault in faults:
            await load.wait_for_writes(CALM_WRITES)
            load.longest_gap = 0.0
            await fault(cluster, load)
            gaps.append(round(load.longest_gap, 2))
        await load.wait_for_writes(CALM_WRITES)
    finally:
        load.stop()
        await running
    print(f"gaps {gaps}, acknowledged {len(load.acknowledged)}, unknown {load.unknown}, refused {load.refused}")
    assert len(faults) == KILLS + PAUSES
    assert len(load.acknowledged) > (KILLS + PAUSES + 1) * CALM_WRITES
    await _check(cluster, load)


async def _kill(cluster: Cluster, load: Load) -> None:
    """Kill the leader, go on without it, start it again."""
    leader = await cluster.find_leader()
    await leader.kill()
    await load.wait_for_writes(CALM_WRITES)
    await leader.start()


async def _pause(cluster: Cluster, load: Load) -> None:
    """Let the leader stand still until the others have another one, and go on as if nothing had been."""
    leader = await cluster.find_leader()
    leader.send(signal.SIGSTOP)
    try:
        await load.wait_for_writes(CALM_WRITES // 2)
        await cluster.find_leader([node for node in cluster.nodes if node is not leader])
    finally:
        leader.send(signal.SIGCONT)


async def _check(cluster: Cluster, load: Load) -> None:
    contents = await cluster.contents("SELECT name FROM items ORDER BY name")
    assert contents[0] == contents[1] == contents[2]
    stored = {row[0] for row in contents[0]}
    assert load.acknowledged - stored == set()
    counters = await cluster.contents("SELECT n FROM counters")
    assert counters[0] == counters[1] == counters[2]
    grown = counters[0][0][0]
    assert load.grown <= grown <= load.grown + load.unknown
    for node in cluster.nodes:
        assert "panicked" not in node.log
        assert "Traceback" not in node.log


async def test_all_nodes_killed_at_once_come_back_with_everything(cluster: Cluster) -> None:
    load = Load(cluster)
    running = asyncio.create_task(load.run())
    try:
        await load.wait_for_writes(CALM_WRITES)
        await asyncio.gather(*(node.kill() for node in cluster.nodes))
        await asyncio.gather(*(node.start() for node in cluster.nodes))
        await load.wait_for_writes(CALM_WRITES)
    finally:
        load.stop()
        await running
    await _check(cluster, load)


async def test_a_minority_refuses_and_a_majority_goes_on(cluster: Cluster) -> None:
    first, second, third = cluster.nodes
    await first.write(ADD, name="before")
    await asyncio.gather(second.kill(), third.kill())
    with pytest.raises(RemoteError) as refused:
        await first.write(ADD, name="alone")
    assert refused.value.code in {"store_unavailable", "outcome_unknown"}
    with pytest.raises(RemoteError, match="store_unavailable"):
        await first.read("SELECT count(*) FROM items")
    assert await first.read("SELECT name FROM items", name="count_jobs") == [["before"]]
    await second.start()
    assert await first.write(ADD, name="together") == [["together"]]
    assert ["before"] in await second.read("SELECT name FROM items")

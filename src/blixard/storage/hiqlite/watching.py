"""Changes as they arrive at this node, for any number of watchers."""

from __future__ import annotations

import asyncio
import weakref

import blixard_hiqlite
from blixard_hiqlite import Node

from blixard.storage.watch import Watch


class Watches:
    """Rings all watches of one node. Every node applies every change, so nobody is asked from outside."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        _, changed = self._node.progress()
        self._task = asyncio.create_task(self._run(changed), name="blixard-cluster-watch")

    async def stop(self) -> None:
        """End all watches. Calling it twice is harmless."""
        for watch in self._watches:
            watch.end()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def add(self) -> Watch:
        watch = Watch(Watch.end)
        self._watches.add(watch)
        return watch

    async def _run(self, seen: int) -> None:
        try:
            while True:
                seen = await self._node.next_change(seen)
                for watch in self._watches:
                    watch.ring()
        except blixard_hiqlite.Closed:
            for watch in self._watches:
                watch.end()

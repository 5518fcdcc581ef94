"""A VM manager on machines in memory, with an agent that answers what the manager asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import msgspec

from blixard.domain.requirements import VmMode
from blixard.errors import ImageNotFound, MachineLost
from blixard.services.clock import SystemClock
from blixard.testing.fake_hypervisor import FakeHypervisor, FakeMachine
from blixard.vm.agent_link import AgentLink, GuestIdentity
from blixard.vm.hypervisor.contract import Machine
from blixard.vm.image.guest_image import GuestImage
from blixard.vm.lease import VmLease, VmNeed
from blixard.vm.manager import VmManager
from blixard.vm.policy import HealthRules, MonitorRules, RoutingRules, VmManagerConfig

DEADLINE = 30.0


class FakeLink:
    """Answers reseeds and pings while ``is_answering``; breaks when its machine ends."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.identities: list[GuestIdentity] = []
        self.is_answering = True
        self.pings = 0
        self._watch = asyncio.get_running_loop().create_task(self._until_gone())

    async def _until_gone(self) -> None:
        await self.machine.wait()
        self.lose("the connection to the guest's agent broke")

    def lose(self, cause: str) -> None:
        if not self.lost.done():
            self.lost.set_result(cause)

    async def reseed(self, identity: GuestIdentity, seconds: float = 1.0) -> None:
        self._check("reseed", seconds)
        self.identities.append(identity)

    async def ping(self, seconds: float = 1.0) -> None:
        self._check("ping", seconds)
        self.pings += 1

    async def close(self) -> None:
        self.lose("the link was closed")
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)

    def _check(self, operation: str, seconds: float) -> None:
        if self.lost.done():
            raise MachineLost(self.lost.result())
        if not self.is_answering:
            raise MachineLost(f"the guest's agent has not answered {operation!r} within {seconds:g} s")


class FakeImages:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.opened: list[str] = []

    async def open(self, name: str) -> GuestImage:
        if name.startswith("missing"):
            raise ImageNotFound(name)
        self.opened.append(name)
        return GuestImage(name=name, digest=name.ljust(64, "0"), directory=self._directory)


class Rig:
    """``links`` by machine id. ``hold`` keeps machines from coming up until it is set."""

    def __init__(self, directory: Path, config: VmManagerConfig) -> None:
        self.hypervisor = FakeHypervisor()
        self.images = FakeImages(directory)
        self.links: dict[str, FakeLink] = {}
        self.hold = asyncio.Event()
        self.hold.set()
        self.manager = VmManager(config, self.hypervisor, self.images, SystemClock(), connect=self._connect)

    async def _connect(self, machine: Machine, seconds: float) -> AgentLink:
        del seconds
        await self.hold.wait()
        assert isinstance(machine, FakeMachine)
        link = self.links[machine.id] = FakeLink(machine)
        return cast("AgentLink", link)

    def machine(self, vm_id: str) -> FakeMachine:
        return next(machine for machine in self.hypervisor.living if machine.id == vm_id)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the manager's tasks bring about."""
        async with asyncio.timeout(DEADLINE):
            while not condition():  # noqa: ASYNC110  the parts tell nobody else of their books
                await asyncio.sleep(0.005)

    async def acquire(self, need: VmNeed) -> VmLease:
        async with asyncio.timeout(DEADLINE):
            return await self.manager.acquire(need)

    def assert_nothing_left(self) -> None:
        assert self.hypervisor.living == []
        assert self.manager.list_vms() == []
        assert list(self.manager.config.directory.glob("run/*")) == []


def make_config(directory: Path, **rules: object) -> VmManagerConfig:
    routing = msgspec.convert({"max_vms": 3, "pool": 0, "memory_mb": 4096, **rules}, RoutingRules)
    health = HealthRules(interval=0.05, timeout=0.05, failure_threshold=2, recovery_threshold=1, breaker_seconds=600)
    return VmManagerConfig(
        directory=directory / "vm",
        routing=routing,
        health=health,
        monitor=MonitorRules(interval=0.05),
        memory_mb=256,
        shutdown_timeout=DEADLINE,
    )


@asynccontextmanager
async def running(directory: Path, **rules: object) -> AsyncIterator[Rig]:
    """Give a rig whose manager runs; afterwards it has stopped and nothing is left."""
    rig = Rig(directory, make_config(directory, **rules))
    await rig.manager.start()
    try:
        yield rig
    finally:
        rig.hold.set()
        await rig.manager.shutdown()
    rig.assert_nothing_left()


def need(namespace: str = "red", mode: VmMode = VmMode.EPHEMERAL, **fields: object) -> VmNeed:
    return msgspec.convert({"namespace": namespace, "memory_mb": 256, "mode": mode, **fields}, VmNeed)


def service(namespace: str = "red", **fields: object) -> VmNeed:
    return need(namespace, VmMode.SERVICE, **fields)

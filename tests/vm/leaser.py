"""The simplest keeper of virtual machines: a clone per lease, one service machine per need. For tests of the backend by itself."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from blixard.domain.requirements import VmMode
from blixard.errors import MachineLost
from blixard.vm.agent_link import AgentLink, connect, fresh_identity
from blixard.vm.hypervisor.contract import Machine, MachineShape, Template
from blixard.vm.hypervisor.qemu import QemuHypervisor
from blixard.vm.image.builder import ensure_default_image
from blixard.vm.image.guest_image import GuestImage
from blixard.vm.image.store import ImageStore
from blixard.vm.lease import VmLease, VmNeed

CACHE = Path(os.environ.get("BLIXARD_CACHE", Path.home() / ".cache" / "blixard")) / "vm"
"""Images and templates are kept between runs: they take seconds to make."""
BOOT_SECONDS = 120.0
_numbers = itertools.count(1)


class DirectLease:
    """``lost``: the machine is gone, or its link has broken."""

    def __init__(self, machine: Machine, link: AgentLink) -> None:
        self.id = machine.id
        self.machine = machine
        self.link = link
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.watch = asyncio.create_task(self._watch(), name=f"watch {self.id}")
        self.need: VmNeed | None = None

    async def _watch(self) -> None:
        cause = await self.machine.wait()
        if not self.lost.done():
            self.lost.set_result(cause)


class DirectLeaser:
    def __init__(self) -> None:
        self.hypervisor, self.templates = kept()
        self.directory = Path()
        self.leases: set[DirectLease] = set()
        self.idle: list[DirectLease] = []
        self._making = asyncio.Lock()
        self._is_stopped = True

    def open(self) -> None:
        """Begin. Harmless when called twice."""
        if self._is_stopped:
            self._is_stopped = False
            self.directory = Path(tempfile.mkdtemp(prefix="vms-"))

    async def acquire(self, need: VmNeed) -> VmLease:
        need = msgspec.structs.replace(need, job_id="")
        for lease in self.idle:
            if lease.need == need and not lease.lost.done():
                self.idle.remove(lease)
                return lease
        template = await self.template(need)
        lease = await self.clone(template)
        lease.need = need
        return lease

    async def clone(self, template: Template) -> DirectLease:
        machine_id = f"vm-{os.getpid()}-{next(_numbers)}"
        directory = self.directory / machine_id
        directory.mkdir(mode=0o700)
        machine = await self.hypervisor.clone(machine_id, template, directory)
        try:
            link = await connect(machine.open_agent)
            await link.reseed(fresh_identity(machine_id))
        except BaseException:
            await machine.destroy()
            raise
        lease = DirectLease(machine, link)
        self.leases.add(lease)
        return lease

    async def release(self, lease: VmLease, *, broken: bool) -> None:
        assert isinstance(lease, DirectLease)
        keeps = lease.need is not None and lease.need.mode is VmMode.SERVICE
        if keeps and not broken and not self._is_stopped:
            self.idle.append(lease)
        elif lease in self.leases:
            await self.end(lease)

    async def end(self, lease: DirectLease) -> None:
        self.leases.discard(lease)
        await lease.link.close()
        await lease.machine.destroy()
        await lease.watch

    async def stop(self) -> None:
        """End every machine and leave nothing but the cache. Harmless at any time."""
        if self._is_stopped:
            return
        self._is_stopped = True
        for lease in list(self.leases):
            await self.end(lease)
        self.idle.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def template(self, need: VmNeed) -> Template:
        """Return the template of such machines, kept between runs of the tests."""
        key = (need.memory_mb, need.vcpus, need.network)
        async with self._making:
            if key not in self.templates:
                image = await asyncio.to_thread(default_image)
                shape = MachineShape(image=image, memory_mb=need.memory_mb, vcpus=need.vcpus, network=need.network)
                with await asyncio.to_thread(_only_one):
                    self.templates[key] = await self._find_or_make(shape)
        return self.templates[key]

    async def _find_or_make(self, shape: MachineShape) -> Template:
        templates = CACHE / "templates"
        templates.mkdir(parents=True, exist_ok=True)
        found = await asyncio.to_thread(self.hypervisor.find_template, shape, templates)
        if found is not None:
            return found
        directory = self.directory / f"template-{next(_numbers)}"
        directory.mkdir(mode=0o700)
        machine = await self.hypervisor.boot(directory.name, shape, directory)
        try:
            link = await connect(machine.open_agent, BOOT_SECONDS)
            await link.close()
            return await self.hypervisor.save(machine, self.hypervisor.template_path(shape, templates))
        except MachineLost:
            await machine.destroy()
            raise


@functools.cache
def kept() -> tuple[QemuHypervisor, dict[tuple[int, int, bool], Template]]:
    """Return what all keepers of this process share: to check a template's files takes a second."""
    return QemuHypervisor(CACHE), {}


@functools.cache
def default_image() -> GuestImage:
    """Return the image of now, built if need be: by one process at a time."""
    with _only_one():
        return ensure_default_image(ImageStore(CACHE / "images"), lambda _: None)


@contextmanager
def _only_one() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "tests.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

"""From a shape to the template that machines of this shape are cloned from, made when it is first needed."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from blixard.domain.ids import new_id
from blixard.errors import Conflict, NotSupportedHere
from blixard.storage.locks import FileLock
from blixard.vm.hypervisor.contract import Hypervisor, Machine, MachineShape, Template
from blixard.vm.image.guest_image import GuestImage
from blixard.vm.policy import VmShape

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from blixard.vm.agent_link import AgentLink

LOCK_PAUSE = 0.2
"""Between two looks whether another process has made the template that both need."""
logger = logging.getLogger(__name__)
Connect = Callable[[Machine, float], Awaitable["AgentLink"]]
Spawn = Callable[[Coroutine[Any, Any, Any], str], asyncio.Task[Any]]  # Any: tasks of all results


class ImageSource(Protocol):
    async def open(self, name: str) -> GuestImage:
        """Return the image of this name or digest, the default one built if it is not there. Raises ``ImageNotFound``."""


class TemplateShelf:
    """One template per shape and image. Those who need the same at the same time wait for the one that is being made, also
    across processes. What was being made when a process died has no name and is never used.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        images: ImageSource,
        directory: Path,
        runtime: Path,
        *,
        connect: Connect,
        spawn: Spawn,
        start_timeout: float,
    ) -> None:
        self._hypervisor = hypervisor
        self._images = images
        self._directory = directory
        self._runtime = runtime
        self._connect = connect
        self._spawn = spawn
        self._start_timeout = start_timeout
        self._made: dict[tuple[VmShape, str], asyncio.Future[Template]] = {}

    async def get(self, shape: VmShape) -> Template:
        """Return the template, made if need be. Cancelling the call leaves the making to others.

        Raises ``ImageNotFound``, ``NotSupportedHere``, ``NotEnoughMemory``, ``MachineLost``.
        """
        image = await self._images.open(shape.image)
        key = (shape, image.digest)
        making = self._made.get(key)
        if making is None or (making.done() and not _has_worked(making)):
            making = self._made[key] = asyncio.get_running_loop().create_future()
            self._spawn(self._fill(making, shape, image), f"template of {shape.image}")
        return await asyncio.shield(making)

    def forget(self, template: Template) -> None:
        """Look at the files anew next time: a clone of it did not start."""
        for key, making in list(self._made.items()):
            if _has_worked(making) and making.result() is template:
                del self._made[key]

    async def _fill(self, making: asyncio.Future[Template], shape: VmShape, image: GuestImage) -> None:
        """Resolve the future; raise nothing, since whoever owns this task is not who waits for the template."""
        try:
            making.set_result(await self._find_or_make(shape, image))
        except Exception as error:  # the edge of one template: those who wait for it get the error
            making.set_exception(error)
            making.exception()  # heard: perhaps nobody waits any more
        finally:
            if not making.done():
                making.cancel()

    async def _find_or_make(self, shape: VmShape, image: GuestImage) -> Template:
        info = await asyncio.to_thread(self._hypervisor.info)
        if info.accelerator is None:
            raise NotSupportedHere(f"no virtual machine can run here: {info.missing}", hint="see `blixard doctor`")
        machine = MachineShape(image=image, memory_mb=shape.memory_mb, vcpus=shape.vcpus, network=shape.network)
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = await asyncio.to_thread(self._hypervisor.find_template, machine, self._directory)
        if found is not None:
            return found
        async with self._only_one(machine):
            found = await asyncio.to_thread(self._hypervisor.find_template, machine, self._directory)
            return found or await self._make(machine)

    async def _make(self, shape: MachineShape) -> Template:
        logger.info("booting image %s with %d MB to make its template", shape.image.name, shape.memory_mb)
        machine_id = new_id("template")
        directory = self._runtime / machine_id
        directory.mkdir(mode=0o700)
        try:
            machine = await self._hypervisor.boot(machine_id, shape, directory)
            try:
                link = await self._connect(machine, self._start_timeout)
                await link.close()
                return await self._hypervisor.save(machine, self._hypervisor.template_path(shape, self._directory))
            finally:
                await machine.destroy()
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @asynccontextmanager
    async def _only_one(self, shape: MachineShape) -> AsyncIterator[None]:
        name = self._hypervisor.template_path(shape, self._directory).name
        lock = await _acquire(self._directory / f"{name}.lock")
        try:
            yield
        finally:
            lock.release()  # the file stays: whoever waits for it has it open already


def _has_worked(making: asyncio.Future[Template]) -> bool:
    return making.done() and not making.cancelled() and making.exception() is None


async def _acquire(path: Path) -> FileLock:
    """Wait for a lock of another process, which ends with it at the latest."""
    while True:
        try:
            return await asyncio.to_thread(FileLock.acquire, path)
        except Conflict:
            await asyncio.sleep(LOCK_PAUSE)

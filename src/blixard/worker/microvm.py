"""A worker's backends for virtual machines: one that owns its manager, and one for hosts without."""

from __future__ import annotations

import asyncio
import logging

from blixard.backends.contract import BackendInfo, BackendSettings, Execution, ExecutionObserver, StopReason
from blixard.backends.microvm import MicroVmBackend
from blixard.backends.outcomes import refused
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome
from blixard.domain.payload import Runtime
from blixard.domain.requirements import Isolation
from blixard.errors import BlixardError
from blixard.vm.manager import VmManager

VM_ISOLATIONS = (Isolation.STANDARD, Isolation.MAXIMUM)
logger = logging.getLogger(__name__)


class OwnedVmBackend(MicroVmBackend):
    """Starts and ends its manager with itself. The machines that are to be there from the start come up beside the first jobs."""

    def __init__(self, settings: BackendSettings, manager: VmManager) -> None:
        super().__init__(settings, manager)
        self.manager = manager
        self._starter: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.manager.start()
        await super().start()
        if self._starter is None and self.manager.config.service_vms:
            self._starter = asyncio.create_task(self._start_service_vms(), name="start service machines")

    async def stop(self) -> None:
        if self._starter is not None:
            self._starter.cancel()
            await asyncio.gather(self._starter, return_exceptions=True)
        await super().stop()
        await self.manager.shutdown()

    async def _start_service_vms(self) -> None:
        try:
            await self.manager.start_service_vms()
        except BlixardError as error:  # jobs that want one try again, and say so
            logger.warning("the service machines did not start: %s", error)


class AbsentVmBackend:
    """An ``ExecutionBackend`` that runs nothing and says why."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def info(self) -> BackendInfo:
        return BackendInfo(
            name="microvm",
            runtimes=frozenset(Runtime),
            isolations=frozenset(),
            missing=dict.fromkeys(VM_ISOLATIONS, self._reason),
        )

    async def start(self) -> None:
        """There is nothing to start: no job comes here."""

    async def stop(self) -> None:
        """There is nothing to stop."""

    async def execute(self, execution: Execution, observer: ExecutionObserver) -> Outcome:
        del execution, observer
        return refused("NotSupportedHere", f"this worker has no virtual machines: {self._reason}")

    def interrupt(self, ref: AttemptRef, reason: StopReason) -> None:
        """Nothing runs that could be interrupted."""

"""A worker: one session after the other on the same backends, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from blixard.backends.contract import BackendSettings, ExecutionBackend
from blixard.domain.ids import new_id
from blixard.domain.requirements import Isolation, WorkerType
from blixard.domain.worker import Registration
from blixard.errors import NotSupportedHere, VmUnavailable
from blixard.protocol.workers import RegisterReply
from blixard.services.clock import Clock
from blixard.storage.locks import boot_id
from blixard.worker.backoff import Backoff
from blixard.worker.gateway import WorkerGateway
from blixard.worker.home import WorkerHome
from blixard.worker.local_files import LocalFiles
from blixard.worker.options import WorkerOptions
from blixard.worker.session import BackendTable, Session, SessionEnd
from blixard.worker.sync_link import REPEATABLE

if TYPE_CHECKING:
    from blixard.vm.manager import VmManager

logger = logging.getLogger(__name__)


class Worker:
    """Claims jobs that ``backends`` can run, and runs them. All methods belong on one event loop.

    The offer's capabilities are filled in from what the backends really can do on this host. ``stop`` and ``kill`` are
    allowed before ``run``, during its start, and twice.
    """

    def __init__(
        self, gateway: WorkerGateway, backends: BackendTable, options: WorkerOptions, clock: Clock, home: WorkerHome
    ) -> None:
        self.ready = asyncio.Event()
        """Set while a session is registered."""
        self._gateway = gateway
        self._backends = {place: b for place, b in backends.items() if place[1] in b.info().isolations}
        capabilities = _capabilities(self._backends)
        if not capabilities:
            raise NotSupportedHere(_nothing(backends), hint="`blixard doctor` says what this host lacks")
        self.options = msgspec.structs.replace(
            options, offer=msgspec.structs.replace(options.offer, capabilities=capabilities)
        )
        self._clock = clock
        self._home = home
        self._files = LocalFiles(gateway, home.directory / "files")
        self._stopping = asyncio.Event()
        self._killed = False
        self._session: Session | None = None

    async def run(self) -> None:
        """Work until stopped. Raises ``Unauthenticated``, ``Forbidden`` and the like when the server refuses this worker.

        On return nothing of any job is left, and everything claimed was reported, given back, or lost to the server's absence.
        """
        started: list[ExecutionBackend] = []
        try:
            for backend in dict.fromkeys(self._backends.values()):
                started.append(backend)
                await backend.start()
            while not self._stopping.is_set():
                await self._live()
        finally:
            await self._files.close()
            await asyncio.gather(*(backend.stop() for backend in started))

    def stop(self) -> None:
        """Give back what has not started, finish the rest within the grace time, then end it."""
        self._stopping.set()
        if self._session is not None:
            self._session.stop()

    def kill(self) -> None:
        """End everything at once."""
        self._killed = True
        self.stop()
        if self._session is not None:
            self._session.kill()

    async def _live(self) -> None:
        session_id = new_id("session")
        self._home.link(session_id)
        try:
            reply = await self._register(session_id)
            if reply is not None:
                await self._run_session(reply)
        finally:
            self._home.unlink(session_id)

    async def _run_session(self, reply: RegisterReply) -> None:
        session = Session(
            session=reply.session,
            lease_seconds=reply.lease_seconds,
            gateway=self._gateway,
            backends=self._backends,
            options=self.options,
            clock=self._clock,
            files=self._files,
        )
        self._session = session
        if self._stopping.is_set():
            session.stop()
        if self._killed:
            session.kill()
        self.ready.set()
        logger.info("session %s of worker %s is open", session.id, self.options.name)
        try:
            end = await session.run()
        finally:
            self.ready.clear()
            self._session = None
        if end is SessionEnd.CLOSED and session.error is not None:
            raise session.error

    async def _register(self, session_id: str) -> RegisterReply | None:
        """Register, repeating until answered; None when stopped before."""
        registration = Registration(
            name=self.options.name,
            offer=self.options.offer,
            host=boot_id() if self._home.is_visible else "",
            pid=os.getpid(),
            interpreter=self.options.interpreter,
            session=session_id,
        )
        backoff = Backoff(self._clock)
        while not self._stopping.is_set():
            try:
                return await self._unless_stopped(registration)
            except REPEATABLE as error:
                logger.warning("cannot register, trying again: %s", error)
            await backoff.pause()
        return None

    async def _unless_stopped(self, registration: Registration) -> RegisterReply | None:
        call = asyncio.create_task(self._gateway.register(registration), name="register")
        stopping = asyncio.create_task(self._stopping.wait(), name="wait for stop")
        try:
            await asyncio.wait([call, stopping], return_when=asyncio.FIRST_COMPLETED)
            return call.result() if call.done() else None
        finally:
            call.cancel()
            stopping.cancel()
            await asyncio.gather(call, stopping, return_exceptions=True)


def _capabilities(backends: BackendTable) -> dict[WorkerType, tuple[Isolation, ...]]:
    found: dict[WorkerType, list[Isolation]] = {}
    for type_, isolation in backends:
        found.setdefault(type_, []).append(isolation)
    return {type_: tuple(isolations) for type_, isolations in found.items()}


def _nothing(backends: BackendTable) -> str:
    reasons = {
        f"{type_} at isolation {isolation}: {backend.info().missing.get(isolation, 'not supported')}"
        for (type_, isolation), backend in backends.items()
    }
    return "this host can run no jobs: " + "; ".join(sorted(reasons))


class ProcessWorker(Worker):
    """Runs functions, scripts and commands: ``minimal`` in plain processes, ``standard`` in namespace sandboxes."""

    def __init__(
        self,
        gateway: WorkerGateway,
        *,
        minimal: ExecutionBackend,
        standard: ExecutionBackend,
        options: WorkerOptions,
        clock: Clock,
        home: WorkerHome,
    ) -> None:
        super().__init__(gateway, process_backends(minimal, standard), options, clock, home)


class WasmWorker(Worker):
    """Runs WebAssembly modules: ``minimal`` in a shared executor process, ``standard`` each in its own sandboxed process."""

    def __init__(
        self, gateway: WorkerGateway, *, wasm: ExecutionBackend, options: WorkerOptions, clock: Clock, home: WorkerHome
    ) -> None:
        super().__init__(gateway, wasm_backends(wasm), options, clock, home)


@dataclass(frozen=True)
class MicroVmWorkerConfig:
    """``make_vm_manager`` is called only by a worker that stands alone."""

    gateway: WorkerGateway
    home: WorkerHome
    options: WorkerOptions
    clock: Clock
    settings: BackendSettings
    make_vm_manager: Callable[[], VmManager]


class MicroVmWorker(Worker):
    """Runs jobs in virtual machines: ``maximum`` each in a fresh one, ``standard`` in service machines of its namespace."""

    def __init__(
        self,
        gateway: WorkerGateway,
        *,
        vm: ExecutionBackend,
        options: WorkerOptions,
        clock: Clock,
        home: WorkerHome,
        vm_manager: VmManager | None = None,
    ) -> None:
        super().__init__(gateway, vm_backends(vm), options, clock, home)
        self.vm_manager = vm_manager

    @classmethod
    def with_vm_manager(cls, config: MicroVmWorkerConfig, vm_manager: VmManager) -> MicroVmWorker:
        """Return a worker on a manager that somebody else starts and stops."""
        from blixard.backends.microvm import MicroVmBackend

        return cls._make(config, MicroVmBackend(config.settings, vm_manager), vm_manager)

    @classmethod
    def standalone(cls, config: MicroVmWorkerConfig) -> MicroVmWorker:
        """Return a worker with a manager of its own, started and stopped with it; its service machines come up by themselves."""
        from blixard.worker.microvm import OwnedVmBackend

        manager = config.make_vm_manager()
        return cls._make(config, OwnedVmBackend(config.settings, manager), manager)

    @classmethod
    def _make(cls, config: MicroVmWorkerConfig, vm: ExecutionBackend, vm_manager: VmManager) -> MicroVmWorker:
        return cls(
            config.gateway,
            vm=vm,
            options=config.options,
            clock=config.clock,
            home=config.home,
            vm_manager=vm_manager,
        )

    async def start_service_vms(self) -> list[str]:
        """Start the service machines that the settings ask for; return their ids when all are ready. Raises ``VmUnavailable``."""
        if self.vm_manager is None:
            raise VmUnavailable
        return await self.vm_manager.start_service_vms()


def vm_backends(vm: ExecutionBackend) -> BackendTable:
    return {(WorkerType.MICROVM, isolation): vm for isolation in (Isolation.STANDARD, Isolation.MAXIMUM)}


def process_backends(minimal: ExecutionBackend, standard: ExecutionBackend) -> BackendTable:
    return {(WorkerType.PROCESS, Isolation.MINIMAL): minimal, (WorkerType.PROCESS, Isolation.STANDARD): standard}


def wasm_backends(wasm: ExecutionBackend) -> BackendTable:
    return {(WorkerType.WASM, isolation): wasm for isolation in (Isolation.MINIMAL, Isolation.STANDARD)}

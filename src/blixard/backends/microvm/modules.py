"""Wasm jobs of a virtual machine: compiled on the host for any processor of its kind, run in the guest by the same runner."""

from __future__ import annotations

import asyncio

from blixard.backends.contract import BackendSettings, Execution
from blixard.backends.microvm.plan import Grant, JobPlan, complete_plan, memory_of
from blixard.backends.outcomes import ended_early, refused
from blixard.backends.runner_backend import Refused
from blixard.backends.wasm.compilation import ModuleCompiler
from blixard.backends.wasm.confinement import probe
from blixard.backends.wasm.host import ZygoteHost, ZygoteLost
from blixard.backends.wasm.module_cache import CompiledModule, ModuleCache
from blixard.backends.wasm.preparation import STDIN, environment_of, lay_out_sandbox
from blixard.backends.wasm.signature import JobRefused, decode_values, decode_words, find_function, find_start, refuse
from blixard.backends.wasm.wire import RunRequest, encode
from blixard.domain.limits import MIB
from blixard.domain.outcome import OutcomeKind
from blixard.domain.payload import WasmPayload
from blixard.domain.requirements import Isolation
from blixard.errors import NotSupportedHere
from blixard.vm.agent_link import JobOrder

ARTEFACT_PLACE = "/artefact"
ALL_OUTPUT = 1 << 40
"""The guest's agent keeps to the cap, and counts what is over."""
RUNTIME_MEMORY_MB = 64
"""Of the Wasm runtime and the interpreter around it."""


class ModuleSource:
    """Makes plans of Wasm jobs; the compiler's process starts with the first one."""

    def __init__(self, settings: BackendSettings) -> None:
        self._settings = settings
        self._host: ZygoteHost | None = None
        self._cache: ModuleCache | None = None
        self._opening = asyncio.Lock()

    async def stop(self) -> None:
        """End compilers. Harmless at any time."""
        if self._cache is not None:
            await self._cache.stop()
        if self._host is not None:
            await self._host.stop()
        self._cache = self._host = None

    async def plan(self, execution: Execution, payload: WasmPayload) -> JobPlan:
        """Return how to run the module. Raises ``Refused``."""
        try:
            module = await self._compile(execution, payload)
            return await asyncio.to_thread(self._plan, execution, payload, module)
        except JobRefused as refusal:
            error = refusal.error
            raise Refused(refused(error.type, error.message, hint=error.hint)) from refusal
        except (ZygoteLost, OSError) as error:
            raise Refused(ended_early(OutcomeKind.LOST, str(error))) from error

    async def _compile(self, execution: Execution, payload: WasmPayload) -> CompiledModule:
        path = execution.blobs.get(payload.module)
        if path is None or not path.is_file():
            raise refuse("ModuleMissing", f"the module (blob {payload.module}) is not on this worker")
        cache = await self._open()
        return cache.find(path) or await cache.get(path)

    async def _open(self) -> ModuleCache:
        async with self._opening:
            if self._cache is not None:
                return self._cache
            settings = self._settings
            fuel = settings.wasm_fuel is not None
            can_isolate = Isolation.STANDARD in (await asyncio.to_thread(probe)).isolations
            self._host = ZygoteHost(fuel=fuel, lock_fd=settings.lock_fd, portable=True)
            compiler = ModuleCompiler(self._host, can_isolate=lambda: can_isolate)
            directory = settings.wasm_cache or settings.scratch / "microvm-wasm"
            cache = ModuleCache(
                directory, compiler.compile, fuel=fuel, max_bytes=settings.wasm_cache_bytes, portable=True
            )
            try:
                cache.open()
            except NotSupportedHere as error:
                raise Refused(refused("NotSupportedHere", error.message, hint=error.hint)) from error
            self._cache = cache
            return cache

    def _plan(self, execution: Execution, payload: WasmPayload, module: CompiledModule) -> JobPlan:
        """Blocks on the disk."""
        argv: tuple[str, ...] = (payload.name,)
        values: tuple[int | float, ...] = ()
        if payload.function is None:
            find_start(module.functions)
            argv = (payload.name, *decode_words(execution.arguments))
        else:
            kind = find_function(module.functions, payload.function)
            values = decode_values(execution.arguments, payload.function, kind)
        room, preopens = lay_out_sandbox(execution, self._settings)
        grants = [Grant(bind.source, bind.target, bind.writable) for bind in room.binds]
        request = RunRequest(
            number=1,
            key=module.key,
            artefact=ARTEFACT_PLACE,
            argv=argv,
            environment=environment_of(execution),
            stdin=None if execution.stdin is None else STDIN,
            preopens=preopens,
            function=payload.function,
            values=values,
            memory_bytes=memory_of(execution, self._settings) * MIB,
            fuel=self._settings.wasm_fuel,
            max_output_bytes=ALL_OUTPUT,
        )
        order = JobOrder(entry="wasm", max_output=execution.spec.max_output_bytes)
        artefact = Grant(str(module.artefact), ARTEFACT_PLACE)
        packet = encode(request)
        return complete_plan(
            execution, self._settings, order, [], [artefact, *grants], packet, runtime_mb=RUNTIME_MEMORY_MB
        )

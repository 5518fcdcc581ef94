"""``WasmBackend``: runs WASI commands and exported functions in executors of its own. See DESIGN.md."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import deque
from pathlib import Path
from typing import TypeVar

import msgspec

from blixard.backends.contract import (
    BackendInfo,
    BackendSettings,
    Execution,
    ExecutionObserver,
    StopReason,
    Stream,
)
from blixard.backends.sandbox.plan import SandboxPlan
from blixard.backends.slots import Slots
from blixard.backends.wasm.compilation import ModuleCompiler, see_off
from blixard.backends.wasm.confinement import probe
from blixard.backends.wasm.host import Child, ZygoteHost, ZygoteLost
from blixard.backends.wasm.module_cache import CompiledModule, ModuleCache
from blixard.backends.wasm.preparation import (
    STDIN,
    clear,
    environment_of,
    is_plain,
    lay_out_sandbox,
    lay_out_shared,
    work_preopens,
)
from blixard.backends.wasm.signature import (
    JobRefused,
    decode_values,
    decode_words,
    find_function,
    find_start,
    refuse,
)
from blixard.backends.wasm.verdict import crash, judge, lost, now, refused, time_out
from blixard.backends.wasm.wire import (
    Ending,
    Limits,
    RunReport,
    RunRequest,
    Tag,
    decode_report,
)
from blixard.domain.lease import AttemptRef
from blixard.domain.limits import MIB
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import WasmPayload
from blixard.domain.requirements import Isolation
from blixard.errors import NotSupportedHere

_One = TypeVar("_One")
_Other = TypeVar("_Other")

MAX_RUNS_PER_EXECUTOR = 5_000
"""Then a fresh one takes over, so that no leak of the runtime's can grow for ever."""
INTERRUPT_SECONDS = 0.05
"""How long a guest may take to notice the epoch before its executor is killed: it may sit in a host call."""
STARTED_AFTER_SECONDS = 0.005
MAX_SETUP_SECONDS = 60.0
"""For a sandbox to be made; only then does the job's own timeout begin."""


class _Attempt:
    """One call of ``execute``. ``stopped`` is done as soon as somebody has asked for its end."""

    def __init__(self, execution: Execution, observer: ExecutionObserver, loop: asyncio.AbstractEventLoop) -> None:
        self.execution = execution
        self.observer = observer
        self.stopped: asyncio.Future[StopReason] = loop.create_future()
        self.turn: asyncio.Future[None] | None = None
        self.run: _Run | None = None
        self.began = False
        self.started_at: int | None = None

    def stop(self, reason: StopReason) -> None:
        if reason is StopReason.RELEASE and self.began:
            return
        if not self.stopped.done():
            self.stopped.set_result(reason)
        if self.run is not None:
            self.run.end_early()


class _Run:
    """One request on its way through one executor. ``report`` is done when the guest has ended, None if its executor died."""

    def __init__(self, attempt: _Attempt, child: Child, request: RunRequest, loop: asyncio.AbstractEventLoop) -> None:
        self.report: asyncio.Future[RunReport | None] = loop.create_future()
        self.timed_out = False
        self.output_bytes = 0
        self._attempt = attempt
        self._child = child
        self._request = request
        self._loop = loop
        self._cap = request.max_output_bytes
        self._timers: list[asyncio.TimerHandle] = []
        self._setup: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        self._child.gone.add_done_callback(self._child_gone)
        self._child.request(self._request, self._take)
        if not self._request.announce:
            self._timers.append(self._loop.call_later(STARTED_AFTER_SECONDS, self._tell_started))
            self._watch_time()
        else:
            self._setup = self._loop.call_later(MAX_SETUP_SECONDS, self._child.kill)
            self._timers.append(self._setup)

    def finish(self) -> None:
        self._child.gone.remove_done_callback(self._child_gone)
        self._child.on_frame = None
        for timer in self._timers:
            timer.cancel()

    def end_early(self) -> None:
        """Stop the guest by the engine's epoch; if it does not answer, kill its process."""
        self._child.interrupt(self._request.number)
        self._timers.append(self._loop.call_later(INTERRUPT_SECONDS, self._child.kill))

    def _watch_time(self) -> None:
        self._attempt.started_at = now()
        if (timeout := self._attempt.execution.spec.timeout) is not None:
            self._timers.append(self._loop.call_later(timeout, self._time_out))

    def _time_out(self) -> None:
        self.timed_out = True
        self.end_early()

    def _tell_started(self) -> None:
        assert self._attempt.started_at is not None
        self._attempt.observer.started(self._attempt.started_at)

    def _child_gone(self, _: asyncio.Future[int]) -> None:
        if not self.report.done():
            self.report.set_result(None)

    def _take(self, tag: Tag, body: bytes) -> None:
        if tag is Tag.REPORT:
            report = decode_report(body)
            assert isinstance(report, RunReport)
            if not self.report.done():
                self.report.set_result(report)
        elif tag is Tag.STARTED:
            if self._setup is not None:
                self._setup.cancel()
            self._watch_time()
            self._tell_started()
        else:
            self._pass_output(Stream.STDOUT if tag is Tag.STDOUT else Stream.STDERR, body)

    def _pass_output(self, stream: Stream, data: bytes) -> None:
        # The executor keeps to the cap; should it be in a guest's hands, this does.
        data = data[: self._cap - self.output_bytes]
        if data:
            self.output_bytes += len(data)
            self._attempt.observer.output(now(), stream, data)


class WasmBackend:
    """Implements ``ExecutionBackend`` for WebAssembly.

    Isolation minimal: executors are reused. Standard: every job has a process in namespaces of its own, used once. What a job
    survives: nothing; a worker that dies takes its executors with it (the kernel sees to it).
    """

    def __init__(self, settings: BackendSettings) -> None:
        self._settings = settings
        self._home = settings.scratch / "wasm"
        self._host = ZygoteHost(fuel=settings.wasm_fuel is not None, lock_fd=settings.lock_fd)
        cache = settings.wasm_cache or self._home / "cache"
        compiler = ModuleCompiler(self._host, self._can_isolate)
        self._cache = ModuleCache(
            cache, compiler.compile, fuel=settings.wasm_fuel is not None, max_bytes=settings.wasm_cache_bytes
        )
        self._attempts: dict[AttemptRef, _Attempt] = {}
        self._queue: deque[_Attempt] = deque()
        self._slots = settings.shared_slots or Slots(settings.slots)
        self._slots.join(self)
        self._busy = 0
        self._idle: list[Child] = []
        self._numbers = 0
        self._ready = False
        self._stopping = False
        self._info: BackendInfo | None = None
        self._idle_attempts: asyncio.Event | None = None

    @property
    def cache(self) -> ModuleCache:
        return self._cache

    @property
    def host(self) -> ZygoteHost:
        return self._host

    def info(self) -> BackendInfo:
        if self._info is None:
            self._info = probe()
        return self._info

    async def start(self) -> None:
        if self._ready:
            return
        self._stopping = False
        if os.name != "posix" or not hasattr(os, "pidfd_open"):
            raise NotSupportedHere("Wasm jobs need Linux", hint="run the worker on a Linux machine")
        await asyncio.to_thread(self.info)  # the first job should not pay for the look at the host
        if self._stopping:
            return
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._cache.open()
        try:
            self._host.start()
        except ZygoteLost as error:
            raise NotSupportedHere(str(error)) from error
        self._ready = True

    async def stop(self) -> None:
        self._stopping = True
        for attempt in list(self._attempts.values()):
            attempt.stop(StopReason.KILL)
        await self._cache.stop()
        while self._attempts:
            self._idle_attempts = asyncio.Event()
            await self._idle_attempts.wait()
        await self._host.stop()
        self._idle.clear()
        self._ready = False
        if self._home.exists():
            await asyncio.to_thread(clear, self._home)

    def interrupt(self, ref: AttemptRef, reason: StopReason) -> None:
        if (attempt := self._attempts.get(ref)) is not None:
            attempt.stop(reason)

    async def execute(self, execution: Execution, observer: ExecutionObserver) -> Outcome:
        attempt = _Attempt(execution, observer, asyncio.get_running_loop())
        self._attempts[execution.ref] = attempt
        try:
            if self._stopping or not self._ready:
                return msgspec.structs.replace(lost("the Wasm backend is not running"), finished_at=now())
            return await self._take_turn(attempt)
        finally:
            del self._attempts[execution.ref]
            if not self._attempts and self._idle_attempts is not None:
                self._idle_attempts.set()

    async def _take_turn(self, attempt: _Attempt) -> Outcome:
        if not await self._wait_for_slot(attempt):
            return self._stopped_outcome(attempt)
        try:
            return await self._run_attempt(attempt)
        except JobRefused as refusal:
            return msgspec.structs.replace(refused(refusal.error), finished_at=now())
        except (ZygoteLost, OSError) as error:
            # A full disk, no processes left: the machine's trouble, not the job's.
            return msgspec.structs.replace(lost(str(error)), finished_at=now())
        finally:
            self._release_slot()

    async def _wait_for_slot(self, attempt: _Attempt) -> bool:
        """Wait for this attempt's turn. False if it was stopped before; then it has no slot."""
        if not self._queue and self._slots.may_take(self):
            self._busy += 1
            return True
        attempt.turn = asyncio.get_running_loop().create_future()
        self._queue.append(attempt)
        try:
            await _wait_first(attempt.turn, attempt.stopped)
        except asyncio.CancelledError:
            self._leave_queue(attempt)
            raise
        if attempt.stopped.done():
            self._leave_queue(attempt)
            return False
        return True

    def _leave_queue(self, attempt: _Attempt) -> None:
        assert attempt.turn is not None
        if attempt.turn.done():
            self._release_slot()
        else:
            self._queue.remove(attempt)

    def _release_slot(self) -> None:
        self._busy -= 1
        self.slot_is_free()
        self._slots.freed()

    def busy_slots(self) -> int:
        return self._busy

    def wants_slot(self) -> bool:
        return bool(self._queue)

    def slot_is_free(self) -> None:
        """Let waiting attempts have their turn."""
        while self._queue and self._slots.may_take(self):
            self._busy += 1
            turn = self._queue.popleft().turn
            assert turn is not None
            turn.set_result(None)

    async def _run_attempt(self, attempt: _Attempt) -> Outcome:
        payload = attempt.execution.spec.payload
        if not isinstance(payload, WasmPayload):
            raise refuse("NotSupportedHere", f"a Wasm worker cannot run a {payload.__class__.__name__}")
        isolation = attempt.execution.spec.requirements.isolation
        if isolation not in self.info().isolations:
            raise refuse(
                "NotSupportedHere", self.info().missing.get(isolation, f"no {isolation} isolation for Wasm here")
            )
        outcome = await self._run_once(attempt, payload)
        # An artefact may be evicted, or spoiled, between the check and its use: then it is made again, once.
        return outcome or await self._run_once(attempt, payload) or lost("the compiled module cannot be used")

    async def _run_once(self, attempt: _Attempt, payload: WasmPayload) -> Outcome | None:
        """Return how the job ended; None if its artefact could not be used and nothing has run."""
        module = await self._find_module(attempt, payload)
        if module is None:
            return self._stopped_outcome(attempt)
        private = Path(tempfile.mkdtemp(dir=self._home, prefix="job-"))
        try:
            request = await self._make_request(attempt, payload, module, private)
            return await self._run_request(attempt, module, request)
        finally:
            await _remove(private)

    async def _find_module(self, attempt: _Attempt, payload: WasmPayload) -> CompiledModule | None:
        """Return the compiled module; None if the attempt was stopped while it compiled."""
        path = attempt.execution.blobs.get(payload.module)
        if path is None or not path.is_file():
            raise refuse("ModuleMissing", f"the module (blob {payload.module}) is not on this worker")
        if (found := self._cache.find(path)) is not None:
            return found
        making = asyncio.ensure_future(self._cache.get(path))
        try:
            await _wait_first(making, attempt.stopped)
            return making.result() if making.done() and not attempt.stopped.done() else None
        finally:
            if not making.done():
                making.cancel()
            elif not making.cancelled():
                making.exception()  # heard: nobody else will ask

    async def _make_request(
        self, attempt: _Attempt, payload: WasmPayload, module: CompiledModule, private: Path
    ) -> RunRequest:
        execution = attempt.execution
        argv: tuple[str, ...] = (payload.name,)
        values: tuple[int | float, ...] = ()
        if payload.function is None:
            find_start(module.functions)
            argv = (payload.name, *decode_words(execution.arguments))
        else:
            kind = find_function(module.functions, payload.function)
            values = decode_values(execution.arguments, payload.function, kind)
        room: SandboxPlan | None = None
        stdin = None if execution.stdin is None else str(execution.stdin)
        if execution.spec.requirements.isolation is Isolation.STANDARD:
            room, preopens = lay_out_sandbox(execution, self._settings)
            stdin = None if stdin is None else STDIN
        elif is_plain(execution):
            preopens = work_preopens(private)
        else:
            preopens = await asyncio.to_thread(lay_out_shared, execution, private)
        self._numbers += 1
        return RunRequest(
            number=self._numbers,
            key=module.key,
            artefact=str(module.artefact),
            argv=argv,
            environment=environment_of(execution),
            stdin=stdin,
            preopens=preopens,
            function=payload.function,
            values=values,
            memory_bytes=self._memory_of(execution),
            fuel=self._settings.wasm_fuel,
            max_output_bytes=execution.spec.max_output_bytes,
            room=room,
        )

    async def _run_request(self, attempt: _Attempt, module: CompiledModule, request: RunRequest) -> Outcome | None:
        child = self._hire(request)
        if not child.runs:  # it must be forked first, perhaps from a zygote that must start: the job has not begun
            request = msgspec.structs.replace(request, announce=True)
        loop = asyncio.get_running_loop()
        attempt.run = run = _Run(attempt, child, request, loop)
        attempt.began = True
        healthy = False
        try:
            run.begin()
            if attempt.stopped.done():
                run.end_early()
            report = await run.report
            healthy = report is not None
        finally:
            run.finish()
            attempt.run = None
            await self._retire(child, reuse=healthy and request.room is None)
        if report is not None and report.error == "ArtefactUnusable":
            self._cache.forget(module)
            return None
        return self._conclude(attempt, run, report, child)

    def _hire(self, request: RunRequest) -> Child:
        if request.room is None and self._idle:
            position = next((n for n, child in enumerate(self._idle) if request.key in child.loaded), -1)
            child = self._idle.pop(position)
            if not child.gone.done():
                child.loaded.add(request.key)
                return child
        child = self._host.spawn(self._run_limits())
        child.loaded.add(request.key)
        return child

    def _run_limits(self) -> Limits:
        return Limits(open_files=self._settings.open_files, file_bytes=self._settings.disk_mb * MIB)

    async def _retire(self, child: Child, *, reuse: bool) -> None:
        child.runs += 1
        if reuse and not child.gone.done() and child.runs < MAX_RUNS_PER_EXECUTOR and not self._stopping:
            self._idle.append(child)
            return
        child.kill()
        await see_off(child)

    def _conclude(self, attempt: _Attempt, run: _Run, report: RunReport | None, child: Child) -> Outcome:
        spec = attempt.execution.spec
        ended_by_us = report is None or report.ending is Ending.INTERRUPTED
        if attempt.stopped.done() and ended_by_us:
            return self._stopped_outcome(attempt, run)
        if run.timed_out and ended_by_us:
            assert spec.timeout is not None
            outcome = time_out(spec.timeout, report)
        elif report is None:
            outcome = crash(child.gone.result())
        else:
            is_function = isinstance(spec.payload, WasmPayload) and spec.payload.function is not None
            outcome = judge(report, is_function=is_function, memory_limit=self._memory_of(attempt.execution))
        written = max(run.output_bytes, report.output_bytes if report else 0)
        return msgspec.structs.replace(
            outcome,
            started_at=attempt.started_at,
            finished_at=now(),
            output_bytes=written,
            output_truncated=written > run.output_bytes,
        )

    def _memory_of(self, execution: Execution) -> int:
        return (execution.spec.requirements.memory_mb or self._settings.memory_mb) * MIB

    def _stopped_outcome(self, attempt: _Attempt, run: _Run | None = None) -> Outcome:
        reason = attempt.stopped.result()
        kind = {
            StopReason.CANCEL: OutcomeKind.CANCELLED,
            StopReason.RELEASE: OutcomeKind.RELEASED,
            StopReason.KILL: OutcomeKind.LOST,
        }[reason]
        return Outcome(
            kind=kind,
            started_at=attempt.started_at,
            finished_at=now(),
            output_bytes=run.output_bytes if run else 0,
        )

    def _can_isolate(self) -> bool:
        return Isolation.STANDARD in self.info().isolations


async def _wait_first(one: asyncio.Future[_One], other: asyncio.Future[_Other]) -> None:
    """Return when either is done; neither is cancelled."""
    futures: set[asyncio.Future[_One] | asyncio.Future[_Other]] = {one, other}
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def _remove(private: Path) -> None:
    try:
        os.rmdir(private)
    except OSError:
        await asyncio.to_thread(clear, private)

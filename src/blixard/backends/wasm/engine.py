"""The Wasm engine: its settings, and one run of one module in this very process.

Everything here runs in an executor, never in the worker.
"""

from __future__ import annotations

import platform
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

import msgspec
import wasmtime
from wasmtime._exportable import AsExtern

from blixard.backends.wasm.wire import Ending, RunReport, RunRequest
from blixard.domain.limits import MIB

ABORTED_EXIT_CODE = 134
"""128 + SIGABRT: what a shell shows for a program that aborted, and what a trap is."""
KILLED_EXIT_CODE = 137
MAX_WASM_STACK_BYTES = 2 * MIB
"""Deep enough for CPython's recursion limit, well under the 8 MiB stack of the thread it runs on."""
MAX_TABLE_ELEMENTS = 1_000_000
MAX_TABLES = 16
MAX_LOADED_MODULES = 16
MAX_BACKTRACE_LINES = 64

_WASI = "wasi_snapshot_preview1"
_CAUSE = re.compile(r"^Caused by:\n(.*)", re.DOTALL | re.MULTILINE)


class _GuestExit(Exception):
    """The guest called ``proc_exit``."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def describe_settings(*, fuel: bool, portable: bool = False) -> str:
    """Return a text that changes whenever an artefact of other settings could not be used."""
    return f"epoch=1 fuel={int(fuel)} stack={MAX_WASM_STACK_BYTES} threads=0 gc=0{' portable=1' if portable else ''}"


def make_engine(*, fuel: bool, parallel: bool = False, portable: bool = False) -> wasmtime.Engine:
    """``portable``: its artefacts run on every processor of this kind, such as a virtual machine's, at some cost in speed."""
    config = wasmtime.Config()
    config.epoch_interruption = True
    config.consume_fuel = fuel
    config.max_wasm_stack = MAX_WASM_STACK_BYTES
    # Shared memories and the collector's heap escape the store's memory limit.
    config.wasm_threads = False
    config.wasm_gc = False
    config.parallel_compilation = parallel
    if portable:
        config.target = f"{platform.machine()}-unknown-linux-gnu"
    return wasmtime.Engine(config)


def make_linker(engine: wasmtime.Engine) -> wasmtime.Linker:
    """Return a linker that offers WASI preview 1 and nothing else.

    ``proc_exit`` is ours: wasmtime's refuses the codes from 126 up, which a job may well use.
    """
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    linker.allow_shadowing = True
    kind = wasmtime.FuncType([wasmtime.ValType.i32()], [])
    linker.define_func(_WASI, "proc_exit", kind, _exit_guest)
    return linker


def _exit_guest(code: int) -> None:
    raise _GuestExit(code)


class Runner:
    """Runs requests one after the other. ``write`` receives every piece of output at once, at most ``max_output_bytes`` of a run.

    ``interrupt`` may be called from another thread; all else from one.
    """

    def __init__(self, engine: wasmtime.Engine, linker: wasmtime.Linker, write: Callable[[bool, bytes], None]) -> None:
        self._engine = engine
        self._linker = linker
        self._write = write
        self._loaded: OrderedDict[str, wasmtime.InstancePre] = OrderedDict()
        self._lock = threading.Lock()
        self._current = 0
        self._stop = 0

    def load(self, key: str, artefact: str) -> wasmtime.InstancePre:
        """Return the module ready to instantiate. Raises ``WasmtimeError`` if the artefact cannot be read."""
        if (found := self._loaded.get(key)) is not None:
            self._loaded.move_to_end(key)
            return found
        made = self._linker.instantiate_pre(wasmtime.Module.deserialize_file(self._engine, artefact))
        self._loaded[key] = made
        if len(self._loaded) > MAX_LOADED_MODULES:
            self._loaded.popitem(last=False)
        return made

    def interrupt(self, number: int) -> None:
        """End run ``number`` at its next loop or call, if it is the one that runs or the one that comes next."""
        with self._lock:
            self._stop = max(self._stop, number)
            if self._current == number:
                self._engine.increment_epoch()

    def run(self, request: RunRequest, started: Callable[[], None]) -> RunReport:
        try:
            module = self.load(request.key, request.artefact)
        except wasmtime.WasmtimeError as error:
            return _refuse("ArtefactUnusable", str(error))
        output = _Output(self._write, request.max_output_bytes)
        report = self._run_instance(request, module, output, started)
        return msgspec.structs.replace(report, output_bytes=output.written) if output.written else report

    def _run_instance(
        self, request: RunRequest, module: wasmtime.InstancePre, output: _Output, started: Callable[[], None]
    ) -> RunReport:
        store = self._open_store(request)
        try:
            try:
                store.set_wasi(_configure_wasi(request, output))
            except (wasmtime.WasmtimeError, UnicodeError) as error:
                return _refuse("WasiSetup", str(error))
            if not self._begin(request.number):
                return RunReport(ending=Ending.INTERRUPTED)
            started()
            try:
                return _call(store, module, request)
            finally:
                self._end()
        finally:
            store.close()

    def _open_store(self, request: RunRequest) -> wasmtime.Store:
        store = wasmtime.Store(self._engine)
        # One memory: the limit counts each memory by itself.
        store.set_limits(request.memory_bytes, MAX_TABLE_ELEMENTS, 1, MAX_TABLES, 1)
        store.set_epoch_deadline(1)
        if request.fuel is not None:
            store.set_fuel(request.fuel)
        return store

    def _begin(self, number: int) -> bool:
        with self._lock:
            self._current = number
            return self._stop != number

    def _end(self) -> None:
        with self._lock:
            self._current = 0


class _Output:
    """Counts what the guest writes and drops what is over the cap: the guest goes on as if it had been written."""

    def __init__(self, write: Callable[[bool, bytes], None], cap: int) -> None:
        self._write = write
        self._left = cap
        self.written = 0

    def stdout(self, data: bytes) -> None:
        self._take(False, data)

    def stderr(self, data: bytes) -> None:
        self._take(True, data)

    def _take(self, is_error: bool, data: bytes) -> None:
        self.written += len(data)
        if kept := data[: self._left]:
            self._left -= len(kept)
            self._write(is_error, kept)


def _configure_wasi(request: RunRequest, output: _Output) -> wasmtime.WasiConfig:
    wasi = wasmtime.WasiConfig()
    wasi.argv = request.argv
    wasi.env = request.environment
    wasi.stdout_custom = output.stdout
    wasi.stderr_custom = output.stderr
    if request.stdin is not None:
        wasi.stdin_file = request.stdin
    for preopen in request.preopens:
        wasi.preopen_dir(preopen.host, preopen.guest, preopen.writable)
    return wasi


def _call(store: wasmtime.Store, module: wasmtime.InstancePre, request: RunRequest) -> RunReport:
    instance: wasmtime.Instance | None = None
    try:
        instance = module.instantiate(store)
        values = _enter(store, instance, request)
    except _GuestExit as exited:
        return RunReport(
            ending=Ending.EXITED, exit_code=exited.code & 0xFFFFFFFF, memory_bytes=_memory(store, instance)
        )
    except wasmtime.Trap as trap:
        return _report_trap(trap, _memory(store, instance))
    except wasmtime.WasmtimeError as error:
        return _report_error(error, instance, store)
    return RunReport(ending=Ending.RETURNED, values=values, memory_bytes=_memory(store, instance))


def _enter(store: wasmtime.Store, instance: wasmtime.Instance, request: RunRequest) -> tuple[int | float, ...]:
    exports = instance.exports(store)
    if request.function is None:
        _function(exports, "_start")(store)
        return ()
    if "_initialize" in exports:
        _function(exports, "_initialize")(store)
    returned = _function(exports, request.function)(store, *request.values)
    if returned is None:
        return ()
    return tuple(returned) if isinstance(returned, list) else (returned,)


def _function(exports: Mapping[str, AsExtern], name: str) -> wasmtime.Func:
    found = exports[name]
    if not isinstance(found, wasmtime.Func):
        raise wasmtime.WasmtimeError(f"the export {name!r} is not a function")
    return found


def _memory(store: wasmtime.Store, instance: wasmtime.Instance | None) -> int:
    if instance is None:
        return 0
    memory = instance.exports(store).get("memory")
    return memory.data_len(store) if isinstance(memory, wasmtime.Memory) else 0


def _report_trap(trap: wasmtime.Trap, memory: int) -> RunReport:
    if trap.trap_code is wasmtime.TrapCode.INTERRUPT:
        return RunReport(ending=Ending.INTERRUPTED, backtrace=_backtrace(trap.message), memory_bytes=memory)
    error = "FuelExhausted" if trap.trap_code is wasmtime.TrapCode.OUT_OF_FUEL else "WasmTrap"
    return RunReport(
        ending=Ending.TRAPPED,
        exit_code=ABORTED_EXIT_CODE,
        error=error,
        message=_cause(trap.message),
        backtrace=_backtrace(trap.message),
        memory_bytes=memory,
    )


def _report_error(
    error: wasmtime.WasmtimeError, instance: wasmtime.Instance | None, store: wasmtime.Store
) -> RunReport:
    text = str(error)
    if instance is None:
        return _refuse("MemoryLimit" if "exceeds memory limits" in text else "InstantiationFailed", text)
    # A host call that failed (a pointer outside the guest's memory) ends the guest like a trap.
    return RunReport(
        ending=Ending.TRAPPED,
        exit_code=ABORTED_EXIT_CODE,
        error="WasmTrap",
        message=_cause(text),
        backtrace=_backtrace(text),
        memory_bytes=_memory(store, instance),
    )


def _refuse(error: str, text: str) -> RunReport:
    return RunReport(ending=Ending.REFUSED, error=error, message=_cause(text))


def _cause(text: str) -> str:
    """Return the reason that wasmtime gives, without its backtrace."""
    found = _CAUSE.search(text)
    if not found:
        return text.strip()
    cause = " ".join(line.strip() for line in found.group(1).strip().splitlines())
    return cause if text.startswith("error while executing") else f"{text[: found.start()].strip()}: {cause}"


def _backtrace(text: str) -> str | None:
    lines = text.splitlines()
    if not lines or not lines[0].startswith("error while executing"):
        return None
    end = next((n for n, line in enumerate(lines) if line.startswith("Caused by")), len(lines))
    kept = [line.rstrip() for line in lines[1:end] if line.strip()]
    cut = [f"    … {len(kept) - MAX_BACKTRACE_LINES} more"] if len(kept) > MAX_BACKTRACE_LINES else []
    return "\n".join(["Wasm backtrace:", *kept[:MAX_BACKTRACE_LINES], *cut])

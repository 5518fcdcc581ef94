"""What the behavioural suite needs to know of a backend. One ``BackendHarness`` is one way to run a Python program on one backend.

A new backend adds a module ``harness_NAME.py`` beside this one with a list ``HARNESSES``; nothing else changes.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any  # options of a spec are passed through to JobSpec, which checks them

from blixard.backends.contract import BackendSettings, Execution, ExecutionBackend, Stream
from blixard.domain.grants import InputFile
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome
from blixard.domain.payload import Encoding, FunctionPayload, Payload
from blixard.domain.requirements import Isolation, JobRequirements, VmMode
from blixard.domain.spec import JobSpec

DEADLINE = 60.0
"""Seconds after which a wait of a test has failed. Generous: the machine may be loaded."""


class Capability(enum.StrEnum):
    """What not every guest can do. A harness has each of these, or says in ``lacks`` why not."""

    FUNCTIONS = "functions"
    """Python functions with arguments and results."""
    SIGNALS = "signals"
    """The guest has signals: it can die of one and can handle SIGTERM."""
    PROCESSES = "processes"
    """The guest can start further processes."""
    PROCESSES_SEEN = "processes_seen"
    """The host sees the guest's processes among its own."""
    SHORT_JOBS = "short_jobs"
    """Hundreds of jobs take seconds."""
    LIVE_GRANTS = "live_grants"
    """What is done to a granted path on the host while the job runs is seen by the job, and the other way round."""
    FUNCTION_STREAMS_ORDERED = "function_streams_ordered"
    """stdout and stderr of Python functions keep their order to each other."""
    MEMORY_LIMIT = "memory_limit"
    """``requirements.memory_mb`` ends what uses more."""
    PROGRAM_TRACEBACK = "program_traceback"
    """An uncaught exception of a program is told in the outcome's error, not only on stderr."""
    WARM = "warm"
    """Function jobs reuse a process."""
    BULK = "bulk"
    """The backend is a ``BulkBackend``, too."""
    FILES_PRIVATE = "files_private"
    """What was not granted cannot be seen or written."""
    ENVIRONMENT_PATHS = "environment_paths"
    """PATH, HOME and TMPDIR are set."""


@dataclass(frozen=True)
class BackendHarness:
    """``program`` turns Python source into a payload and its blobs; the directory it gets is private to the call.

    The program's arguments are the job's, ``sys.argv[1:]``; ``arguments_prefix`` is put before them.
    """

    name: str
    create: Callable[[BackendSettings], ExecutionBackend]
    program: Callable[[Path, str], tuple[Payload, dict[str, Path]]]
    isolation: Isolation
    capabilities: frozenset[Capability]
    lacks: Mapping[Capability, str] = field(default_factory=dict)
    arguments_prefix: Callable[[str], Sequence[str]] = lambda _source: ()
    vm_mode: VmMode | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of BackendSettings."""


def load_harnesses() -> list[BackendHarness]:
    """Return the harnesses of every ``harness_*.py`` beside this file."""
    found: list[BackendHarness] = []
    for path in sorted(Path(__file__).parent.glob("harness_*.py")):
        module = importlib.import_module(f"{__package__}.{path.stem}" if __package__ else path.stem)
        found.extend(module.HARNESSES)
    return found


class Recorder:
    """An ``ExecutionObserver`` that keeps what it hears, and lets a test wait for output or the start."""

    def __init__(self) -> None:
        self.started_at: int | None = None
        self.chunks: list[tuple[int, Stream, bytes]] = []
        self.closed = False
        self._changed = asyncio.Event()

    def started(self, at: int) -> None:
        assert not self.closed, "started after execute had returned"
        assert self.started_at is None, "started twice"
        self.started_at = at
        self._changed.set()

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        assert not self.closed, "output after execute had returned"
        assert data, "empty output"
        self.chunks.append((at, stream, bytes(data)))
        self._changed.set()

    def data(self, stream: Stream | None = None) -> bytes:
        return b"".join(data for _, of, data in self.chunks if stream is None or of is stream)

    @property
    def stdout(self) -> str:
        return self.data(Stream.STDOUT).decode()

    @property
    def stderr(self) -> str:
        return self.data(Stream.STDERR).decode()

    async def wait(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def wait_for_output(self, text: str) -> None:
        await self.wait(lambda: text in self.data().decode(errors="replace"))


@dataclass
class Running:
    """A job under way: its attempt, what was heard of it, and the task whose result is the outcome."""

    ref: AttemptRef
    observer: Recorder
    task: asyncio.Task[Outcome]

    async def end(self) -> Outcome:
        async with asyncio.timeout(DEADLINE):
            return await self.task


class Rig:
    """A started backend with short ways to run things on it."""

    def __init__(
        self, harness: BackendHarness, backend: ExecutionBackend, root: Path, settings: BackendSettings
    ) -> None:
        self.harness = harness
        self.backend = backend
        self.root = root
        self.settings = settings
        self._numbers = iter(range(1, 1_000_000))
        self._specs: dict[str, tuple[JobSpec, dict[str, Path]]] = {}

    def program(
        self,
        source: str,
        arguments: Sequence[str] = (),
        *,
        stdin: bytes | None = None,
        inputs: Mapping[str, bytes] | None = None,
        **options: Any,
    ) -> Execution:
        """Return an execution of a Python program, told by its source."""
        payload, blobs = self.harness.program(self._directory("program"), source)
        placed, files = self._place(inputs or {})
        words = [*self.harness.arguments_prefix(source), *arguments]
        return Execution(
            ref=self.next_ref(),
            spec=self._spec(payload, options),
            arguments=json.dumps(words).encode(),
            inputs=placed,
            blobs={**blobs, **files},
            stdin=None if stdin is None else self._file(stdin),
        )

    def function(
        self,
        source: str,
        *args: object,
        name: str = "jobs:job",
        encoding: Encoding = Encoding.JSON,
        arguments: bytes | None = None,
        inputs: Mapping[str, bytes] | None = None,
        **options: Any,
    ) -> Execution:
        """Return an execution of ``job`` in a module ``jobs`` with this source. Equal calls share one spec, as in a batch."""
        key = repr((source, name, encoding, sorted(options.items(), key=str)))
        if key not in self._specs:
            digest, directory = self.bundle({"jobs.py": source})
            payload = FunctionPayload(function=name, bundle=digest, encoding=encoding)
            self._specs[key] = (self._spec(payload, options), {digest: directory})
        spec, blobs = self._specs[key]
        placed, files = self._place(inputs or {})
        return Execution(
            ref=self.next_ref(),
            spec=spec,
            arguments=json.dumps([list(args), {}]).encode() if arguments is None else arguments,
            inputs=placed,
            blobs={**blobs, **files},
        )

    def bundle(self, files: Mapping[str, str]) -> tuple[str, Path]:
        """Write a bundle directory and return its digest and place."""
        digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        directory = self.root / "bundles" / digest
        for name, text in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text)
        return digest, directory

    def next_ref(self) -> AttemptRef:
        return AttemptRef("default", f"job_{next(self._numbers)}", 1)

    def begin(self, execution: Execution) -> Running:
        """Start the execution in a task of its own."""
        observer = Recorder()
        task = asyncio.create_task(self._execute(execution, observer), name=execution.ref.job_id)
        return Running(execution.ref, observer, task)

    async def run(self, execution: Execution) -> tuple[Outcome, Recorder]:
        running = self.begin(execution)
        return await running.end(), running.observer

    async def _execute(self, execution: Execution, observer: Recorder) -> Outcome:
        try:
            return await self.backend.execute(execution, observer)
        finally:
            observer.closed = True

    def _spec(self, payload: Payload, options: Mapping[str, Any]) -> JobSpec:
        wanted = dict(options)
        memory = wanted.pop("memory_mb", None)
        needs = self.requirements(memory_mb=memory)
        return JobSpec(name="test", payload=payload, requirements=needs, **wanted)

    def requirements(self, *, memory_mb: int | None = None) -> JobRequirements:
        """Return what every job of this harness asks for."""
        return JobRequirements(isolation=self.harness.isolation, vm_mode=self.harness.vm_mode, memory_mb=memory_mb)

    def _place(self, inputs: Mapping[str, bytes]) -> tuple[tuple[InputFile, ...], dict[str, Path]]:
        files = {}
        placed = []
        for path, data in inputs.items():
            digest = hashlib.sha256(data).hexdigest()
            files[digest] = self._file(data)
            placed.append(InputFile(path=path, digest=digest))
        return tuple(placed), files

    def _file(self, data: bytes) -> Path:
        path = self._directory("blob") / "data"
        path.write_bytes(data)
        path.chmod(0o444)
        return path

    def _directory(self, kind: str) -> Path:
        path = self.root / f"{kind}-{next(self._numbers)}"
        path.mkdir(parents=True)
        path.chmod(0o755)
        return path


async def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look again and again until the condition holds; for states that nothing announces, such as a process being gone."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"waited {DEADLINE:g} s in vain: {what}"
        await asyncio.sleep(0.01)  # sleep: nothing announces it

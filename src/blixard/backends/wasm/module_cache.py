"""Keeps compiled modules on disk. See DESIGN.md for what holds at every crash point.

An entry is two files: ``KEY.cwasm``, the artefact, and then ``KEY.json``, its seal with size and checksum. Deserialising an artefact
runs what is in it, so the directory is ours alone (mode 0700) and an artefact is handed out only if its seal fits.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import stat
import tempfile
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from blixard.backends.wasm.engine import describe_settings
from blixard.backends.wasm.host import ZygoteLost
from blixard.backends.wasm.signature import JobRefused, refuse
from blixard.backends.wasm.wire import CompileReport, FunctionType
from blixard.domain.limits import MIB
from blixard.errors import NotSupportedHere

MAX_MODULE_BYTES = 256 * MIB
MAX_CACHE_BYTES = 2048 * MIB
MAX_REMEMBERED = 1024
"""Modules whose checked entry, or whose refusal, this process remembers."""
MAX_SEAL_BYTES = 8 * MIB
MAX_COMPILES = 2
"""Each uses every core."""
LOCK_POLL_SECONDS = 0.05
STALE_PART_SECONDS = 3600.0
_MAGIC = b"\0asm"
_CORE_VERSION = b"\x01\0\0\0"
_FORMAT = 1

K = TypeVar("K")
V = TypeVar("V")
FileIdentity = tuple[int, int, int, int]
Compile = Callable[[int, int], Awaitable[CompileReport]]
"""Compiles the module in the first file into the second; the report says how it went."""


class CompiledModule(msgspec.Struct, frozen=True, kw_only=True):
    """An artefact that has been checked. It may be evicted while one holds this: then ``get`` makes it again."""

    key: str
    artefact: Path
    functions: dict[str, FunctionType]


class _Seal(msgspec.Struct, frozen=True, kw_only=True):
    size: int
    checksum: str
    functions: dict[str, FunctionType]


class ModuleCache:
    """Turns modules into artefacts, each once. One event loop; several processes may share the directory."""

    def __init__(
        self,
        directory: Path,
        compile_module: Compile,
        *,
        fuel: bool,
        max_bytes: int = MAX_CACHE_BYTES,
        portable: bool = False,
    ) -> None:
        self._directory = directory
        self._compile = compile_module
        self._max_bytes = max_bytes
        self._circumstances = _describe_circumstances(fuel=fuel, portable=portable)
        self._digests: OrderedDict[FileIdentity, str] = OrderedDict()
        self._ready: OrderedDict[str, tuple[CompiledModule, FileIdentity]] = OrderedDict()
        self._refused: OrderedDict[str, JobRefused] = OrderedDict()
        self._making: dict[str, asyncio.Task[CompiledModule]] = {}
        self._compiles = asyncio.Semaphore(MAX_COMPILES)
        self.compiled = 0
        """Modules compiled by this process, for tests and statistics."""

    def open(self) -> None:
        """Make the directory and see that it is ours alone. Raises ``NotSupportedHere``."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = self._directory.stat()
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise NotSupportedHere(
                f"the Wasm cache {self._directory} can be entered by others (owner {found.st_uid}, mode {found.st_mode & 0o777:o})",
                hint="chown it to the worker's user and chmod 700 it, or name another directory",
            )
        self._sweep()

    def _sweep(self) -> None:
        """Delete what a crash has left half-written, unless it is young enough to be another process's work."""
        for part in self._directory.glob("new-*.part"):
            try:
                if time.time() - part.stat().st_mtime > STALE_PART_SECONDS:
                    part.unlink()
            except FileNotFoundError:
                continue  # its owner has finished it

    def find(self, module: Path) -> CompiledModule | None:
        """Return the module at once if this process has checked it before and nothing has changed. A few stat calls."""
        digest = self._digests.get(_identify(module.stat()))
        found = self._ready.get(digest) if digest is not None else None
        if digest is None or found is None:
            return None
        try:
            unchanged = _identify(found[0].artefact.stat()) == found[1]
        except FileNotFoundError:
            unchanged = False
        if not unchanged:
            del self._ready[digest]
            return None
        self._ready.move_to_end(digest)
        return found[0]

    def forget(self, compiled: CompiledModule) -> None:
        """Distrust an entry that an executor could not use: the next ``get`` makes it again."""
        for digest, (found, _) in list(self._ready.items()):
            if found.key == compiled.key:
                del self._ready[digest]
        self._seal_path(compiled.key).unlink(missing_ok=True)

    async def get(self, module: Path) -> CompiledModule:
        """Return the module compiled, making it if needed. Callers at the same time share one compile.

        Cancelling a caller leaves the compile to the others, and to the next job. Raises ``JobRefused``, ``ZygoteLost``.
        """
        if (found := self.find(module)) is not None:
            return found
        digest = await self._digest(module)
        if (refused := self._refused.get(digest)) is not None:
            raise refused
        if (task := self._making.get(digest)) is None:
            task = asyncio.create_task(self._make(digest, module), name=f"wasm-compile-{digest[:12]}")
            self._making[digest] = task
            task.add_done_callback(lambda done: self._made(digest, done))
        return await asyncio.shield(task)

    async def stop(self) -> None:
        """End every compile."""
        tasks = list(self._making.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _made(self, digest: str, task: asyncio.Task[CompiledModule]) -> None:
        del self._making[digest]
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, JobRefused) and not error.error.retryable:
            _remember(self._refused, digest, error)

    async def _digest(self, module: Path) -> str:
        found = os.stat(module)
        if found.st_size > MAX_MODULE_BYTES:
            raise refuse("ModuleTooLarge", f"the module has {found.st_size} bytes; {MAX_MODULE_BYTES} are allowed")
        identity = _identify(found)
        if (digest := self._digests.get(identity)) is None:
            digest = await asyncio.to_thread(_hash_file, module)
            _remember(self._digests, identity, digest)
        return digest

    async def _make(self, digest: str, module: Path) -> CompiledModule:
        key = hashlib.sha256(f"{digest} {self._circumstances}".encode()).hexdigest()
        _check_header(module)
        async with self._compiles, _DirectoryLock(self._directory / f"{key}.lock"):
            seal = await asyncio.to_thread(self._read_entry, key)
            if seal is None:
                seal = await self._build(key, module)
                self.compiled += 1
        compiled = CompiledModule(key=key, artefact=self._artefact_path(key), functions=seal.functions)
        _remember(self._ready, digest, (compiled, _identify(compiled.artefact.stat())))
        return compiled

    def _read_entry(self, key: str) -> _Seal | None:
        """Return the seal of a whole entry, None if there is none that fits."""
        try:
            with self._seal_path(key).open("rb") as file:
                seal = msgspec.json.decode(file.read(MAX_SEAL_BYTES), type=_Seal)
            artefact = self._artefact_path(key)
            if artefact.stat().st_size != seal.size or _hash_file(artefact) != seal.checksum:
                return None
            os.utime(self._seal_path(key))
        except (OSError, msgspec.DecodeError):
            return None
        return seal

    async def _build(self, key: str, module: Path) -> _Seal:
        source = os.open(module, os.O_RDONLY | os.O_CLOEXEC)
        target, name = tempfile.mkstemp(dir=self._directory, prefix="new-", suffix=".part")
        try:
            report = await self._compile(source, target)
            if report.error:
                raise _as_refusal(report)
            return await asyncio.to_thread(self._store, key, target, Path(name), report)
        finally:
            os.close(source)
            os.close(target)
            await asyncio.to_thread(Path(name).unlink, missing_ok=True)

    def _store(self, key: str, target: int, name: Path, report: CompileReport) -> _Seal:
        os.fsync(target)
        seal = _Seal(size=os.fstat(target).st_size, checksum=_hash_file(name), functions=report.functions)
        # While the old seal is gone and the new one not there yet, there is no entry.
        self._seal_path(key).unlink(missing_ok=True)
        name.rename(self._artefact_path(key))
        part = self._directory / f"new-{key}.seal.part"
        part.write_bytes(msgspec.json.encode(seal))
        part.rename(self._seal_path(key))
        self._evict(key)
        return seal

    def _evict(self, keep: str) -> None:
        """Delete the entries used longest ago until the rest fits."""
        entries = []
        for path in self._directory.glob("*.cwasm"):
            seal = self._seal_path(path.stem)
            used = seal.stat().st_mtime if seal.exists() else 0.0
            entries.append((used, path.stat().st_size, path.stem))
        total = sum(size for _, size, _ in entries)
        for _, size, key in sorted(entries):
            if total <= self._max_bytes:
                return
            if key != keep:
                self._seal_path(key).unlink(missing_ok=True)
                self._artefact_path(key).unlink(missing_ok=True)
                (self._directory / f"{key}.lock").unlink(missing_ok=True)
                total -= size

    def _artefact_path(self, key: str) -> Path:
        return self._directory / f"{key}.cwasm"

    def _seal_path(self, key: str) -> Path:
        return self._directory / f"{key}.json"


class _DirectoryLock:
    """Lets one process at a time make an entry. It falls free when its holder dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1

    async def __aenter__(self) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await self._wait()
            else:
                return

    async def _wait(self) -> None:
        try:
            await asyncio.sleep(LOCK_POLL_SECONDS)  # another process compiles: flock has no event to wait for
        except asyncio.CancelledError:
            os.close(self._file)
            raise

    async def __aexit__(self, *_: object) -> None:
        os.close(self._file)


def _describe_circumstances(*, fuel: bool, portable: bool) -> str:
    """Return all but the module that an artefact depends on."""
    settings = describe_settings(fuel=fuel, portable=portable)
    processor = "any" if portable else _cpu_features()
    return f"{_FORMAT} {importlib.metadata.version('wasmtime')} {settings} {platform.machine()} {processor}"


def _cpu_features() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    found = (line.partition(":")[2] for line in text.splitlines() if line.lower().startswith(("flags", "features")))
    return hashlib.sha256(" ".join(sorted(set(next(found, "").split()))).encode()).hexdigest()


def _check_header(module: Path) -> None:
    with module.open("rb") as file:
        head = file.read(8)
    if head[:4] == _MAGIC and head[4:] == _CORE_VERSION:
        return
    if head[:4] == _MAGIC and head[6:8] == b"\x01\0":
        raise refuse(
            "InvalidModule",
            "this is a WebAssembly component, not a core module",
            "build it for wasm32-wasip1 (WASI preview 1)",
        )
    if head[:4] == _MAGIC and len(head) == 8:
        raise refuse("InvalidModule", f"this is WebAssembly of an unknown version ({head[4:].hex()})")
    hint = "compile the text with `wat2wasm` first" if head.lstrip().startswith((b"(module", b"(;", b";;")) else None
    raise refuse("InvalidModule", "this is not a WebAssembly module: it does not begin with \\0asm and a version", hint)


def _as_refusal(report: CompileReport) -> Exception:
    if report.error in {"SandboxFailed", "CompilerLost"}:
        return ZygoteLost(report.message)
    return refuse(report.error, report.message, report.hint)


def _identify(found: os.stat_result) -> FileIdentity:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remember(table: OrderedDict[K, V], key: K, value: V) -> None:
    table[key] = value
    if len(table) > MAX_REMEMBERED:
        table.popitem(last=False)

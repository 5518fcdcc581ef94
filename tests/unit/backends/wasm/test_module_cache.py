from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blixard.backends.wasm import module_cache
from blixard.backends.wasm.host import ZygoteLost
from blixard.backends.wasm.module_cache import CompiledModule, ModuleCache
from blixard.backends.wasm.signature import JobRefused
from blixard.backends.wasm.wire import CompileReport, FunctionType
from blixard.errors import NotSupportedHere

HEADER = b"\0asm\x01\0\0\0"


class Compiler:
    """Writes ``artefact of MODULE``; can be held back, and can refuse."""

    def __init__(self) -> None:
        self.runs = 0
        self.report = CompileReport(functions={"f": FunctionType((), ())})
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun = asyncio.Event()
        self.padding = 0

    async def compile(self, source: int, target: int) -> CompileReport:
        self.runs += 1
        self.begun.set()
        await self.gate.wait()
        if not self.report.error:
            os.write(target, b"artefact of " + os.read(source, 1000) + b"." * self.padding)
        return self.report


@pytest.fixture
async def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
async def cache(tmp_path: Path, compiler: Compiler) -> AsyncIterator[ModuleCache]:
    cache = open_cache(tmp_path, compiler)
    yield cache
    await cache.stop()


def open_cache(tmp_path: Path, compiler: Compiler, *, fuel: bool = False, max_bytes: int = 1 << 30) -> ModuleCache:
    cache = ModuleCache(tmp_path / "cache", compiler.compile, fuel=fuel, max_bytes=max_bytes)
    cache.open()
    return cache


def write_module(tmp_path: Path, name: str = "m") -> Path:
    path = tmp_path / f"{name}.wasm"
    path.write_bytes(HEADER + name.encode())
    return path


def files(tmp_path: Path, suffix: str) -> list[Path]:
    return sorted((tmp_path / "cache").glob(f"*{suffix}"))


async def test_a_module_is_compiled_once_for_all_time(tmp_path: Path, cache: ModuleCache, compiler: Compiler) -> None:
    module = write_module(tmp_path)
    assert cache.find(module) is None
    first = await cache.get(module)
    assert first.artefact.read_bytes() == b"artefact of " + HEADER + b"m"
    assert first.functions == {"f": FunctionType((), ())}
    assert cache.find(module) == first
    assert await cache.get(module) == first
    assert await open_cache(tmp_path, compiler).get(module) == first
    assert compiler.runs == 1


async def test_callers_at_the_same_time_share_one_compile(
    tmp_path: Path, cache: ModuleCache, compiler: Compiler
) -> None:
    compiler.gate.clear()
    module = write_module(tmp_path)
    getting = [asyncio.create_task(cache.get(module)) for _ in range(5)]
    await compiler.begun.wait()
    getting[0].cancel()
    await asyncio.wait([getting[0]])
    compiler.gate.set()
    found = await asyncio.gather(*getting[1:])
    assert compiler.runs == 1
    assert len(set(map(repr, found))) == 1


async def test_two_processes_share_one_compile(tmp_path: Path, compiler: Compiler) -> None:
    module = write_module(tmp_path)
    one, other = open_cache(tmp_path, compiler), open_cache(tmp_path, compiler)
    compiler.gate.clear()
    getting = [asyncio.create_task(one.get(module)), asyncio.create_task(other.get(module))]
    await compiler.begun.wait()
    compiler.gate.set()
    first, second = await asyncio.gather(*getting)
    assert first == second
    assert compiler.runs == 1


async def spoil_artefact(compiled: CompiledModule) -> None:
    data = bytearray(compiled.artefact.read_bytes())
    data[3] ^= 1
    compiled.artefact.write_bytes(data)


async def cut_artefact(compiled: CompiledModule) -> None:
    compiled.artefact.write_bytes(compiled.artefact.read_bytes()[:-1])


async def remove_artefact(compiled: CompiledModule) -> None:
    compiled.artefact.unlink()


async def remove_seal(compiled: CompiledModule) -> None:
    compiled.artefact.with_suffix(".json").unlink()


async def spoil_seal(compiled: CompiledModule) -> None:
    compiled.artefact.with_suffix(".json").write_bytes(b"{")


@pytest.mark.parametrize("damage", [spoil_artefact, cut_artefact, remove_artefact, remove_seal, spoil_seal])
async def test_a_damaged_entry_is_made_again(tmp_path: Path, compiler: Compiler, damage: object) -> None:
    module = write_module(tmp_path)
    first = await open_cache(tmp_path, compiler).get(module)
    whole = first.artefact.read_bytes()
    assert callable(damage)
    await damage(first)
    again = await open_cache(tmp_path, compiler).get(module)
    assert compiler.runs == 2
    assert again.artefact.read_bytes() == whole


async def test_an_artefact_changed_under_us_is_noticed(tmp_path: Path, cache: ModuleCache, compiler: Compiler) -> None:
    module = write_module(tmp_path)
    await cut_artefact(await cache.get(module))
    assert cache.find(module) is None
    await cache.get(module)
    assert compiler.runs == 2


async def test_other_settings_make_another_entry(tmp_path: Path, cache: ModuleCache, compiler: Compiler) -> None:
    module = write_module(tmp_path)
    plain = await cache.get(module)
    metered = await open_cache(tmp_path, compiler, fuel=True).get(module)
    assert plain.key != metered.key
    assert compiler.runs == 2


async def test_the_entry_used_longest_ago_makes_room(tmp_path: Path, compiler: Compiler) -> None:
    compiler.padding = 1000
    cache = open_cache(tmp_path, compiler, max_bytes=2600)
    modules = [write_module(tmp_path, name) for name in "abc"]
    first = await cache.get(modules[0])
    second = await cache.get(modules[1])
    os.utime(first.artefact.with_suffix(".json"), (2e9, 2e9))
    third = await cache.get(modules[2])
    assert sorted(files(tmp_path, ".cwasm")) == sorted([first.artefact, third.artefact])
    assert not second.artefact.with_suffix(".json").exists()
    assert cache.find(modules[1]) is None
    await cache.get(modules[1])
    assert compiler.runs == 4


async def test_a_refusal_is_remembered_and_leaves_nothing(
    tmp_path: Path, cache: ModuleCache, compiler: Compiler
) -> None:
    compiler.report = CompileReport(error="InvalidModule", message="no", hint="try")
    module = write_module(tmp_path)
    for _ in range(3):
        with pytest.raises(JobRefused) as caught:
            await cache.get(module)
        assert (caught.value.error.type, caught.value.error.hint) == ("InvalidModule", "try")
    assert compiler.runs == 1
    assert files(tmp_path, ".cwasm") == files(tmp_path, ".part") == files(tmp_path, ".json") == []


async def test_a_broken_compiler_is_not_held_against_the_module(
    tmp_path: Path, cache: ModuleCache, compiler: Compiler
) -> None:
    good, compiler.report = compiler.report, CompileReport(error="CompilerLost", message="killed")
    module = write_module(tmp_path)
    with pytest.raises(ZygoteLost):
        await cache.get(module)
    compiler.report = good
    await cache.get(module)


async def test_a_module_over_the_limit_is_refused_unread(
    tmp_path: Path, cache: ModuleCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = write_module(tmp_path)
    monkeypatch.setattr(module_cache, "MAX_MODULE_BYTES", len(HEADER) + 1)
    await cache.get(module)
    longer = write_module(tmp_path, "xy")
    with pytest.raises(JobRefused) as caught:
        await cache.get(longer)
    assert caught.value.error.type == "ModuleTooLarge"


async def test_stop_ends_a_compile_under_way(tmp_path: Path, cache: ModuleCache, compiler: Compiler) -> None:
    compiler.gate.clear()
    getting = asyncio.create_task(cache.get(write_module(tmp_path)))
    await compiler.begun.wait()
    await cache.stop()
    await asyncio.wait([getting])
    assert getting.cancelled()
    assert files(tmp_path, ".part") == []


@pytest.mark.parametrize("mode", [0o777, 0o750, 0o701])
async def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path, compiler: Compiler, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(NotSupportedHere, match="entered by others"):
        open_cache(tmp_path, compiler)


async def test_half_written_files_of_a_crash_are_swept(tmp_path: Path, compiler: Compiler) -> None:
    open_cache(tmp_path, compiler)
    old, young = (tmp_path / "cache" / name for name in ("new-old.part", "new-young.part"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    open_cache(tmp_path, compiler)
    assert files(tmp_path, ".part") == [young]

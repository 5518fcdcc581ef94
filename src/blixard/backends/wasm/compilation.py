"""Compiles a module in a child process that has nothing but the two files, and limits on time and memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from blixard.backends.wasm.confinement import MAX_ARTEFACT_BYTES, plan_compiler
from blixard.backends.wasm.host import Child, ZygoteHost
from blixard.backends.wasm.wire import CompileReport, CompileRequest, Limits, Tag, decode_report
from blixard.domain.limits import MIB

MAX_COMPILE_CPU_SECONDS = 120
MAX_COMPILE_SECONDS = 300.0
MAX_COMPILE_BYTES = 8192 * MIB
"""Address space, of which a compiler uses a fraction: CPython's 12 MB of Wasm need about 1 GiB."""


class ModuleCompiler:
    """``can_isolate`` says whether this host lets the compiler have a sandbox of its own."""

    def __init__(self, host: ZygoteHost, can_isolate: Callable[[], bool]) -> None:
        self._host = host
        self._can_isolate = can_isolate

    async def compile(self, source: int, target: int) -> CompileReport:
        """Compile the module in file ``source`` into file ``target``; the report says how it went. Raises ``ZygoteLost``."""
        limits = Limits(
            cpu_seconds=MAX_COMPILE_CPU_SECONDS, address_bytes=MAX_COMPILE_BYTES, file_bytes=MAX_ARTEFACT_BYTES
        )
        child = self._host.spawn(limits, [source, target])
        reports: list[CompileReport] = []

        def take(_: Tag, body: bytes) -> None:
            report = decode_report(body)
            assert isinstance(report, CompileReport)
            reports.append(report)

        child.request(CompileRequest(room=plan_compiler() if self._can_isolate() else None), take)
        try:
            async with asyncio.timeout(MAX_COMPILE_SECONDS):
                code = await asyncio.shield(child.gone)
        except TimeoutError:
            return _timeout()
        finally:
            child.kill()
            await see_off(child)
        return reports[0] if reports else _judge(code)


async def see_off(child: Child) -> None:
    """Wait until a killed child is gone, whatever happens to the caller."""
    while not child.gone.done():
        try:
            await asyncio.shield(child.gone)
        except asyncio.CancelledError:
            if not child.gone.done():
                await asyncio.wait([child.gone])
            raise


def _judge(code: int) -> CompileReport:
    if code in {-24, 128 + 24}:  # SIGXCPU
        return _timeout()
    if code in {-6, 134, -11, 139}:  # Rust aborts when it cannot allocate
        return CompileReport(
            error="CompileFailed",
            message="the compiler ran out of memory or crashed on this module",
            hint="make it smaller",
        )
    return CompileReport(error="CompilerLost", message=f"the compiler's process ended with {code}")


def _timeout() -> CompileReport:
    return CompileReport(
        error="CompileTimeout",
        message=f"compiling the module took more than {MAX_COMPILE_CPU_SECONDS} s of processor time",
        hint="split the module, or build it with fewer and smaller functions",
    )

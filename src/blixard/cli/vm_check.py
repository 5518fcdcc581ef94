"""Does a virtual machine really run here? Found out by running one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from blixard.cli.invocation import Invocation
from blixard.errors import MachineLost

if TYPE_CHECKING:
    from blixard.vm.manager import VmManager


async def check_machines(invocation: Invocation, tell: Callable[[str], None]) -> list[str]:
    """Make the template of the default size, run a program in a clone, and return what works, a line each.

    Raises ``NotSupportedHere``, ``MachineLost``, and what building an image raises.
    """
    from blixard.infrastructure import ProductionInfrastructureFactory

    manager = ProductionInfrastructureFactory(invocation.config.settings).create_vm_manager(pool=0)
    try:
        await manager.start()
        return await _check(manager, tell)
    finally:
        await manager.shutdown()


async def _check(manager: VmManager, tell: Callable[[str], None]) -> list[str]:
    info = await asyncio.to_thread(manager.info)
    lines = [f"hypervisor\t{info.name} {info.version} with {info.accelerator or 'nothing: ' + info.missing}"]
    lines += [f"note\t{text}" for text in info.notes]
    tell("booting the image once to save its template")
    template = await manager.prepare()
    lines.append(f"template\t{template.key}")
    began = time.monotonic()
    lease = await manager.acquire(manager.default_need())
    try:
        from blixard.vm.agent_link import run_program

        ended, out, _ = await run_program(lease.link, ("/usr/bin/python3", "-c", "print(6 * 7)"))
    finally:
        await manager.release(lease, broken=True)
    if ended.code != 0 or out.strip() != b"42":
        raise MachineLost(f"a program in a fresh machine ended with exit code {ended.code} and said {out!r}")
    lines.append(f"check\ta program ran in a fresh machine, {time.monotonic() - began:.2f} s from asking for it")
    return lines

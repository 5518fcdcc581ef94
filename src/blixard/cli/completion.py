"""What the shell offers behind a command. A completion never fails and never takes long: then it offers nothing."""

from __future__ import annotations

import asyncio

import typer

from blixard.cli.invocation import Invocation
from blixard.errors import BlixardError

OFFERED = 50
PATIENCE_SECONDS = 2.0


def complete_job_ids(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Offer the newest jobs, with name and state."""
    invocation = _invocation_of(ctx)

    async def ask() -> list[tuple[str, str]]:
        async with asyncio.timeout(PATIENCE_SECONDS), invocation.connect() as client:
            page = await client.jobs(limit=OFFERED)
        return [(job.id, f"{job.state} {job.name}") for job in page.jobs if job.id.startswith(incomplete)]

    try:
        return invocation.run(ask())
    except (BlixardError, TimeoutError, OSError):
        return []


def complete_vm_ids(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Offer the virtual machines that run here, with what they do."""
    from blixard.cli.machines import find_machines, vm_directory

    invocation = _invocation_of(ctx)

    async def ask() -> list[tuple[str, str]]:
        async with asyncio.timeout(PATIENCE_SECONDS):
            found = [item.vm for item in await find_machines(vm_directory(invocation))]
        return [(vm.id, f"{vm.state} {vm.job_id}".strip()) for vm in found if vm.id.startswith(incomplete)]

    try:
        return invocation.run(ask())
    except (BlixardError, TimeoutError, OSError):
        return []


def _invocation_of(ctx: typer.Context) -> Invocation:
    """Return what the global options on the line ask for: completing runs no command, so nobody has kept them."""
    invocation = Invocation()
    given = ctx.find_root().params
    invocation.overrides = {"server.url": given.get("server"), "storage.data_dir": given.get("data_dir")}
    invocation.config_file = given.get("config")
    return invocation

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
    invocation = ctx.obj if isinstance(ctx.obj, Invocation) else Invocation()

    async def ask() -> list[tuple[str, str]]:
        async with asyncio.timeout(PATIENCE_SECONDS), invocation.connect() as client:
            page = await client.jobs(limit=OFFERED)
        return [(job.id, f"{job.state} {job.name}") for job in page.jobs if job.id.startswith(incomplete)]

    try:
        return invocation.run(ask())
    except (BlixardError, TimeoutError, OSError):
        return []

"""`blixard workers`, `stats`, `prune`, `version`."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import typer

from blixard.cli.invocation import Invocation
from blixard.cli.job_view import show_age
from blixard.cli.output import note, print_json, print_line, print_table, print_version, version
from blixard.cli.root import PLAIN, examples
from blixard.domain.state_machine import JobState
from blixard.domain.worker import SessionState
from blixard.protocol.jobs import StatsView
from blixard.protocol.workers import WorkerView

app = typer.Typer(rich_markup_mode=PLAIN)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(
    help="List workers: what they run, how busy they are, when they were last heard of.",
    epilog=examples("workers", "workers --all --json"),
)
def workers(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Also those that are gone.")] = False,
    as_json: Json = False,
) -> int:
    invocation: Invocation = ctx.obj
    found = invocation.call(lambda client: client.workers())
    gone = {SessionState.DEAD, SessionState.CLOSED}
    shown = [worker for worker in found if everything or worker.state not in gone]
    if as_json:
        print_json(shown)
        return 0
    now = dt.datetime.now(dt.UTC)
    print_table(
        ("SESSION", "NAME", "STATE", "RUNS", "LEASED", "SLOTS", "QUEUES", "SEEN"),
        [_worker_row(worker, now) for worker in shown],
        state="STATE",
    )
    if not shown and not invocation.quiet:
        note("no worker is online; `blixard serve` has one, `blixard worker --server URL` adds one")
    return 0


def _worker_row(worker: WorkerView, now: dt.datetime) -> tuple[str, ...]:
    offer = worker.offer
    runs = "; ".join(f"{kind}: {', '.join(levels)}" for kind, levels in sorted(offer.capabilities.items()))
    return (
        worker.session,
        worker.name,
        str(worker.state),
        runs,
        str(worker.leased),
        str(offer.slots),
        ", ".join(offer.queues) or "all",
        f"{show_age((now - worker.seen_at).total_seconds())} ago",
    )


@app.command(help="Count jobs by state and queue, and workers.", epilog=examples("stats", "stats --json"))
def stats(ctx: typer.Context, as_json: Json = False) -> int:
    invocation: Invocation = ctx.obj
    view = invocation.call(lambda client: client.stats())
    if as_json:
        print_json(view)
        return 0
    print_table(("QUEUE", *(str(state).upper() for state in JobState)), _stats_rows(view), keep_all=True)
    print_line("workers: " + (", ".join(f"{n} {state}" for state, n in sorted(view.workers.items())) or "none"))
    return 0


def _stats_rows(view: StatsView) -> list[tuple[str, ...]]:
    rows = [(name, view.queues[name]) for name in sorted(view.queues)]
    rows.append(("all queues", view.jobs))
    return [(name, *(f"{counts.get(state, 0)}" for state in JobState)) for name, counts in rows]


@app.command(
    help="Remove jobs, events and blobs that are past their retention time, now instead of when it is due. "
    "The times are settings: `blixard config show`.",
    epilog=examples("prune", "prune --json"),
)
def prune(ctx: typer.Context, as_json: Json = False) -> int:
    invocation: Invocation = ctx.obj
    counts = invocation.call(lambda client: client.prune())
    if as_json:
        print_json(counts)
    else:
        print_line("removed " + (", ".join(f"{n:,} {kind}" for kind, n in sorted(counts.items()) if n) or "nothing"))
    return 0


@app.command(name="version", help="Print the version.", epilog=examples("version", "version --json"))
def show_version(ctx: typer.Context, as_json: Json = False) -> int:
    if as_json:
        print_json({"version": version()})
    else:
        print_version()
    return 0

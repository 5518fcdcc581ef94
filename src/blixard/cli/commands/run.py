"""`blixard run` and `blixard submit`."""

from __future__ import annotations

from typing import Annotated

import typer

from blixard.cli.failures import INTERRUPTED
from blixard.cli.invocation import Invocation
from blixard.cli.options import JobOptions, with_job_options
from blixard.cli.output import note, print_line
from blixard.cli.root import PLAIN, WordsCommand, examples
from blixard.cli.running import RunningJob
from blixard.cli.signals import catch_signals
from blixard.cli.submission import Prepared, prepare, upload
from blixard.cli.target import read_target
from blixard.client.contract import AsyncClient
from blixard.domain.worker import SessionState

app = typer.Typer(rich_markup_mode=PLAIN)
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="TARGET", help="FILE.py, FILE.wasm, FILE.py:FUNCTION with JSON arguments, or -- COMMAND."),
]
JobId = Annotated[
    str | None,
    typer.Option("--id", metavar="ID", help="Id of the job; submitting it again is the same job. Default: a new one."),
]


def _prepare(ctx: typer.Context, words: list[str] | None, options: JobOptions) -> Prepared:
    invocation: Invocation = ctx.obj
    target = read_target(words or [], ctx.meta.get(WordsCommand.TAIL))
    return prepare(target, options, is_remote=invocation.is_remote)


def _ensure_image(invocation: Invocation, prepared: Prepared) -> bool:
    from blixard.domain.requirements import Isolation

    needs = prepared.spec.requirements
    if needs.isolation is not Isolation.MAXIMUM and needs.vm_mode is None:
        return True
    from blixard.cli.machines import ensure_image

    return ensure_image(invocation, needs)


@app.command(
    cls=WordsCommand,
    help="Run a script, function, command or WebAssembly module as a durable job, in a sandbox.\n\n"
    "Its output appears here while it runs, a function's result at the end. The exit code is the job's own; "
    "124: it timed out, 125: its worker was lost or there is no store, 130: interrupted, 128+n: killed by signal n, "
    "2: a mistake in what was asked, and nothing was submitted. Ctrl-C cancels the job.",
    epilog=examples(
        "run hello.py -- --n 3",
        "run facts.py:measure a.txt 3 '[1, 2]'",
        "run tool.wasm -- --help",
        "run --timeout 30s --allow-read . -- wc -l notes.txt",
        "run --input data.csv --env LEVEL=2 report.py -- data.csv",
    ),
)
@with_job_options()
def run(ctx: typer.Context, words: Words = None, job_id: JobId = None, *, options: JobOptions) -> int:
    invocation: Invocation = ctx.obj
    prepared = _prepare(ctx, words, options)
    if not _ensure_image(invocation, prepared):
        note("nothing was submitted")
        return INTERRUPTED

    async def work(client: AsyncClient) -> int:
        with catch_signals() as interrupt:
            job = await upload(client, prepared, job_id=job_id, priority=options.priority)
            submitted = await client.submit(prepared.spec, job)
            if invocation.verbose:
                note(f"submitted {submitted}")
            return await RunningJob(client, submitted).watch(interrupt)

    return invocation.call(work)


@app.command(
    cls=WordsCommand,
    help="Store a job and return at once; its id is printed. It is durable when the id appears. "
    "The words are those of `blixard run`.",
    epilog=examples("submit --queue night report.py", "submit --id nightly-2026-11-23 -- make -C /srv/report"),
)
@with_job_options()
def submit(ctx: typer.Context, words: Words = None, job_id: JobId = None, *, options: JobOptions) -> int:
    invocation: Invocation = ctx.obj
    prepared = _prepare(ctx, words, options)

    async def work(client: AsyncClient) -> int:
        job = await upload(client, prepared, job_id=job_id, priority=options.priority)
        print_line(await client.submit(prepared.spec, job))
        if not invocation.quiet:
            note(await _how_it_will_run(client, invocation))
        return 0

    return invocation.call(work)


async def _how_it_will_run(client: AsyncClient, invocation: Invocation) -> str:
    online = [worker for worker in await client.workers() if worker.state is SessionState.ONLINE]
    if any(worker.offer.submitter is None for worker in online):
        return "pending; a worker will take it"
    if invocation.is_remote:
        return "pending; no worker is online: `blixard worker --server URL` starts one"
    return "pending; no server owns this data directory: `blixard serve` or any waiting command will run it"

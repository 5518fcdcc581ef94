"""`blixard map`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Annotated

import msgspec
import typer

from blixard.cli.failures import first_of
from blixard.cli.invocation import Invocation
from blixard.cli.map_inputs import MapInputs, open_list
from blixard.cli.mapping import MapRun
from blixard.cli.options import JobOptions, with_job_options
from blixard.cli.output import note, plural
from blixard.cli.progress import ProgressView, Tally, choose_view, summarise
from blixard.cli.root import PLAIN, examples
from blixard.cli.signals import Interrupt, catch_signals
from blixard.cli.submission import make_payload, make_spec
from blixard.cli.target import Target, TargetKind
from blixard.client.contract import AsyncClient
from blixard.domain.batch import batch_identity
from blixard.domain.ids import DEFAULT_NAMESPACE
from blixard.domain.spec import JobSpec, encode_spec
from blixard.domain.state_machine import JobState
from blixard.errors import InvalidRequest
from blixard.protocol.jobs import BatchView, OpenBatchRequest

app = typer.Typer(rich_markup_mode=PLAIN)


class MapRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to map, ready to be begun. ``code`` is the blob of the function's bundle."""

    spec: JobSpec
    code: bytes | None
    inputs: MapInputs
    identity: str
    fresh: bool
    as_json: bool


@app.command(
    help="Call a function once per line of a list: one durable job for each line, which is its only argument.\n\n"
    "The same command again attaches to the same map (same function, code, options and inputs) and runs only what has "
    "not completed; results that are there already are printed again. Exit code: 0 when all completed, 1 when some "
    "failed, 130 when interrupted.",
    epilog=examples(
        "map facts.py:measure files.txt",
        "map --json --retries 2 facts.py:measure files.txt > results.jsonl",
        "map --files facts.py:measure files.txt        # each line is a file that its job may read",
        "map facts.py:measure - < files.txt",
    ),
)
@with_job_options("input")
def map(  # noqa: A001  the command's name
    ctx: typer.Context,
    function: Annotated[str, typer.Argument(metavar="FILE.py:FUNCTION", help="Function of a Python file.")],
    list_name: Annotated[str, typer.Argument(metavar="LIST", help="File with one input a line; - is standard input.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line: input, id, state, result.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew, even if there is such a map already.")] = False,
    files: Annotated[
        bool, typer.Option("--files", help="Send each line's file to its own job, where it appears at the same path.")
    ] = False,
    *,
    options: JobOptions,
) -> int:
    invocation: Invocation = ctx.obj
    with contextlib.closing(MapInputs()) as inputs:
        request = _prepare(invocation, function, list_name, inputs, options, fresh=fresh, files=files, as_json=as_json)
        if not len(inputs):
            note(f"{list_name} is empty: nothing to do")
            return 0
        return invocation.call(lambda client: _map(client, invocation, request, options.priority))


def _prepare(
    invocation: Invocation,
    function: str,
    list_name: str,
    inputs: MapInputs,
    options: JobOptions,
    *,
    fresh: bool,
    files: bool,
    as_json: bool,
) -> MapRequest:
    file, _, name = function.rpartition(":")
    if not file.endswith(".py") or not name:
        raise InvalidRequest(
            f"{function!r} is not of the form FILE.py:FUNCTION", field="function", hint="for example facts.py:measure"
        )
    target = Target(kind=TargetKind.FUNCTION, file=file, member=name)
    payload, code = make_payload(target, options)
    spec = make_spec(payload, options, options.name or target.title, is_remote=invocation.is_remote)
    with open_list(list_name) as lines:
        parts = inputs.fill(lines, with_files=files, isolation=options.isolation)
        identity = batch_identity(DEFAULT_NAMESPACE, encode_spec(spec), parts)
    assert code is None or isinstance(code, bytes)
    return MapRequest(spec=spec, code=code, inputs=inputs, identity=identity, fresh=fresh, as_json=as_json)


async def _map(client: AsyncClient, invocation: Invocation, request: MapRequest, priority: int) -> int:
    with catch_signals() as interrupt, choose_view(quiet=invocation.quiet) as view:
        working = asyncio.create_task(_work(client, invocation, request, view, priority), name="map")
        interrupted = asyncio.create_task(interrupt.wait(), name="map: interrupt")
        try:
            await asyncio.wait({working, interrupted}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            return _tell_interrupted(view, interrupt)
        finally:
            working.cancel()
            interrupted.cancel()
            await asyncio.gather(working, interrupted, return_exceptions=True)


def _tell_interrupted(view: ProgressView, interrupt: Interrupt) -> int:
    view.warn("interrupted: what has completed is kept, and the same command carries on")
    return interrupt.exit_code


async def _work(
    client: AsyncClient, invocation: Invocation, request: MapRequest, view: ProgressView, priority: int
) -> int:
    if request.code is not None:
        await client.put_blob(request.code)
    batch = await client.open_batch(
        OpenBatchRequest(
            name=request.spec.name, identity=request.identity, total=len(request.inputs), fresh=request.fresh
        )
    )
    if not invocation.quiet:
        _tell_batch(view, batch)
    began = time.monotonic()
    mapping = MapRun(client, request.spec, request.inputs, batch, view, as_json=request.as_json, priority=priority)
    try:
        tally = await mapping.run()
    except BaseExceptionGroup as group:
        # Tasks that fail together fail for the same reason: the first tells it.
        raise first_of(group) from group
    if not invocation.quiet:
        view.warn(summarise(tally, time.monotonic() - began))
    return _exit_code(tally)


def _tell_batch(view: ProgressView, batch: BatchView) -> None:
    if batch.created:
        if batch.replaces is not None:
            view.warn(
                f"the code, the options or the list changed: this is a new map ({batch.replaces} is not finished)"
            )
        view.warn(f"map {batch.id}: {plural(batch.total, 'job')}")
        return
    completed = batch.counts.get(JobState.COMPLETED, 0)
    view.warn(f"attached to {batch.id}: {completed:,} of {batch.total:,} already completed")


def _exit_code(tally: Tally) -> int:
    return 0 if tally.completed == tally.total else 1

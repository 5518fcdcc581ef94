"""`blixard jobs`, `job`, `logs`, `cancel`, `retry`, `why`."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Awaitable, Callable
from typing import Annotated

import typer

from blixard.cli.completion import complete_job_ids
from blixard.cli.follow import LogFollower
from blixard.cli.invocation import Invocation
from blixard.cli.job_view import describe_job, job_row, list_columns
from blixard.cli.output import fields_of, note, print_json, print_line, print_table, write_error, write_out
from blixard.cli.quantities import read_moment
from blixard.cli.root import PLAIN, examples
from blixard.cli.signals import catch_signals
from blixard.client.contract import AsyncClient
from blixard.domain.ids import check_id
from blixard.domain.limits import MAX_LIST_JOBS
from blixard.domain.state_machine import JobState
from blixard.errors import BlixardError, InvalidRequest, JobNotFound
from blixard.protocol.jobs import JobDetail, JobFilter, JobView, LogEntry

app = typer.Typer(rich_markup_mode=PLAIN)
LAST = "last"
LOOK_SECONDS = 0.5
"""Between two looks at whether a followed job has ended."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of a job, or `last`.", autocompletion=complete_job_ids)]
Ids = Annotated[
    list[str], typer.Argument(metavar="ID...", help="Ids of jobs, or `last`.", autocompletion=complete_job_ids)
]


async def resolve_id(client: AsyncClient, given: str) -> str:
    """Return the id that is meant; ``last`` is the newest job. Raises ``InvalidRequest``, ``JobNotFound``."""
    if given != LAST:
        return check_id(given, field="job id")
    newest = (await client.jobs(limit=1)).jobs
    if not newest:
        raise JobNotFound(LAST)
    return newest[0].id


@app.command(
    help="List jobs, newest first. At most 1,000 at a time; `--cursor` continues where a list ended, `--all` goes to its end.",
    epilog=examples(
        "jobs --state failed --since 1h", "jobs --json --name facts.py:measure --limit 1000", "jobs --tag nightly --all"
    ),
)
def jobs(
    ctx: typer.Context,
    state: Annotated[
        list[JobState] | None, typer.Option(metavar="STATE", help="Only jobs in this state. Repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Only jobs of this name.")] = None,
    tag: Annotated[str | None, typer.Option(metavar="TAG", help="Only jobs with this tag.")] = None,
    queue: Annotated[str | None, typer.Option(metavar="NAME", help="Only jobs of this queue.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="ID", help="Only jobs of this map.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only jobs made since: an age (1h) or an RFC 3339 time.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Only jobs made before.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="How many, 1 to 1,000.")] = 100,
    cursor: Annotated[str | None, typer.Option(metavar="CURSOR", help="Continue an earlier list.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Continue to the end of the list.")] = False,
    as_json: Json = False,
) -> int:
    invocation: Invocation = ctx.obj
    if not 1 <= limit <= MAX_LIST_JOBS:
        raise InvalidRequest(f"--limit is {limit}; 1 to {MAX_LIST_JOBS} is allowed", field="--limit", hint="or --all")
    where = JobFilter(
        states=tuple(state or ()),
        name=name,
        tag=tag,
        queue=queue,
        batch=batch,
        since=None if since is None else read_moment(since, "--since"),
        until=None if until is None else read_moment(until, "--until"),
    )

    async def work(client: AsyncClient) -> tuple[list[JobView], str | None]:
        page = await client.jobs(where, limit=MAX_LIST_JOBS if everything else limit, cursor=cursor)
        found = list(page.jobs)
        while everything and page.cursor is not None:
            page = await client.jobs(where, limit=MAX_LIST_JOBS, cursor=page.cursor)
            found += page.jobs
        return found, page.cursor

    found, following = invocation.call(work)
    _print_jobs(found, as_json=as_json)
    if following is not None and not invocation.quiet:
        note(f"there are more: --cursor {following}")
    return 0


def _print_jobs(found: list[JobView], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    now = dt.datetime.now(dt.UTC)
    print_table(list_columns(), [job_row(job, now) for job in found], state="STATE")


@app.command(
    help="Show everything about one job: its spec, attempts, result, error and events.",
    epilog=examples("job job_01jd…", "job last --json"),
)
def job(ctx: typer.Context, job_id: Id, as_json: Json = False) -> int:
    invocation: Invocation = ctx.obj

    async def work(client: AsyncClient) -> int:
        found = await resolve_id(client, job_id)
        detail = await client.job(found)
        events = await client.events(found)
        if as_json:
            print_json({**fields_of(detail), "events": events})
        else:
            print_line(describe_job(detail, events))
        return 0

    return invocation.call(work)


@app.command(
    help="Show what a job wrote, of its newest attempt: standard output to standard output, errors to standard error.",
    epilog=examples("logs last", "logs -f job_01jd…", "logs --attempt 1 --timestamps job_01jd…"),
)
def logs(
    ctx: typer.Context,
    job_id: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    attempt: Annotated[int | None, typer.Option(metavar="N", help="Another attempt than the newest.")] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", "-t", help="Begin each line with its time.")] = False,
) -> int:
    invocation: Invocation = ctx.obj
    if follow and attempt is not None:
        raise InvalidRequest("--follow and --attempt exclude each other", field="--attempt")
    show = _stamped(_LineStamper()) if timestamps else _plain

    async def work(client: AsyncClient) -> int:
        found = await resolve_id(client, job_id)
        detail = await client.job(found)
        if follow:
            return await _follow(client, detail, show)
        await _show_attempt(client, found, attempt, show)
        return 0

    return invocation.call(work)


def _plain(entry: LogEntry) -> None:
    (write_error if entry.stream == "stderr" else write_out)(entry.data)


class _LineStamper:
    """Puts a time before every line of a stream, also when a line comes in pieces."""

    def __init__(self) -> None:
        self._open: set[str] = set()

    def stamp(self, entry: LogEntry) -> bytes:
        stamp = entry.at.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ ").encode()
        lines = entry.data.splitlines(keepends=True)
        marked = b"".join(
            line if (entry.stream in self._open and not n) else stamp + line for n, line in enumerate(lines)
        )
        (self._open.discard if entry.data.endswith(b"\n") else self._open.add)(entry.stream)
        return marked


def _stamped(stamper: _LineStamper) -> Callable[[LogEntry], None]:
    def show(entry: LogEntry) -> None:
        (write_error if entry.stream == "stderr" else write_out)(stamper.stamp(entry))

    return show


async def _show_attempt(
    client: AsyncClient, job_id: str, attempt: int | None, show: Callable[[LogEntry], None]
) -> None:
    offset = 0
    while True:
        page = await client.logs(job_id, attempt=attempt, offset=offset)
        for entry in page.entries:
            show(entry)
        if page.ended or not page.entries:
            return
        # Stay with the attempt that was the newest when we began.
        attempt, offset = page.attempt or attempt, page.offset


async def _follow(client: AsyncClient, detail: JobDetail, show: Callable[[LogEntry], None]) -> int:
    follower = LogFollower(client, detail.id, show)
    if detail.state.is_terminal:
        await follower.finish(detail.attempt)
        return 0
    if detail.attempt == 0:
        note(f"{detail.id} is {detail.state}; `blixard why {detail.id}` says what it waits for")
    with catch_signals() as interrupt:
        tasks = [
            asyncio.create_task(follower.follow(), name="logs: follow"),
            asyncio.create_task(_until_ended(client, detail.id), name="logs: until ended"),
            asyncio.create_task(interrupt.wait(), name="logs: interrupt"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if interrupt.exit_code:
            return interrupt.exit_code
    await follower.finish((await client.job(detail.id)).attempt)
    return 0


async def _until_ended(client: AsyncClient, job_id: str) -> None:
    """Look at the job now and then. Waiting for its result would make an embedded client run it: looking changes nothing."""
    while True:
        if (await client.job(job_id)).state.is_terminal:
            return
        await asyncio.sleep(LOOK_SECONDS)


@app.command(
    help="Cancel jobs. One that waits is cancelled at once, one that runs within a second or so. "
    "A map's id cancels all its jobs that have not ended.",
    epilog=examples("cancel job_01jd…", "cancel last", "cancel map_3f…_0"),
)
def cancel(ctx: typer.Context, job_ids: Ids) -> int:
    invocation: Invocation = ctx.obj

    async def cancel_one(client: AsyncClient, given: str) -> str:
        if given.startswith("map_") and "." not in given:
            return f"{given}\t{await client.cancel_batch(given)} jobs cancelled"
        reply = await client.cancel(await resolve_id(client, given))
        ended = reply.state is JobState.CANCELLED
        return f"{reply.id}\t{'cancelled' if ended else 'cancelling'}"

    return invocation.call(lambda client: _each(client, job_ids, cancel_one, invocation))


@app.command(
    help="Run failed or cancelled jobs again, with their counters set back.", epilog=examples("retry job_01jd…")
)
def retry(ctx: typer.Context, job_ids: Ids) -> int:
    invocation: Invocation = ctx.obj

    async def retry_one(client: AsyncClient, given: str) -> str:
        view = await client.retry(await resolve_id(client, given))
        return f"{view.id}\t{view.state}"

    return invocation.call(lambda client: _each(client, job_ids, retry_one, invocation))


async def _each(
    client: AsyncClient,
    given: list[str],
    act: Callable[[AsyncClient, str], Awaitable[str]],
    invocation: Invocation,
) -> int:
    """Do it for every id, whatever happened to the others; the exit code is that of the last error."""
    from blixard.cli.failures import report

    code = 0
    for item in given:
        try:
            print_line(await act(client, item))
        except BlixardError as error:
            code = report(error, invocation)
    return code


@app.command(
    help="Say why a job is not running, and what would unblock it.", epilog=examples("why last", "why --json job_01jd…")
)
def why(ctx: typer.Context, job_id: Id, as_json: Json = False) -> int:
    invocation: Invocation = ctx.obj

    async def work(client: AsyncClient) -> int:
        view = await client.why(await resolve_id(client, job_id))
        if as_json:
            print_json(view)
            return 0
        print_line(f"{view.id} is {view.state}: {view.summary}")
        for reason in view.reasons:
            print_line(f"  - {reason.text}\n    {reason.unblock}")
        return 0

    return invocation.call(work)

"""`blixard serve` and `blixard worker`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from blixard.cli.invocation import Invocation
from blixard.cli.output import note, print_line
from blixard.cli.quantities import read_pairs
from blixard.cli.root import PLAIN, examples
from blixard.domain.requirements import WorkerType
from blixard.errors import InvalidRequest
from blixard.telemetry import configure_logging

if TYPE_CHECKING:
    from blixard.api.local_worker import LocalWorker
    from blixard.api.server import Listening
    from blixard.config.settings import Settings

app = typer.Typer(rich_markup_mode=PLAIN)


@app.command(
    help="Run the server: API, store and a local worker on this data directory.\n\n"
    "It prints where it listens. SIGTERM or Ctrl-C stops it in order: running jobs are finished or given back within "
    "server.shutdown_grace; a second Ctrl-C stops at once, and nothing is lost.",
    epilog=examples("serve", "serve --port 0 --no-worker", "--data-dir /srv/blixard serve --host 0.0.0.0"),
)
def serve(
    ctx: typer.Context,
    host: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Address to listen on; default 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Port to listen on, 0 for any free one; default 3020.")
    ] = None,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Run no jobs here; other workers do.")] = False,
) -> int:
    invocation: Invocation = ctx.obj
    if invocation.overrides.get("server.url"):
        raise InvalidRequest("--server names another server; this command is one", field="--server")
    invocation.overrides |= {"server.host": host, "server.port": port}
    settings = invocation.config.settings
    configure_logging(settings.log.level, settings.log.format)
    from blixard.api.serve import run_server
    from blixard.api.server import Server

    server = Server(settings, worker=_idle_worker(settings) if no_worker else None)

    def tell(listening: Listening) -> None:
        print_line(f"listening on {listening.url}")
        if not invocation.quiet:
            _tell_details(listening)

    return run_server(settings, tell, server=server)


def _tell_details(listening: Listening) -> None:
    note(f"data directory {listening.data_dir}")
    note(f"API reference {listening.url}/api/v1/docs")
    note(f"a token is {'needed' if listening.needs_token else 'not needed'} on this address; Ctrl-C stops")


def _idle_worker(settings: Settings) -> LocalWorker:
    """Return a local worker that never starts."""
    from blixard.api.local_worker import LocalWorker
    from blixard.worker.program import program_config

    class IdleWorker(LocalWorker):
        def start(self) -> None:
            """Start nothing: other workers do the work."""

    return IdleWorker(program_config(settings), grace_seconds=0.0)


@app.command(
    help="Run one more worker: for a server, or without one for the local data directory.\n\n"
    "SIGTERM or Ctrl-C lets it finish what runs or give it back; a second one stops at once.",
    epilog=examples(
        "worker --server http://127.0.0.1:3020",
        "worker --server https://jobs.example --token $TOKEN --label zone=a --slots 4",
        "worker --type wasm --queue modules",
    ),
)
def worker(
    ctx: typer.Context,
    server: Annotated[str | None, typer.Option(metavar="URL", help="Server to work for.")] = None,
    token: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Token with the scope worker; better: BLIXARD_TOKEN.")
    ] = None,
    types: Annotated[
        list[WorkerType] | None, typer.Option("--type", metavar="TYPE", help="process, wasm or microvm. Repeatable.")
    ] = None,
    slots: Annotated[int | None, typer.Option(metavar="N", help="Jobs at the same time; default: CPUs.")] = None,
    queue: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Queue to serve. Repeatable.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Label that jobs may ask for. Repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name in lists.")] = None,
) -> int:
    invocation: Invocation = ctx.obj
    given: dict[str, object] = {
        "server.url": server,
        "server.token": token,
        "worker.types": [str(item) for item in types] if types else None,
        "worker.slots": slots,
        "worker.queues": queue or None,
        "worker.labels": read_pairs(label, "--label") if label else None,
        "worker.name": name,
    }
    invocation.overrides |= {key: value for key, value in given.items() if value is not None}
    return _work(invocation)


def _work(invocation: Invocation) -> int:
    settings = invocation.config.settings
    configure_logging(settings.log.level, settings.log.format)
    from blixard.client.embedded import is_served
    from blixard.worker.program import program_config, run_worker

    data_dir = settings.storage.data_dir
    if settings.server.url:
        config = program_config(settings, server=settings.server.url, token=settings.server.token)
        where = settings.server.url
    elif is_served(data_dir):
        config = program_config(settings, socket=str(data_dir / "server.sock"))
        where = f"the server of {data_dir}"
    else:
        config = program_config(settings)
        where = str(data_dir)

    def announce() -> None:
        if not invocation.quiet:
            note(f"working for {where}; Ctrl-C stops")

    return run_worker(config, announce)

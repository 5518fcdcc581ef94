"""The table of commands. A command's module is imported when the command is used, so that `blixard --help` is quick."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from blixard.cli.invocation import Invocation

if TYPE_CHECKING:
    # Typer brings its own copy of click and does not export these names elsewhere.
    from typer._click import Command, Context, HelpFormatter
    from typer._click.shell_completion import CompletionItem

PLAIN: None = None
"""Help in plain text: Rich costs 100 ms here, and help is piped and searched as often as it is read."""
_RUN, _LOOK, _SERVE, _CARE = "Run jobs", "Look at jobs and change them", "Servers and workers", "Look after it"
COMMANDS: dict[str, tuple[str, str, str]] = {
    "run": ("run", _RUN, "Run a script, function, command or Wasm module and pass its output and exit code on."),
    "submit": ("run", _RUN, "Store a job and return at once; prints its id."),
    "map": ("map", _RUN, "Call a function once per line of a list; carries on where it was stopped."),
    "jobs": ("jobs", _LOOK, "List jobs, newest first."),
    "job": ("jobs", _LOOK, "Show everything about one job."),
    "logs": ("jobs", _LOOK, "Show what a job wrote; -f follows it."),
    "cancel": ("jobs", _LOOK, "Cancel jobs, also running ones."),
    "retry": ("jobs", _LOOK, "Run failed or cancelled jobs again."),
    "why": ("jobs", _LOOK, "Say why a job is not running and what would unblock it."),
    "serve": ("serve", _SERVE, "Run the server with a local worker."),
    "worker": ("serve", _SERVE, "Run one more worker for a server."),
    "workers": ("admin", _SERVE, "List workers."),
    "vms": ("vm", _SERVE, "List the virtual machines of this machine."),
    "vm": ("vm", _SERVE, "Set up virtual machines; run programs in one, pause it, copy it."),
    "stats": ("admin", _SERVE, "Count jobs by state and queue."),
    "token": ("token", _SERVE, "Create, list and revoke access tokens."),
    "config": ("config", _CARE, "Show the settings and where each comes from."),
    "image": ("image", _CARE, "List, build and remove images of virtual machines."),
    "doctor": ("doctor", _CARE, "Say what works on this machine and how to get the rest."),
    "prune": ("admin", _CARE, "Remove what is past its retention time, now."),
    "version": ("admin", _CARE, "Print the version."),
}


HELP = "Run jobs in isolated sandboxes from a durable queue."


def examples(*lines: str) -> str:
    """Return the end of a help text; the mark keeps its lines as they are."""
    return "\n".join(["\b", "Examples:", *(f"  blixard {line}" for line in lines)])


class LazyGroup(TyperGroup):
    """Knows names and one line of help of all commands without importing them."""

    def list_commands(self, ctx: Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"blixard.cli.commands.{COMMANDS[cmd_name][0]}")
        return get_group(module.app).commands[cmd_name]

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        for section in dict.fromkeys(row[1] for row in COMMANDS.values()):
            with formatter.section(section):
                # The widest name decides in every section, so that all sections line up.
                formatter.write_dl(
                    [(name.ljust(8), text) for name, (_, where, text) in COMMANDS.items() if where == section]
                )

    def shell_complete(self, ctx: Context, incomplete: str) -> list[CompletionItem]:
        from typer._click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=text) for name, (_, _, text) in COMMANDS.items() if name.startswith(incomplete)
        ]
        return [*found, *super(TyperGroup, self).shell_complete(ctx, incomplete)]

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise unknown_command(args[0])
        return super().resolve_command(ctx, args)


def unknown_command(name: str) -> Exception:
    """Return the error for a first word that is no command: it may be a slip, or a program to run."""
    import difflib

    from blixard.errors import InvalidRequest

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean `blixard {close[0]}`?" if close else "`blixard --help` lists the commands"
    if name.endswith((".py", ".wasm")) or ".py:" in name:
        hint = f"did you mean `blixard run {name}`?"
    return InvalidRequest(f"there is no command {name!r}", field="command", hint=hint)


def _show_version(value: bool) -> None:
    if value:
        from blixard.cli.output import print_version

        print_version()
        raise typer.Exit


def take_global_options(
    ctx: typer.Context,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Talk to this server instead of a local data directory.")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Directory of jobs, results and logs when there is no server.")
    ] = None,
    config: Annotated[str | None, typer.Option(metavar="FILE", help="Configuration file to use.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more, and show tracebacks of bugs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but results and errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keep what the commands ask for later."""
    invocation: Invocation = ctx.obj
    invocation.overrides = {"server.url": server, "storage.data_dir": data_dir}
    invocation.config_file = config
    invocation.verbose = invocation.verbose or verbose
    invocation.quiet = quiet


def build_root() -> TyperGroup:
    app = typer.Typer(cls=LazyGroup, rich_markup_mode=PLAIN, no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback(
        help=HELP,
        epilog=examples(
            "run hello.py -- --n 3             a script as a durable job",
            "run -- ls -l                      a command",
            "map facts.py:measure files.txt    a function, once per line",
            "serve                             a server, with a worker",
        ),
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )(take_global_options)
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    return root


class WordsCommand(TyperCommand):
    """A command whose words behind ``--`` belong to the program that it starts; they stand in ``ctx.meta[TAIL]``.

    Typer drops the ``--``, but here it makes a difference: `run -- ls` is a command, `run ls` a mistake.
    """

    TAIL = "blixard.tail"

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        if "--" in args:
            cut = args.index("--")
            ctx.meta[self.TAIL] = args[cut + 1 :]
            args = args[:cut]
        return super().parse_args(ctx, args)

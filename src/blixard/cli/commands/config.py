"""`blixard config show`."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated

import msgspec
import typer

from blixard.cli.invocation import Invocation
from blixard.cli.output import print_json, print_line
from blixard.cli.root import PLAIN, examples
from blixard.config import SettingSource, describe_sources

app = typer.Typer(rich_markup_mode=PLAIN)
group = typer.Typer(rich_markup_mode=PLAIN, no_args_is_help=True, help="Show the settings and where each comes from.")
app.add_typer(group, name="config")


@app.callback()
def _() -> None: ...


class ShownSetting(msgspec.Struct, frozen=True):
    """One setting as `config show --json` prints it."""

    key: str
    value: str
    source: str


@group.command(
    help="Print all settings as they are in force, as TOML; secrets are masked.",
    epilog=examples("config show", "config show --sources", "config show --json"),
)
def show(
    ctx: typer.Context,
    sources: Annotated[bool, typer.Option("--sources", help="Say of each value where it came from.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: key, value and source of each.")] = False,
) -> int:
    invocation: Invocation = ctx.obj
    settings = describe_sources(invocation.config)
    if as_json:
        print_json([ShownSetting(item.key, item.value, item.source) for item in settings])
    else:
        print_line(_as_toml(settings, with_sources=sources))
    return 0


def _as_toml(settings: list[SettingSource], *, with_sources: bool) -> str:
    blocks = []
    for section, items in groupby(settings, key=lambda item: item.key.partition(".")[0]):
        lines = [(f"{item.key.partition('.')[2]} = {item.value}", item.source) for item in items]
        width = max(len(line) for line, _ in lines)
        shown = [f"{line:<{width}}  # {source}" if with_sources else line for line, source in lines]
        blocks.append("\n".join([f"[{section}]", *shown]))
    return "\n\n".join(blocks)

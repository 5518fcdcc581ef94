"""`blixard doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from blixard.cli.checks import Finding, Status, examine
from blixard.cli.invocation import Invocation
from blixard.cli.output import print_json, print_line, print_table
from blixard.cli.root import PLAIN, examples

app = typer.Typer(rich_markup_mode=PLAIN)


@app.command(
    help="Say what works on this machine and how to get the rest. Changes nothing. Exit code 1 when something "
    "that every user needs is missing.",
    epilog=examples("doctor", "doctor --json", "--server http://127.0.0.1:3020 doctor"),
)
def doctor(ctx: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    invocation: Invocation = ctx.obj
    findings = examine(invocation)
    if as_json:
        print_json(findings)
    else:
        _print(findings)
    return 1 if any(item.status is Status.MISSING and item.essential for item in findings) else 0


def _print(findings: list[Finding]) -> None:
    print_table(
        ("CHECK", "STATUS", "WHAT WAS FOUND"), [(f.check, str(f.status), f.found) for f in findings], state="STATUS"
    )
    hints = [item for item in findings if item.fix]
    if hints:
        print_line("")
    for item in hints:
        print_line(f"{item.check}: {item.fix}")

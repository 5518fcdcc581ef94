"""Reads the results of the demo's map (one JSON object a line) and prints what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

SHOWN = 10


def main(results: str) -> None:
    lines = [json.loads(line) for line in Path(results).read_text().splitlines()]
    facts = [line["result"] for line in lines if line["state"] == "completed"]
    parsed = [fact for fact in facts if "functions" in fact]
    console = Console()
    table = Table(title="The longest functions of this machine's Python library", title_justify="left")
    table.add_column("lines", justify="right", style="bold")
    table.add_column("function", style="cyan")
    table.add_column("file", overflow="fold")
    for fact in sorted(parsed, key=lambda fact: (-fact["longest_lines"], fact["path"]))[:SHOWN]:
        table.add_row(f"{fact['longest_lines']:,}", fact["longest"], fact["path"])
    console.print(table)
    functions = sum(fact["functions"] for fact in parsed)
    documented = sum(fact["documented"] for fact in parsed)
    console.print(
        f"{len(facts):,} files, {sum(fact['lines'] for fact in facts):,} lines, "
        f"{sum(fact['classes'] for fact in parsed):,} classes, {functions:,} functions "
        f"({documented / max(1, functions):.0%} with a docstring); {len(facts) - len(parsed)} files cannot be parsed"
    )
    failed = len(lines) - len(facts)
    if failed:
        console.print(f"[red]{failed} of {len(lines)} jobs failed[/red]: `blixard jobs --state failed`")
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])

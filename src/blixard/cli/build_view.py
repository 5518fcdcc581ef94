"""How far the build of a guest image is, on standard error: a bar on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from blixard.cli.output import note
from blixard.vm.image.builder import BuildStep, Progress


@contextlib.contextmanager
def show_build(*, quiet: bool) -> Iterator[Progress]:
    """Give what ``ImageBuilder.build`` wants as its progress. Nothing is shown for an image that is there."""
    if quiet:
        yield lambda step: None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bar() as show:
            yield show
    else:
        yield _print_step


def _print_step(step: BuildStep) -> None:
    note(f"[{step.done:4.0%}] {step.text}")


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False, no_color=bool(os.environ.get("NO_COLOR")) or None)
    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task("", total=1.0, visible=False)

        def show(step: BuildStep) -> None:
            progress.update(task, completed=step.done, description=step.text, visible=True)

        yield show

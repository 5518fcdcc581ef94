"""How far a map is, on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import msgspec

from blixard.cli.output import note, plural, show_duration, write_out

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_SECONDS = 5.0
"""Between two lines of progress where there is no terminal."""


class Tally(msgspec.Struct):
    """Jobs of a map by how they stand; ``before`` had completed when this process joined."""

    total: int
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    running: int = 0
    before: int = 0

    @property
    def ended(self) -> int:
        return self.completed + self.failed + self.cancelled

    def rate(self, seconds: float) -> float:
        return (self.ended - self.before) / seconds if seconds > 0 else 0.0

    def remaining(self, seconds: float) -> float | None:
        rate = self.rate(seconds)
        return (self.total - self.ended) / rate if rate > 0 else None


class ProgressView(Protocol):
    """Shows a tally. ``print`` writes results to standard output without tearing what is shown."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, tally: Tally) -> None: ...
    def print(self, data: bytes) -> None: ...
    def warn(self, text: str) -> None: ...


def choose_view(*, quiet: bool) -> ProgressView:
    if quiet:
        return SilentView()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return BarView()
    return LineView()


class SilentView:
    """Shows nothing; writes results and warnings."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def show(self, tally: Tally) -> None: ...

    def print(self, data: bytes) -> None:
        write_out(data)

    def warn(self, text: str) -> None:
        note(text)


class LineView(SilentView):
    """Writes a line at most every ``LINE_SECONDS``, and only when something has changed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._last = clock()
        self._shown = -1

    def show(self, tally: Tally) -> None:
        now = self._clock()
        if now - self._last < LINE_SECONDS or tally.ended in {self._shown, tally.total}:
            return
        self._last, self._shown = now, tally.ended
        note(describe_progress(tally, now - self._began))


def show_rate(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


def describe_progress(tally: Tally, seconds: float) -> str:
    remaining = tally.remaining(seconds)
    left = f", {show_duration(float(round(remaining)))} left" if remaining is not None else ""
    return (
        f"{tally.ended:,}/{tally.total:,} done, {tally.failed:,} failed, {tally.running:,} running, "
        f"{show_rate(tally.rate(seconds))}{left}"
    )


class BarView:
    """A bar at the bottom of the terminal."""

    def __init__(self) -> None:
        self._progress = _make_bar()
        self._task = self._progress.add_task("map", total=None, count="", failed="", running="", rate="", left="")
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def show(self, tally: Tally) -> None:
        seconds = time.monotonic() - self._began
        remaining = tally.remaining(seconds)
        self._progress.update(
            self._task,
            total=tally.total,
            completed=tally.ended,
            count=f"{tally.ended:,}/{tally.total:,}",
            failed=f"{tally.failed:,} failed" if tally.failed else "",
            running=f"{tally.running:,} running",
            rate=show_rate(tally.rate(seconds)),
            left=f"{show_duration(float(round(remaining)))} left" if remaining is not None else "",
        )

    def print(self, data: bytes) -> None:
        if sys.stdout.isatty():
            # The same terminal as the bar: it has to make room.
            self._print_above(data.decode("utf-8", "replace").rstrip("\n"))
        else:
            write_out(data)

    def warn(self, text: str) -> None:
        self._print_above(text)

    def _print_above(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _make_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    console = Console(stderr=True, highlight=False, no_color=bool(os.environ.get("NO_COLOR")) or None)
    columns = [
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
        TaskProgressColumn(),
        *(
            TextColumn(f"{{task.fields[{name}]}}", style=style, table_column=Column(no_wrap=True))
            for name, style in (("count", ""), ("failed", "red"), ("running", ""), ("rate", ""), ("left", ""))
        ),
    ]
    # Redirecting would send what goes to standard output to standard error.
    return Progress(
        *columns, console=console, expand=True, transient=True, redirect_stdout=False, redirect_stderr=False
    )


def summarise(tally: Tally, seconds: float) -> str:
    """Return the last line of a map."""
    parts = [f"{tally.completed:,} completed"]
    parts += [f"{tally.failed:,} failed"] if tally.failed else []
    parts += [f"{tally.cancelled:,} cancelled"] if tally.cancelled else []
    ran = tally.ended - tally.before
    speed = f" ({show_rate(tally.rate(seconds))})" if ran and seconds > 0 else ""
    return f"{plural(tally.total, 'job')}: {', '.join(parts)}; {ran:,} ran now in {show_duration(seconds)}{speed}"

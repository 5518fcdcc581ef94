"""How values and tables look, on wide and narrow terminals and in pipes."""

from __future__ import annotations

import io

import pytest

from blixard.cli.output import fit_columns, print_table, show_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0.0, "0 ms"), (0.00051, "0.51 ms"), (0.25, "250 ms"), (0.9999, "1 s"), (1.5, "1.5 s"), (59.9, "59.9 s"),
        (59.99, "1 min 00 s"), (61.0, "1 min 01 s"), (3600.0, "1 h 00 min"), (90_000.0, "25 h 00 min"),
    ],
)  # fmt: skip
def test_durations_are_short(seconds: float | None, text: str) -> None:
    assert show_duration(seconds) == text


def test_columns_are_left_out_from_the_right_and_three_always_stay() -> None:
    widths = [30, 9, 40, 5, 5]
    assert fit_columns(widths, {0, 1}, 200) == widths
    assert fit_columns(widths, {0, 1}, 80) == [30, 9, 21, 5, 5]
    assert fit_columns(widths, {0, 1}, 71) == [30, 9, 12, 5, 5]
    assert fit_columns(widths, {0, 1}, 70) == [30, 9, 18, 5]
    assert fit_columns(widths, {0, 1}, 20) == [30, 9, 12]


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


ROWS = [["job_01m85616dc1sz6p13d4pvm66ag", "completed", "a very long name that is cut somewhere", "5s", "default"]]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_id_and_the_state_are_never_cut(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    stream = Tty()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    print_table(["ID", "STATE", "NAME", "AGE", "QUEUE"], ROWS, state="STATE")
    text = stream.getvalue()
    assert "job_01m85616dc1sz6p13d4pvm66ag  completed" in text or width < 60
    assert "job_01m85616dc1sz6p13d4pvm66ag" in text
    assert ("default" in text) == (width >= 80)
    assert "\x1b[3" not in text


def test_a_cell_of_several_lines_stays_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["A", "B"], [["x\ny", "1\t2"]])
    assert capsys.readouterr().out == "A\tB\nx y\t1 2\n"

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blixard.config.units import (
    DURATION_UNITS,
    SIZE_UNITS,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("10s", 10.0),
        ("5m", 300.0),
        ("2h", 7200.0),
        ("7d", 604800.0),
        ("1.5h", 5400.0),
        (" 3 s ", 3.0),
        ("12", 12.0),
        (12, 12.0),
        (0.25, 0.25),
        ("0", 0.0),
    ],
)
def test_a_duration_is_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64KiB", 65536),
        ("64kib", 65536),
        ("10MB", 10_000_000),
        ("1 GiB", 2**30),
        ("1.5KiB", 1536),
        ("7", 7),
        (7, 7),
        (7.0, 7),
        ("0B", 0),
    ],
)
def test_a_size_is_bytes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "bad", ["", "s", "10 weeks", "7w", "-1s", "1e3s", "1s1s", True, None, [], -1, math.nan, math.inf]
)
def test_a_wrong_duration_says_which_units_exist(bad: object) -> None:
    with pytest.raises(ValueError, match="units are ms, s, m, h, d, a number alone means seconds"):
        parse_duration(bad)


@pytest.mark.parametrize("bad", ["", "KiB", "10 XB", "-1B", "1e3B", True, None, {}, -1, math.nan, math.inf])
def test_a_wrong_size_says_which_units_exist(bad: object) -> None:
    with pytest.raises(ValueError, match="units are B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, a number alone means bytes"):
        parse_size(bad)


def test_half_a_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="not a whole number of bytes"):
        parse_size("0.5B")


@given(st.integers(0, 10**18))
def test_every_size_comes_back_from_its_text(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.just(0.0) | st.floats(1e-9, 1e9))
def test_every_duration_comes_back_from_its_text(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(0, 10**6), st.sampled_from(sorted(SIZE_UNITS)))
def test_a_size_is_its_number_times_its_unit(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * SIZE_UNITS[unit]


@given(st.integers(0, 10**6), st.sampled_from(sorted(DURATION_UNITS)))
def test_a_duration_is_its_number_times_its_unit(number: int, unit: str) -> None:
    assert parse_duration(f"{number}{unit}") == float(number * DURATION_UNITS[unit])


@given(st.text(max_size=40))
def test_any_text_is_a_number_or_a_clear_error(text: str) -> None:
    for parse in (parse_duration, parse_size):
        try:
            assert parse(text) >= 0
        except ValueError as error:
            assert "units are" in str(error) or "whole number of bytes" in str(error)  # noqa: PT017  both ways are right here


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0B"), (1000, "1KB"), (1024, "1KiB"), (2**30, "1GiB"), (1025, "1025B"), (16 * 2**20, "16MiB")],
)
def test_a_size_is_shown_in_the_largest_unit_that_fits(size: int, text: str) -> None:
    assert format_size(size) == text

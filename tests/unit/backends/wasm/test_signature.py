from __future__ import annotations

import contextlib
import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blixard.backends.wasm.signature import (
    JobRefused,
    decode_values,
    decode_words,
    encode_values,
    find_function,
    find_start,
)
from blixard.backends.wasm.wire import FunctionType


def one(kind: str) -> FunctionType:
    return FunctionType((kind,), ())


@given(st.integers(-(2**70), 2**70), st.sampled_from([("i32", 32), ("i64", 64)]))
def test_an_integer_is_taken_if_its_bits_fit(value: int, kind: tuple[str, int]) -> None:
    name, bits = kind
    raw = str(value).encode()
    if -(2 ** (bits - 1)) <= value < 2**bits:
        (taken,) = decode_values(raw and b"[" + raw + b"]", "f", one(name))
        assert taken % 2**bits == value % 2**bits
        assert -(2 ** (bits - 1)) <= taken < 2 ** (bits - 1)
    else:
        with pytest.raises(JobRefused):
            decode_values(b"[" + raw + b"]", "f", one(name))


@given(st.floats())
def test_a_float_survives_there_and_back(value: float) -> None:
    written = msgspec.json.decode(encode_values([value]))
    (taken,) = decode_values(json.dumps([written]).encode(), "f", one("f64"))
    assert taken == value or (math.isnan(taken) and math.isnan(value))


@given(st.binary(max_size=40))
def test_no_bytes_upset_the_parser(raw: bytes) -> None:
    with contextlib.suppress(JobRefused):
        decode_words(raw)
    with contextlib.suppress(JobRefused):
        decode_values(raw, "f", one("i32"))


@given(st.lists(st.text(alphabet=st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]))))
def test_words_arrive_as_given(words: list[str]) -> None:
    assert decode_words(json.dumps(words).encode()) == tuple(words)


@pytest.mark.parametrize(
    ("values", "text"), [([], "null"), ([1], "1"), ([1, 2.5], "[1,2.5]"), ([math.inf], '"Infinity"')]
)
def test_none_one_and_many_values(values: list[float], text: str) -> None:
    assert bytes(encode_values(values)).decode() == text


def test_a_missing_function_names_what_there_is() -> None:
    with pytest.raises(JobRefused) as caught:
        find_function({"add": one("i32")}, "sub")
    assert caught.value.error.hint == "it exports: add"


@pytest.mark.parametrize("functions", [{}, {"_start": one("i32")}, {"main": FunctionType((), ())}])
def test_a_command_needs_a_plain_start(functions: dict[str, FunctionType]) -> None:
    with pytest.raises(JobRefused) as caught:
        find_start(functions)
    assert caught.value.error.type == "NotACommand"

from __future__ import annotations

import base64
import pickle

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blixard.domain.limits import MAX_ARGUMENTS_BYTES
from blixard.domain.payload import Encoding
from blixard.errors import InvalidRequest, LimitExceeded
from blixard.sdk.values import decode_result, encode_arguments

BIG = (1 << 63) - 1
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-BIG, BIG) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)


class Handmade:
    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handmade) and other.number == self.number

    __hash__ = None  # type: ignore[assignment]  # mutable, and nobody hashes it


class Unwilling:
    def __reduce__(self) -> str:
        raise RuntimeError("not me")


def carried(encoding: Encoding, value: object) -> object:
    """Return what the job receives as its only argument, as the executor reads it."""
    data = msgspec.json.decode(encode_arguments(encoding, (value,), {}))
    if encoding is not Encoding.JSON:
        packed = base64.b64decode(data, validate=True)
        data = msgspec.msgpack.decode(packed) if encoding is Encoding.MSGPACK else pickle.loads(packed)
    return data[0][0]


@given(value=PLAIN, encoding=st.sampled_from(list(Encoding)))
def test_plain_values_arrive_as_they_were(value: object, encoding: Encoding) -> None:
    assert carried(encoding, value) == value


@given(value=PLAIN, encoding=st.sampled_from(list(Encoding)))
def test_plain_results_come_back_as_they_were(value: object, encoding: Encoding) -> None:
    packed = msgspec.msgpack.encode(value) if encoding is Encoding.MSGPACK else pickle.dumps(value)
    text = b'"' + base64.b64encode(packed) + b'"'
    data = msgspec.json.encode(value) if encoding is Encoding.JSON else text
    assert decode_result(encoding, data) == value


@given(st.binary(max_size=200))
def test_bytes_survive_where_the_encoding_has_them(data: bytes) -> None:
    assert carried(Encoding.MSGPACK, data) == data
    assert carried(Encoding.PICKLE, data) == data
    assert carried(Encoding.JSON, data) == base64.b64encode(data).decode()


def test_pickle_carries_objects_of_any_class() -> None:
    assert carried(Encoding.PICKLE, Handmade(3)) == Handmade(3)


def test_arguments_keep_their_names() -> None:
    assert encode_arguments(Encoding.JSON, (1, "a"), {"size": 2}) == b'[[1,"a"],{"size":2}]'


@pytest.mark.parametrize("encoding", [Encoding.JSON, Encoding.MSGPACK])
def test_the_argument_that_cannot_be_written_is_named(encoding: Encoding) -> None:
    with pytest.raises(InvalidRequest, match=rf"argument 1 \(Handmade\) cannot be written as {encoding}") as caught:
        encode_arguments(encoding, (1, Handmade(2)), {"ok": 3})
    assert caught.value.field == "arguments"
    assert "'pickle'" in (caught.value.hint or "")
    with pytest.raises(InvalidRequest, match=r"argument shade \(Handmade\)"):
        encode_arguments(encoding, (1,), {"ok": 3, "shade": Handmade(2)})


def test_an_object_whose_own_code_refuses_is_named_too() -> None:
    with pytest.raises(InvalidRequest, match=r"argument 0 \(Unwilling\) cannot be written as pickle: not me"):
        encode_arguments(Encoding.PICKLE, (Unwilling(),), {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_lacks_is_refused_and_not_turned_into_null(value: float) -> None:
    with pytest.raises(InvalidRequest, match="argument 0"):
        encode_arguments(Encoding.JSON, ([value],), {})


def test_arguments_at_the_limit_pass_and_beyond_it_do_not() -> None:
    frame = len(b'[[""],{}]')
    assert len(encode_arguments(Encoding.JSON, ("x" * (MAX_ARGUMENTS_BYTES - frame),), {})) == MAX_ARGUMENTS_BYTES
    with pytest.raises(LimitExceeded, match=f"{MAX_ARGUMENTS_BYTES + 1} bytes") as caught:
        encode_arguments(Encoding.JSON, ("x" * (MAX_ARGUMENTS_BYTES - frame + 1),), {})
    assert "MAX_ARGUMENTS_BYTES" in str(caught.value)


def test_no_result_is_none() -> None:
    assert [decode_result(encoding, None) for encoding in Encoding] == [None] * 3
    assert [decode_result(encoding, b"null") for encoding in Encoding] == [None] * 3

"""Tickets and journal: what an executor has begun and finished is known exactly, at whatever point it is asked or dies."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blixard.backends.attempt import MAX_PIPELINE
from blixard.backends.executor.line import PipelinedLine
from blixard.backends.executor.messages import (
    LENGTH_BYTES,
    MAX_NOTED_BYTES,
    NOTED_TAG,
    Answer,
    Call,
    Calls,
    decode_answer,
    encode,
)
from blixard.backends.packets import InvalidPacket, packet_pair, send_packet
from blixard.backends.pipeline import Pipeline


class Ends:
    """Both ends of one line, in one process."""

    def __init__(self) -> None:
        self.near, self.far = packet_pair()
        self.near.setblocking(False)
        self.pipeline = Pipeline()
        self.pipeline.join(self.near)
        self.line = PipelinedLine(self.far)
        self.descriptors = [self.line._tickets, self.line._journal]

    def send(self, *numbers: int) -> None:
        calls = tuple(Call(number, f"job_{number}", 1, b"[]") for number in numbers)
        send_packet(self.near, encode(Calls("default", b"task", calls)))
        self.pipeline.allow(numbers)

    def begin(self) -> int:
        found = self.line.next()
        assert found is not None
        return found[1].number

    def hear(self) -> list[int]:
        """Return the numbers of all answers that were given, as the backend hears them."""
        newest = self.pipeline.look()
        heard: list[int] = []
        with contextlib.suppress(BlockingIOError):
            while data := self.near.recv(65536):
                heard += self._take(data)
        return heard + [answer.number for answer in self.pipeline.noted_before(newest + 1)]

    def _take(self, data: bytes) -> list[int]:
        if data[:1] == NOTED_TAG:
            self.pipeline.look()
            return [a.number for a in self.pipeline.noted_before(int.from_bytes(data[1:], "little") + 1)]
        answer = decode_answer(data)
        self.pipeline.look()
        return [*(a.number for a in self.pipeline.noted_before(answer.number)), answer.number]

    def close(self) -> None:
        self.pipeline.close()
        self.near.close()
        self.far.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


def answer_to(number: int, *, at: int = 0, result: bytes = b"1", retire: str | None = None) -> Answer:
    return Answer(number, at, at, 0.0, 0, result, retire=retire)


class Line(RuleBasedStateMachine):
    """The backend sends, takes back and listens; the executor begins and answers. Nobody may disagree about any call."""

    @initialize()
    def open(self) -> None:
        self.ends = Ends()
        self.number = 0
        self.sent: deque[int] = deque()  # with the executor, as the backend knows it
        self.allowed: deque[int] = deque()  # not begun
        self.running: int | None = None
        self.given: list[int] = []  # answers given and not heard
        self.now = 0

    def teardown(self) -> None:
        if hasattr(self, "ends"):
            self.ends.close()

    @precondition(lambda self: len(self.sent) < MAX_PIPELINE)
    @rule(count=st.integers(1, 8))
    def send(self, count: int) -> None:
        numbers = range(self.number + 1, self.number + 1 + count)
        self.number += count
        self.ends.send(*numbers)
        self.sent.extend(numbers)
        self.allowed.extend(numbers)

    @precondition(lambda self: self.running is None and self.allowed)
    @rule()
    def begin(self) -> None:
        self.running = self.ends.begin()
        assert self.running == self.allowed.popleft()

    @precondition(lambda self: self.running is not None)
    @rule(microseconds=st.integers(0, 2_000), size=st.sampled_from([1, MAX_NOTED_BYTES, 2_000]))
    def answer(self, microseconds: int, size: int) -> None:
        assert self.running is not None
        self.now += microseconds
        self.ends.line.answer(answer_to(self.running, at=self.now, result=b"1" * size))
        self.given.append(self.running)
        self.running = None

    @rule()
    def take_back(self) -> None:
        assert self.ends.pipeline.take_back() == set(self.allowed)
        for number in self.allowed:
            self.sent.remove(number)
        self.allowed.clear()

    @rule()
    def hear(self) -> None:
        assert self.ends.hear() == self.given
        for number in self.given:
            assert self.sent.popleft() == number
        self.given.clear()

    @rule()
    def die(self) -> None:
        """The executor is killed at this point: all but what ran is known to have ended or not to have begun."""
        self.take_back()
        self.hear()
        assert list(self.sent) == ([] if self.running is None else [self.running])
        self.ends.close()
        self.open()

    @invariant()
    def what_is_at_rest_was_told(self) -> None:
        """With nothing left to run the executor keeps no answer back, so nobody has to ask."""
        if hasattr(self, "ends") and self.running is None and not self.allowed and self.ends.line.is_at_rest:
            assert not self.ends.line._has_noted or self.given == []


Line.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestLine = Line.TestCase


@pytest.fixture
def ends() -> Ends:
    return Ends()


def test_calls_that_were_taken_back_are_skipped_and_what_is_noted_is_told_before_waiting(ends: Ends) -> None:
    ends.send(1, 2, 3)
    assert ends.begin() == 1
    assert ends.pipeline.take_back() == {2, 3}
    ends.line.answer(answer_to(1))
    with pytest.raises(BlockingIOError):
        ends.near.recv(10)
    ends.line._tell()
    assert ends.near.recv(10)[:1] == NOTED_TAG
    ends.send(4)
    assert ends.begin() == 4
    ends.close()


def test_the_last_answer_of_a_packet_tells_of_all(ends: Ends) -> None:
    ends.send(1, 2, 3)
    for _ in range(3):
        ends.line.answer(answer_to(ends.begin()))
    assert decode_answer(ends.near.recv(4096)).number == 3
    assert ends.pipeline.look() == 2
    assert [answer.number for answer in ends.pipeline.noted_before(3)] == [1, 2]
    ends.close()


@pytest.mark.parametrize("why", ["large", "late", "retires", "native output"])
def test_some_answers_are_never_kept_back(ends: Ends, why: str) -> None:
    ends.send(1, 2)
    number = ends.begin()
    answers = {
        "large": answer_to(number, result=b"1" * (MAX_NOTED_BYTES + 1)),
        "late": answer_to(number, at=10_000),
        "retires": answer_to(number, retire="worn out"),
        "native output": msgspec.structs.replace(answer_to(number), native_stdout=1),
    }
    ends.line.answer(answers[why])
    assert decode_answer(ends.near.recv(4096)) == answers[why]
    ends.close()


def test_the_journal_holds_the_largest_answers_to_all_that_an_executor_can_have(ends: Ends) -> None:
    ends.send(*range(1, MAX_PIPELINE + 2))
    largest = len(encode(answer_to(1, result=b"")))
    for number in range(1, MAX_PIPELINE + 1):
        assert ends.begin() == number
        padding = MAX_NOTED_BYTES - largest - 8
        ends.line.answer(answer_to(number, result=b"1" * padding))
    assert ends.pipeline.look() == MAX_PIPELINE
    with pytest.raises(BlockingIOError):
        ends.near.recv(1)
    ends.close()


def test_a_journal_that_is_full_keeps_no_answer_from_being_told(ends: Ends) -> None:
    ends.send(1, 2)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(ends.line._journal, bytes(4096))
    ends.line.answer(answer_to(ends.begin()))
    assert decode_answer(ends.near.recv(4096)).number == 1
    ends.close()


@pytest.mark.parametrize("garbage", [b"\xff", b"\x10\x00x", (3).to_bytes(LENGTH_BYTES, "little") + b"\xc1\xc1\xc1"])
def test_garbage_in_the_journal_is_an_error_of_its_writer(ends: Ends, garbage: bytes) -> None:
    os.write(ends.line._journal, garbage)
    with pytest.raises((InvalidPacket, msgspec.DecodeError)):
        ends.pipeline.look()
    ends.close()


def test_a_line_ends_when_the_backend_is_gone(ends: Ends) -> None:
    ends.pipeline.close()
    assert ends.line.next() is None
    near, far = packet_pair()
    near.close()
    with pytest.raises(ConnectionError):
        PipelinedLine(far)
    for sock in (far, ends.near, ends.far):
        socket.socket.close(sock)
    for descriptor in ends.descriptors:
        os.close(descriptor)

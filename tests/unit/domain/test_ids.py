"""Ids sort as they were made, whatever was made in between."""

from __future__ import annotations

import itertools
import os
import random
import re
import threading
import time

from blixard.domain.ids import IdGenerator, check_id

DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"
MANY = 50_000


def number_of(job_id: str) -> int:
    """Read an id back, digit by digit."""
    value = 0
    for digit in job_id.partition("_")[2]:
        value = value * 32 + DIGITS.index(digit)
    return value


def test_ids_are_distinct_and_sort_in_the_order_they_were_made() -> None:
    generator = IdGenerator()
    made = [generator.next("job") for _ in range(MANY)]
    assert made == sorted(set(made))
    assert all(re.fullmatch(r"job_[0-9a-z]{26}", check_id(job_id)) for job_id in made)
    numbers = [number_of(job_id) for job_id in made]
    within = [second - first == 1 for first, second in itertools.pairwise(numbers)]
    # all but the first of each millisecond are counted up by one: every carry is right
    assert sum(within) > MANY / 2


def test_the_count_within_a_millisecond_carries_into_every_digit() -> None:
    generator = IdGenerator()
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    for _ in range(500):
        generator.next("job")
        generator._last += 60_000  # the clock stands still from here on: only the count tells ids apart
        generator._random = (1 << chance.randrange(1, 79)) - 1
        first, second = number_of(generator.next("job")), number_of(generator.next("job"))
        assert second == first + 1, seed
        assert first & ((1 << 80) - 1) == generator._random - 1, seed


def test_many_at_once_are_as_those_made_one_by_one() -> None:
    generator = IdGenerator()
    generator._last, generator._pid = (time.time_ns() // 1_000_000) + 60_000, os.getpid()
    generator._random = (1 << 20) - 7  # so that the count carries over from the digits that are written for each id
    many, after = generator.next_many("job", 20), generator.next("job")
    numbers = [number_of(job_id) for job_id in [*many, after]]
    assert numbers == list(range(numbers[0], numbers[0] + 21))
    assert number_of(after) & ((1 << 80) - 1) == generator._random
    assert all(len(job_id) == 30 for job_id in many)


def test_threads_never_get_the_same_id() -> None:
    generator, made = IdGenerator(), list[str]()
    threads = [
        threading.Thread(target=lambda: made.extend(generator.next("x") for _ in range(2_000))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8_000

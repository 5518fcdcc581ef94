from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blixard.backends.sandbox.identity import HIGHEST_ID, swap_ids

IDS = st.integers(0, HIGHEST_ID)


def look_up(table: str, number: int) -> int:
    found = []
    for line in table.splitlines():
        inside, outside, count = map(int, line.split())
        if inside <= number < inside + count:
            found.append(outside + number - inside)
    assert len(found) == 1
    return found[0]


@given(first=IDS | st.sampled_from([0, 1, 65534, HIGHEST_ID]), second=IDS, other=IDS)
def test_a_map_swaps_two_ids_and_leaves_all_others(first: int, second: int, other: int) -> None:
    table = swap_ids(first, second)
    assert len(table.splitlines()) <= 5
    assert look_up(table, first) == second
    assert look_up(table, second) == first
    if other not in {first, second}:
        assert look_up(table, other) == other

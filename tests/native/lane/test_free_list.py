"""Ranges handed out and given back."""

from hypothesis import given
from hypothesis import strategies as st

from expertd._native import FreeList

SIZE = 100


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60)), max_size=60))
def test_ranges_never_overlap_and_all_of_them_come_back(steps: list[tuple[bool, int]]) -> None:
    free = FreeList(0, SIZE)
    taken: list[tuple[int, int]] = []
    for takes, number in steps:
        if takes:
            start = free.take(number)
            used = sorted([*taken, (SIZE, 0)])
            ends = [0, *(begin + length for begin, length in used)]
            widest_gap = max(begin - end for (begin, _), end in zip(used, ends, strict=False))
            assert (start is None) == (number > widest_gap)
            if start is not None:
                assert start >= 0
                assert start + number <= SIZE
                assert all(start + number <= begin or begin + length <= start for begin, length in taken)
                taken.append((start, number))
        elif taken:
            free.give_back(*taken.pop(number % len(taken)))
    for piece in taken:
        free.give_back(*piece)
    assert free.take(SIZE) == 0

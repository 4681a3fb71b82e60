"""The set of extents against Python's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.core.extent_set import ExtentSet

COUNT = 1001
SOME = st.sets(st.integers(0, COUNT - 1))


@given(SOME, SOME)
def test_it_is_a_set(one: set[int], other: set[int]) -> None:
    made, beside = ExtentSet(COUNT, one), ExtentSet(COUNT, other)
    assert list(made) == sorted(one)
    assert [extent in made for extent in range(COUNT)] == [extent in one for extent in range(COUNT)]
    both = made.copy()
    both.intersect(beside)
    assert list(both) == sorted(one & other)
    either = made.copy()
    either.unite(beside)
    assert list(either) == sorted(one | other)
    for extent in other:
        either.discard(extent)
    assert list(either) == sorted(one - other)
    either.clear()
    assert list(either) == []
    assert list(made) == sorted(one), "copies are its own no more"


@given(SOME, SOME, st.integers(0, 15), st.integers(1, 40))
def test_bits(one: set[int], other: set[int], first: int, count: int) -> None:
    first, count = 8 * first, 8 * count
    bits = sum(1 << extent - first for extent in other if first <= extent < first + count)
    made = ExtentSet(COUNT, one)
    assert made.bits(first, count) == sum(1 << extent - first for extent in one if first <= extent < first + count)
    made.update_bits(first, bits)
    assert list(made) == sorted(one | {extent for extent in other if first <= extent < first + count})


@given(SOME, st.integers(0, 100))
def test_it_grows(one: set[int], more: int) -> None:
    made = ExtentSet(COUNT, one)
    made.grow(COUNT + more)
    assert list(made) == sorted(one)
    made.add(COUNT + more - 1)
    assert COUNT + more - 1 in made


def test_bits_behind_it_are_refused() -> None:
    with pytest.raises(ValueError, match="fit"):
        ExtentSet(16).update_bits(8, 1 << 8)

"""What a resync copies: against a dumb twin over every combination of one block, and the ranges of parts."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.core.dirty_map import DirtyMap
from mirror.core.limits import BLOCK_BYTES
from mirror.core.selection import GivenUp, both, select_all, select_changed, split, with_parts

BLOCKS = 32


def map_of(blocks: set[int]) -> DirtyMap:
    made = DirtyMap(BLOCKS * BLOCK_BYTES)
    for block in blocks:
        made.mark(block * BLOCK_BYTES, 1)
    return made


def blocks_of(blocks: DirtyMap) -> set[int]:
    runs = [(offset // BLOCK_BYTES, length // BLOCK_BYTES) for offset, length in blocks.runs()]
    return {block for first, count in runs for block in range(first, first + count)}


@pytest.mark.parametrize("given_up", GivenUp)
def test_every_combination_of_what_both_sides_know_of_a_block(given_up: GivenUp) -> None:
    combinations = list(product((False, True), repeat=4))
    sets = [{block for block, one in enumerate(combinations) if one[index]} for index in range(4)]
    my_suspects = sets[1]
    maps = [map_of(one) for one in sets]
    copied, dropped = map(blocks_of, select_changed(*maps, given_up=given_up))
    for block, (here, suspect_here, there, suspect_there) in enumerate(combinations):
        if given_up is GivenUp.ITS_DATA:
            wanted = here or suspect_here or there or suspect_there
        elif given_up is GivenUp.ITS_CHANGES and there:
            wanted = True
        elif suspect_here:
            wanted = False  # this side can't bring its version, whatever the other one says
        else:
            wanted = here or (there and (not suspect_there or given_up is GivenUp.ITS_CHANGES))
        assert (block in copied) == wanted, (here, suspect_here, there, suspect_there)
    assert dropped == my_suspects & copied
    assert [blocks_of(one) for one in maps] == sets, "the maps given are not changed"


def test_a_full_resync_leaves_nothing_out() -> None:
    """Its target may have been away since before what this side suspects came about."""
    copied, dropped = map(blocks_of, select_all(map_of({1, 2})))
    assert (copied, dropped) == (set(range(BLOCKS)), {1, 2})


def test_what_two_maps_share() -> None:
    assert blocks_of(both(map_of({1, 2, 9}), map_of({2, 3, 9}))) == {2, 9}


@pytest.mark.parametrize(
    ("offset", "length", "ends", "whole"),
    [
        (0, BLOCK_BYTES, [], [(0, BLOCK_BYTES)]),
        (1, 2, [(1, 2)], []),
        (100, BLOCK_BYTES, [(100, BLOCK_BYTES - 100), (BLOCK_BYTES, 100)], []),
        (1, 2 * BLOCK_BYTES, [(1, BLOCK_BYTES - 1), (2 * BLOCK_BYTES, 1)], [(BLOCK_BYTES, BLOCK_BYTES)]),
        (BLOCK_BYTES, BLOCK_BYTES + 1, [(2 * BLOCK_BYTES, 1)], [(BLOCK_BYTES, BLOCK_BYTES)]),
    ],
)
def test_the_ends_of_a_range_and_its_whole_blocks(
    offset: int, length: int, ends: list[tuple[int, int]], whole: list[tuple[int, int]]
) -> None:
    assert split(offset, length) == (ends, whole)


RANGES = st.lists(st.tuples(st.integers(0, 3 * BLOCK_BYTES), st.integers(1, BLOCK_BYTES)), max_size=12)


@given(RANGES)
def test_parts_are_the_bytes_that_were_written(ranges: list[tuple[int, int]]) -> None:
    """Against a set of bytes; a block whose bytes are all there is whole, and a part of nothing."""
    parts: tuple[tuple[int, int], ...] = ()
    written: set[int] = set()
    completed: set[int] = set()
    for offset, length in ranges:
        ends, whole = split(offset, length)
        for at, size in whole:
            completed.update(range(at // BLOCK_BYTES, (at + size) // BLOCK_BYTES))
        parts, more = with_parts(parts, ends)
        completed.update(at // BLOCK_BYTES for at, _ in more)
        written.update(range(offset, offset + length))
    kept = [at for offset, length in parts for at in range(offset, offset + length)]
    assert len(kept) == len(set(kept))
    assert all(offset // BLOCK_BYTES == (offset + length - 1) // BLOCK_BYTES for offset, length in parts)
    of_completed = {at for block in completed for at in range(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)}
    assert of_completed <= written
    assert set(kept) | of_completed == written

"""The dirty map beside a dumb twin: a set of block numbers."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mirror.core.dirty_map import FULL, DirtyMap
from mirror.core.limits import BLOCK_BYTES, BLOCKS_PER_EXTENT, EXTENT_BYTES

# Sizes that end in the first block, the last block and the middle of an extent.
SIZES = [1, 1023, 1024, 1025, 3 * 1024, 3 * 1024 + 700]


@pytest.mark.parametrize("blocks", SIZES)
@pytest.mark.parametrize("more", [1, 323, 1024, 5000])
def test_a_map_grows(blocks: int, more: int) -> None:
    before, after = blocks * BLOCK_BYTES, (blocks + more) * BLOCK_BYTES
    known = DirtyMap(before)
    known.mark_all()
    known.grow(after)
    assert list(known.runs()) == [(0, before)], "what is new is clean"
    known.mark(before, after - before)
    assert list(known.runs()) == [(0, after)]
    whole = DirtyMap(after)
    whole.mark_all()
    assert {extent: known.bits(extent) for extent in known.extents()} == {
        extent: whole.bits(extent) for extent in whole.extents()
    }
    with pytest.raises(ValueError, match="outside"):
        known.mark(after, BLOCK_BYTES)
    with pytest.raises(ValueError, match="can't become"):
        known.grow(before)


class Twin:
    """A set of dirty block numbers."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.blocks: set[int] = set()

    def touched(self, offset: int, length: int) -> set[int]:
        return set(range(offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES))) if length else set()

    def mark(self, offset: int, length: int) -> None:
        self.blocks |= self.touched(offset, length)

    def clear(self, offset: int, length: int) -> None:
        self.blocks -= set(range(-(-offset // BLOCK_BYTES), (offset + length) // BLOCK_BYTES))

    def in_extent(self, extent: int) -> set[int]:
        start = extent * BLOCKS_PER_EXTENT
        return {block - start for block in self.blocks if start <= block < start + BLOCKS_PER_EXTENT}

    def runs(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for block in sorted(self.blocks):
            if found and found[-1][0] + found[-1][1] == block * BLOCK_BYTES:
                found[-1] = (found[-1][0], found[-1][1] + BLOCK_BYTES)
            else:
                found.append((block * BLOCK_BYTES, BLOCK_BYTES))
        return found

    def next_run(self, offset: int, max_bytes: int) -> tuple[int, int] | None:
        block = min((one for one in self.blocks if one >= offset // BLOCK_BYTES), default=None)
        if block is None:
            return None
        end = block
        while end in self.blocks and end - block < max_bytes // BLOCK_BYTES:
            end += 1
        return block * BLOCK_BYTES, (end - block) * BLOCK_BYTES


def bits_of(blocks: set[int]) -> int:
    return sum(1 << block for block in blocks)


def assert_same(dirty: DirtyMap, twin: Twin) -> None:
    assert dirty.dirty_blocks == len(twin.blocks)
    assert dirty.dirty_bytes == len(twin.blocks) * BLOCK_BYTES
    assert dirty.extents() == sorted({block // BLOCKS_PER_EXTENT for block in twin.blocks})
    for extent in range(dirty.extent_count):
        assert dirty.bits(extent) == bits_of(twin.in_extent(extent))
    assert list(dirty.runs()) == twin.runs()


@st.composite
def ranges(draw: st.DrawFn, size_bytes: int) -> tuple[int, int]:
    """A range of the volume: unaligned or near a boundary, empty or over extents."""
    edges = st.sampled_from([*range(0, size_bytes + 1, EXTENT_BYTES), size_bytes])
    near = st.builds(lambda edge, by: edge + by, edges, st.integers(-2 * BLOCK_BYTES, 2 * BLOCK_BYTES))
    point = st.one_of(st.integers(0, size_bytes), near).map(lambda at: max(0, min(size_bytes, at)))
    start, end = sorted((draw(point), draw(point)))
    if draw(st.booleans()):
        start = start // BLOCK_BYTES * BLOCK_BYTES
        end = min(end, start + BLOCK_BYTES)
    return start, end - start


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[str, tuple[int, int]]]]:
    size_bytes = draw(st.sampled_from(SIZES)) * BLOCK_BYTES
    verbs = st.sampled_from(
        ["mark", "mark", "mark", "clear", "mark_extent", "set_bits", "merge", "mark_all", "clear_all"]
    )
    return size_bytes, draw(st.lists(st.tuples(verbs, ranges(size_bytes)), max_size=12))


def perform(dirty: DirtyMap, twin: Twin, verb: str, offset: int, length: int) -> None:
    extent = min(offset // EXTENT_BYTES, dirty.extent_count - 1)
    extent_start = extent * EXTENT_BYTES
    extent_length = min(EXTENT_BYTES, dirty.size_bytes - extent_start)
    if verb == "mark":
        dirty.mark(offset, length)
        twin.mark(offset, length)
    elif verb == "clear":
        dirty.clear(offset, length)
        twin.clear(offset, length)
    elif verb == "mark_extent":
        dirty.mark_extent(extent)
        twin.mark(extent_start, extent_length)
    elif verb == "set_bits":
        wanted = twin.touched(offset, min(length, extent_start + extent_length - offset))
        twin.blocks -= twin.touched(extent_start, extent_length)
        twin.blocks |= wanted
        dirty.set_bits(extent, bits_of(twin.in_extent(extent)))
    elif verb == "merge":
        other = DirtyMap(dirty.size_bytes)
        other.mark(offset, length)
        dirty.merge(other)
        twin.mark(offset, length)
    elif verb == "mark_all":
        dirty.mark_all()
        twin.mark(0, dirty.size_bytes)
    else:
        dirty.clear_all()
        twin.blocks.clear()


@settings(deadline=None)
@given(histories())
def test_every_history_leaves_what_a_set_of_blocks_would_hold(
    history: tuple[int, list[tuple[str, tuple[int, int]]]],
) -> None:
    size_bytes, steps = history
    dirty, twin = DirtyMap(size_bytes), Twin(size_bytes)
    for verb, (offset, length) in steps:
        perform(dirty, twin, verb, offset, length)
    assert_same(dirty, twin)


@pytest.mark.parametrize("blocks", SIZES)
def test_so_does_a_long_one(rng: random.Random, blocks: int) -> None:
    dirty, twin = DirtyMap(blocks * BLOCK_BYTES), Twin(blocks * BLOCK_BYTES)
    verbs = ["mark", "mark", "clear", "clear", "mark_extent", "set_bits", "merge"]
    for _ in range(60):
        start, end = sorted(rng.choice([0, rng.randrange(twin.size_bytes), twin.size_bytes]) for _ in range(2))
        perform(dirty, twin, rng.choice(verbs), start, end - start)
        assert_same(dirty, twin)
    dirty.clear(0, twin.size_bytes)
    assert dirty.next_run(0, BLOCK_BYTES) is None


@settings(deadline=None)
@given(st.sampled_from(SIZES), st.data())
def test_questions_are_answered_as_a_set_of_blocks_would(blocks: int, data: st.DataObject) -> None:
    size_bytes = blocks * BLOCK_BYTES
    dirty, twin = DirtyMap(size_bytes), Twin(size_bytes)
    for offset, length in data.draw(st.lists(ranges(size_bytes), max_size=6)):
        dirty.mark(offset, length)
        twin.mark(offset, length)
    offset, length = data.draw(ranges(size_bytes))
    max_bytes = data.draw(
        st.one_of(st.integers(BLOCK_BYTES, 4 * BLOCK_BYTES), st.integers(BLOCK_BYTES, 2 * size_bytes + BLOCK_BYTES))
    )
    assert dirty.is_dirty(offset, length) == bool(twin.blocks & twin.touched(offset, length))
    assert dirty.next_run(offset, max_bytes) == twin.next_run(offset, max_bytes)


@settings(deadline=None)
@given(st.sampled_from(SIZES), st.integers(1, 5 * EXTENT_BYTES))
@example(3 * 1024, EXTENT_BYTES)
def test_walking_in_bounded_runs_visits_each_dirty_block_once(blocks: int, max_bytes: int) -> None:
    dirty = DirtyMap(blocks * BLOCK_BYTES)
    dirty.mark_all()
    at, seen = 0, 0
    max_bytes = max(max_bytes, BLOCK_BYTES)
    while (run := dirty.next_run(at, max_bytes)) is not None:
        assert run[0] == at
        assert BLOCK_BYTES <= run[1] <= max_bytes
        at, seen = run[0] + run[1], seen + run[1]
    assert seen == dirty.dirty_bytes


def test_a_partial_block_is_marked_but_not_cleared() -> None:
    dirty = DirtyMap(4 * BLOCK_BYTES)
    dirty.mark(BLOCK_BYTES - 1, 2)
    assert list(dirty.runs()) == [(0, 2 * BLOCK_BYTES)]
    dirty.clear(1, 3 * BLOCK_BYTES)
    assert list(dirty.runs()) == [(0, BLOCK_BYTES)]


def test_full_extents_share_one_integer() -> None:
    dirty = DirtyMap(4 * EXTENT_BYTES)
    for extent in range(2):
        for block in range(BLOCKS_PER_EXTENT):
            dirty.mark(extent * EXTENT_BYTES + block * BLOCK_BYTES, BLOCK_BYTES)
    dirty.mark(2 * EXTENT_BYTES, EXTENT_BYTES)
    dirty.set_bits(3, (1 << BLOCKS_PER_EXTENT) - 1)
    assert all(dirty.bits(extent) is FULL for extent in range(4))


def test_a_clean_extent_takes_no_memory() -> None:
    dirty = DirtyMap(4 * EXTENT_BYTES)
    dirty.mark(EXTENT_BYTES, EXTENT_BYTES)
    dirty.clear(EXTENT_BYTES, EXTENT_BYTES)
    assert dirty._bits == {}


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (-BLOCK_BYTES, BLOCK_BYTES), (0, 9 * BLOCK_BYTES), (9 * BLOCK_BYTES, 1)]
)
def test_marking_outside_the_volume_is_refused(offset: int, length: int) -> None:
    dirty = DirtyMap(8 * BLOCK_BYTES)
    with pytest.raises(ValueError, match="outside"):
        dirty.mark(offset, length)
    assert dirty.dirty_blocks == 0


def test_bits_outside_the_volume_are_refused() -> None:
    dirty = DirtyMap(8 * BLOCK_BYTES)
    with pytest.raises(ValueError, match="outside"):
        dirty.set_bits(0, 1 << 8)
    with pytest.raises(ValueError, match="outside"):
        dirty.set_bits(1, 1)
    with pytest.raises(ValueError, match="outside"):
        dirty.mark_extent(1)


@pytest.mark.parametrize("size_bytes", [0, -BLOCK_BYTES, BLOCK_BYTES + 1])
def test_a_size_that_is_no_whole_number_of_blocks_is_refused(size_bytes: int) -> None:
    with pytest.raises(ValueError, match="whole number"):
        DirtyMap(size_bytes)


def test_maps_of_two_volumes_do_not_merge() -> None:
    with pytest.raises(ValueError, match="maps of"):
        DirtyMap(BLOCK_BYTES).merge(DirtyMap(2 * BLOCK_BYTES))

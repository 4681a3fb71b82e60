"""What differs, from two maps: beside a dumb twin that walks over the blocks."""

import itertools
import random

import pytest

from mirror.core.difference import Run, Who, compare
from mirror.core.dirty_map import DirtyMap
from mirror.core.limits import BLOCK_BYTES, EXTENT_BYTES

SIZE = 3 * EXTENT_BYTES + 5 * BLOCK_BYTES


def walk(own: DirtyMap, peer: DirtyMap) -> list[Run]:
    """The same, block by block."""
    kinds: dict[tuple[bool, bool], Who | None] = {
        (False, False): None,
        (True, False): Who.OWN,
        (False, True): Who.PEER,
        (True, True): Who.BOTH,
    }
    offsets = range(0, SIZE, BLOCK_BYTES)
    blocks = [(kinds[own.is_dirty(at, 1), peer.is_dirty(at, 1)], at) for at in offsets]
    runs = []
    for who, group in itertools.groupby(blocks, key=lambda one: one[0]):
        members = list(group)
        if who is not None:
            runs.append(Run(members[0][1], len(members) * BLOCK_BYTES, who))
    return runs


@pytest.mark.parametrize("density", [1, 20, 300])
def test_runs_and_totals_are_those_of_a_walk_over_the_blocks(rng: random.Random, density: int) -> None:
    for _ in range(10):
        own, peer = DirtyMap(SIZE), DirtyMap(SIZE)
        for dirty in (own, peer):
            for _ in range(density):
                offset = rng.randrange(SIZE)
                dirty.mark(offset, min(SIZE - offset, rng.choice((1, BLOCK_BYTES, 64 * BLOCK_BYTES, EXTENT_BYTES))))
        runs = walk(own, peer)
        found = compare(own, peer, 10_000)
        assert list(found.runs) == runs
        assert found.run_count == len(runs)
        by_who = {who: sum(run.length for run in runs if run.who is who) for who in Who}
        assert (found.own_bytes, found.peer_bytes, found.both_bytes) == tuple(by_who[who] for who in Who)
        few = compare(own, peer, 2)
        assert few.runs == found.runs[:2]
        assert few[1:] == found[1:], "the totals count what is not listed"


def test_nothing_and_everything() -> None:
    own, peer = DirtyMap(SIZE), DirtyMap(SIZE)
    assert compare(own, peer, 10).runs == ()
    own.mark_all()
    assert compare(own, peer, 10).runs == (Run(0, SIZE, Who.OWN),)
    peer.mark_all()
    assert compare(own, peer, 10).runs == (Run(0, SIZE, Who.BOTH),)
    assert compare(own, peer, 10).both_bytes == SIZE

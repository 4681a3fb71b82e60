"""What differs between two replicas since their histories parted, from their two dirty maps: pure, and bounded.

Each run of blocks is listed with who changed it: this replica, the peer, or both. Totals are always complete; of the
runs only so many are kept, because a fragmented map of a large volume has millions.
"""

import enum
from collections.abc import Iterator
from typing import NamedTuple

from mirror.core.dirty_map import DirtyMap
from mirror.core.limits import BLOCK_BYTES, BLOCKS_PER_EXTENT


class Who(enum.Enum):
    """Who changed a block since the histories parted."""

    OWN = "own"
    PEER = "peer"
    BOTH = "both"


class Run(NamedTuple):
    """A run of bytes that one side changed, or both."""

    offset: int
    length: int
    who: Who


class Difference(NamedTuple):
    """All that differs: the first runs, how many there are, and bytes by who changed them."""

    runs: tuple[Run, ...]
    run_count: int
    own_bytes: int
    peer_bytes: int
    both_bytes: int

    @property
    def bytes(self) -> int:
        return self.own_bytes + self.peer_bytes + self.both_bytes


def compare(own: DirtyMap, peer: DirtyMap, runs_max: int) -> Difference:
    """The difference by both maps; of the runs at most `runs_max` are kept."""
    kept: list[Run] = []
    count = 0
    totals = dict.fromkeys(Who, 0)
    for run in _runs(own, peer):
        totals[run.who] += run.length
        count += 1
        if count <= runs_max:
            kept.append(run)
    return Difference(tuple(kept), count, totals[Who.OWN], totals[Who.PEER], totals[Who.BOTH])


def _runs(own: DirtyMap, peer: DirtyMap) -> Iterator[Run]:
    """Runs in order, neighbours of one kind joined, over the borders of extents too."""
    open_run: Run | None = None
    for first, count, who in _pieces(own, peer):
        offset, length = first * BLOCK_BYTES, count * BLOCK_BYTES
        if open_run is not None and open_run.who is who and open_run.offset + open_run.length == offset:
            open_run = open_run._replace(length=open_run.length + length)
            continue
        if open_run is not None:
            yield open_run
        open_run = Run(offset, length, who)
    if open_run is not None:
        yield open_run


def _pieces(own: DirtyMap, peer: DirtyMap) -> Iterator[tuple[int, int, Who]]:
    """(first block, blocks, who) within one extent each, in order."""
    for extent in sorted({*own.extents(), *peer.extents()}):
        mine, theirs = own.bits(extent), peer.bits(extent)
        left = mine | theirs
        block = 0
        while left:
            skipped = (left & -left).bit_length() - 1
            block += skipped
            mine, theirs = mine >> skipped, theirs >> skipped
            who = Who.BOTH if mine & theirs & 1 else Who.OWN if mine & 1 else Who.PEER
            same = {Who.BOTH: mine & theirs, Who.OWN: mine & ~theirs, Who.PEER: theirs & ~mine}[who]
            count = ((same + 1) & ~same).bit_length() - 1
            yield extent * BLOCKS_PER_EXTENT + block, count, who
            block += count
            mine, theirs = mine >> count, theirs >> count
            left = mine | theirs

"""Which blocks a resync copies, from what both sides know: their changes, and the blocks that are suspect.

A block is suspect when it was found different and nobody knows which side is right; no resync may decide that
(invariant suspect-is-not-dirty). But after a crash every extent of the log is dirty, its suspect blocks too. What keeps
the two apart: no write that a client was answered rests on a suspect block being copied. While both sides are there, a
write that touches a suspect block is stable on both before it is answered. A side that is alone and is given the whole
block no longer suspects it: it is dirty, like any other. Of a part of it the side that is alone keeps the range
(Superblock.suspect_parts), and a resync sends just that range. So a suspect block never needs to be copied.

A full resync keeps nothing: its target is void, or so far behind that what it suspects is of another time than what
its source does, and its version of a block may lack answered writes. By the operator's `--discard-my-data` all that
either side suspects is copied, too: a person has said which side is right. A policy has not, so it only gives up what
the target has changed.

Pure; the maps given are not changed.
"""

import enum
from typing import NamedTuple

from mirror.core.dirty_map import DirtyMap
from mirror.core.limits import BLOCK_BYTES

# An offset and a length in bytes.
Range = tuple[int, int]


class GivenUp(enum.Enum):
    """What a person or a policy has said of the target of a resync by bitmap."""

    NOTHING = enum.auto()
    ITS_CHANGES = enum.auto()
    ITS_DATA = enum.auto()


class Selection(NamedTuple):
    """`copied`: what the resync sends. `dropped`: the source's suspects that are none any more, all of them copied."""

    copied: DirtyMap
    dropped: DirtyMap


def select_changed(
    mine: DirtyMap, my_suspects: DirtyMap, theirs: DirtyMap, their_suspects: DirtyMap, given_up: GivenUp
) -> Selection:
    """Of a resync by bitmap; `mine` is what its source knows of."""
    copied = mine.copy()
    further = theirs.copy()
    if given_up is not GivenUp.ITS_DATA:
        copied.remove(my_suspects)
    if given_up is GivenUp.NOTHING:
        further.remove(their_suspects)
        further.remove(my_suspects)
    copied.merge(further)
    if given_up is GivenUp.ITS_DATA:
        copied.merge(my_suspects)
        copied.merge(their_suspects)
    return Selection(copied, both(my_suspects, copied))


def select_all(my_suspects: DirtyMap) -> Selection:
    """Of a full resync."""
    copied = DirtyMap(my_suspects.size_bytes)
    copied.mark_all()
    return Selection(copied, my_suspects.copy())


def both(one: DirtyMap, other: DirtyMap) -> DirtyMap:
    """What is marked in one as in the other; as quick as the first holds little."""
    common = DirtyMap(one.size_bytes)
    for extent in one.extents():
        common.set_bits(extent, one.bits(extent) & other.bits(extent))
    return common


def split(offset: int, length: int) -> tuple[list[Range], list[Range]]:
    """The ends of a range that are no whole blocks, each within one, and the whole blocks between them."""
    end = offset + length
    start, stop = -(-offset // BLOCK_BYTES) * BLOCK_BYTES, end // BLOCK_BYTES * BLOCK_BYTES
    if start > stop:
        return [(offset, length)], []
    ends = [(offset, start - offset), (stop, end - stop)]
    return [one for one in ends if one[1]], [(start, stop - start)] if start < stop else []


def with_parts(known: tuple[Range, ...], more: list[Range]) -> tuple[tuple[Range, ...], list[Range]]:
    """All parts of blocks, in order and disjoint; and the blocks that are whole with these, which are parts no more."""
    merged: list[Range] = []
    for offset, length in sorted([*known, *more]):
        if merged:
            before, before_length = merged[-1]
            if before // BLOCK_BYTES == offset // BLOCK_BYTES and offset <= before + before_length:
                merged[-1] = before, max(before_length, offset + length - before)
                continue
        merged.append((offset, length))
    return tuple(one for one in merged if one[1] < BLOCK_BYTES), [one for one in merged if one[1] == BLOCK_BYTES]

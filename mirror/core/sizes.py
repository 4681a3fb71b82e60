"""The size of a volume that grows: which one two replicas have when they meet in the middle of it.

A resize from S to N takes these durable steps. (S, N) stands for a superblock with both sizes, (S, 0) and (N, 0) for
one that knows of no resize.

    1. the primary has room for N, then records (S, N)
    2. the secondary has room for N, then records (S, N)
    3. the secondary has N: (N, 0)
    4. the primary has N: (N, 0), and clients see it at their next connect

Whoever names N in its superblock has room for it, and what is new reads as zeroes there. So a crash between any two
steps leaves one of five pairs, and `agreed_size` finds for each the one size that both can have: N once both have
recorded it, S before. Both sides may act on it one after the other and crash in between: the pairs that come of it are
among the five. Nobody writes behind S before the other side has N or the session is over; after that a dirty map
knows of it like of any write.

What lost: a size that travels with the generation (every row of the handshake's table would have had to know it), the
larger of two sizes (a replacement of another size would be taken for a resize).
"""

from typing import Protocol


class Sizes(Protocol):
    """A superblock, or what a replica says of itself."""

    @property
    def size_bytes(self) -> int: ...
    @property
    def next_size_bytes(self) -> int: ...


def agreed_size(one: Sizes, other: Sizes) -> int | None:
    """The size that both have from now on, whatever became of a resize; None where there is none."""
    if one.size_bytes == other.size_bytes:
        both_have_room = one.next_size_bytes == other.next_size_bytes != 0
        return one.next_size_bytes if both_have_room else one.size_bytes
    if one.size_bytes == other.next_size_bytes:
        return one.size_bytes
    return other.size_bytes if other.size_bytes == one.next_size_bytes else None

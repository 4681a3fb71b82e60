"""Resize: wishes over every combination, the size that two sides agree on, every order of crashes between steps."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from mirror.core.limits import BLOCK_BYTES, MIB
from mirror.core.resize import TABLE, Wish, may_grow
from mirror.core.sizes import agreed_size
from mirror.core.states import Allowed, ConnectionState, DiskState, Refused, Role

OLD, NEW, OTHER = 64 * MIB, 128 * MIB, 256 * MIB


@dataclass(frozen=True)
class Sizes:
    size_bytes: int
    next_size_bytes: int = 0


# -- wishes -----------------------------------------------------------------------------------------------------------


def wishes() -> Iterator[Wish]:
    for role, disk, connection, peer_disk, alone, wanted, following in itertools.product(
        Role,
        DiskState,
        ConnectionState,
        (None, *DiskState),
        (False, True),
        (0, OLD - BLOCK_BYTES, OLD, OLD + 1, NEW, 1 << 62),
        (0, OTHER),
    ):
        yield Wish(wanted, OLD, following, role, disk, connection, peer_disk, alone)


def test_every_wish_has_an_answer_and_every_row_a_wish() -> None:
    answers = {next(row.verdict for row in TABLE if row.fits(wish)) for wish in wishes()}
    assert answers == {row.verdict for row in TABLE}
    assert len({row.verdict.rule for row in TABLE}) == len(TABLE)
    for wish in wishes():
        verdict = may_grow(wish)
        if isinstance(verdict, Refused):
            assert verdict.remedy
            assert "{" not in verdict.reason


def test_a_volume_grows_only_on_a_good_primary_with_its_peer_in_step() -> None:
    for wish in wishes():
        verdict = may_grow(wish)
        if isinstance(verdict, Refused) or verdict.rule == "same-size":
            continue
        assert isinstance(verdict, Allowed)
        assert wish.role is Role.PRIMARY
        assert wish.disk is not DiskState.FAILED
        assert wish.wanted_bytes == NEW
        if not wish.alone:
            assert wish.connection is ConnectionState.CONNECTED
            assert wish.disk is wish.peer_disk is DiskState.UP_TO_DATE
            assert wish.next_size_bytes == 0


def test_shrinking_is_refused_with_both_sizes() -> None:
    wish = Wish(
        OLD - BLOCK_BYTES, OLD, 0, Role.PRIMARY, DiskState.UP_TO_DATE, ConnectionState.STANDALONE, None, alone=True
    )
    verdict = may_grow(wish)
    assert isinstance(verdict, Refused)
    assert f"64 MiB ({OLD} bytes)" in verdict.reason
    assert str(OLD - BLOCK_BYTES) in verdict.reason


# -- the size of two that meet ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (Sizes(OLD), Sizes(OLD), OLD),
        (Sizes(OLD, NEW), Sizes(OLD), OLD),
        (Sizes(OLD, NEW), Sizes(OLD, NEW), NEW),
        (Sizes(NEW), Sizes(OLD, NEW), NEW),
        (Sizes(NEW), Sizes(NEW), NEW),
        # Never together of one resize, but of two replicas that met others in between.
        (Sizes(OLD, NEW), Sizes(OLD, OTHER), OLD),
        (Sizes(NEW, OTHER), Sizes(OLD, NEW), NEW),
        (Sizes(OLD), Sizes(NEW), None),
        (Sizes(OLD, NEW), Sizes(OTHER), None),
        (Sizes(OLD, OTHER), Sizes(NEW, OTHER), None),
    ],
)
def test_two_that_meet_agree_on_one_size(one: Sizes, other: Sizes, expected: int | None) -> None:
    assert agreed_size(one, other) == agreed_size(other, one) == expected


EVERY = [Sizes(size, following) for size in (OLD, NEW, OTHER) for following in (0, NEW, OTHER) if following > size]
EVERY += [Sizes(size) for size in (OLD, NEW, OTHER)]


def test_every_pair_decides_alike_and_nobody_takes_a_size_that_there_is_no_room_for() -> None:
    for one, other in itertools.product(EVERY, repeat=2):
        size = agreed_size(one, other)
        assert size == agreed_size(other, one)
        if size is None:
            assert one.size_bytes != other.size_bytes
            continue
        for side in (one, other):
            assert size in (side.size_bytes, side.next_size_bytes), (one, other)
        # Whoever has a size already never gives it up.
        assert size >= max(one.size_bytes, other.size_bytes)


# -- crashes between any two steps ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """What both have durably, how far the resize in their session is (0: none), and the largest size a client saw."""

    primary: Sizes
    secondary: Sizes
    step: int = 0
    seen_bytes: int = OLD


def settle(side: Sizes, size: int) -> Sizes:
    assert size in (side.size_bytes, side.next_size_bytes), "takes a size without room for it"
    return Sizes(size)


def following(pair: Pair, wanted: int) -> Iterator[Pair]:
    """Every durable step that may come next, the primary's and the secondary's, and every crash."""
    primary, secondary = pair.primary, pair.secondary
    # A crash or a lost link; and the handshake of those who meet, whole or broken off after either side's part.
    yield replace(pair, step=0)
    size = agreed_size(primary, secondary)
    assert size is not None, f"{pair} can't meet any more"
    yield Pair(settle(primary, size), secondary, 0, pair.seen_bytes)
    yield Pair(primary, settle(secondary, size), 0, pair.seen_bytes)
    # The primary may have recorded both, and finishes by itself when the secondary is lost after its word.
    match pair.step:
        case 0:
            if primary == secondary == Sizes(primary.size_bytes) and wanted > primary.size_bytes:
                yield Pair(replace(primary, next_size_bytes=wanted), secondary, 1, pair.seen_bytes)
        case 1:
            yield replace(pair, secondary=replace(secondary, next_size_bytes=wanted), step=2)
            yield replace(pair, primary=Sizes(primary.size_bytes), step=0)
        case 2:
            yield replace(pair, secondary=Sizes(wanted), step=3)
            yield Pair(Sizes(wanted), secondary, 0, max(pair.seen_bytes, wanted))
        case 3:
            yield Pair(Sizes(wanted), secondary, 0, max(pair.seen_bytes, wanted))


def test_whatever_crashes_between_the_steps_both_find_one_size_that_no_client_has_seen_larger() -> None:
    """All that resizes to two sizes can come to, one after the other, broken off anywhere, any number of times."""
    reached, fresh = set[Pair](), {Pair(Sizes(OLD), Sizes(OLD))}
    while fresh:
        reached |= fresh
        fresh = {after for pair in fresh for wanted in (NEW, OTHER) for after in following_of(pair, wanted)} - reached
    assert len(reached) > 20
    for pair in reached:
        size = agreed_size(pair.primary, pair.secondary)
        assert size is not None
        assert size >= pair.seen_bytes, f"{pair}: a client saw more"
        assert size in (pair.primary.size_bytes, pair.primary.next_size_bytes)


def following_of(pair: Pair, wanted: int) -> Iterator[Pair]:
    # In the middle of a resize it is that one's size that counts.
    yield from following(pair, pair.primary.next_size_bytes or wanted)

"""The range lock beside a dumb twin: one list of all tickets in order of arrival, scanned whole."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from mirror.core.limits import BLOCK_BYTES, EXTENT_BYTES
from mirror.core.range_lock import RangeLock, Ticket

Range = tuple[int, int]


class Twin:
    """A ticket may go on when no earlier one overlaps it."""

    def __init__(self) -> None:
        self.tickets: list[tuple[int, Range]] = []

    def request(self, number: int, wanted: Range) -> None:
        self.tickets.append((number, wanted))

    def unlock(self, number: int) -> None:
        self.tickets = [one for one in self.tickets if one[0] != number]

    def granted(self) -> set[int]:
        found = set()
        for position, (number, (offset, length)) in enumerate(self.tickets):
            earlier = [other for _, other in self.tickets[:position]]
            if all(other + size <= offset or offset + length <= other for other, size in earlier):
                found.add(number)
        return found


class Pair:
    """Lock and twin, fed alike and compared after each step."""

    def __init__(self) -> None:
        self.lock = RangeLock()
        self.twin = Twin()
        self.tickets: dict[int, Ticket] = {}
        self.ranges: dict[int, Range] = {}
        self.next_number = 0

    def request(self, wanted: Range) -> int:
        number = self.next_number
        self.next_number += 1
        self.ranges[number] = wanted
        self.tickets[number] = self.lock.request(*wanted)
        self.twin.request(number, wanted)
        self.compare()
        return number

    def unlock(self, number: int) -> None:
        before = self.twin.granted()
        ticket = self.tickets.pop(number)
        self.twin.unlock(number)
        named = self.lock.unlock(ticket)
        numbers = [next(n for n, t in self.tickets.items() if t is one) for one in named]
        assert numbers == sorted(self.twin.granted() - before)
        self.compare()

    def compare(self) -> None:
        assert {number for number, ticket in self.tickets.items() if ticket.granted} == self.twin.granted()
        assert self.lock.idle is (not self.tickets)

    def busy(self, offset: int, length: int) -> bool:
        return any(
            self.ranges[number][0] < offset + length and offset < sum(self.ranges[number])
            for number in self.twin.granted()
            if not self.tickets[number].answered
        )


# Some blocks at the seams of extents, where ranges share one bucket, several, or none.
OFFSETS = st.integers(0, 40).map(lambda n: (n % 8) * BLOCK_BYTES + (n // 8) * (EXTENT_BYTES - 4 * BLOCK_BYTES))
LENGTHS = st.one_of(
    st.integers(1, 6).map(lambda n: n * BLOCK_BYTES), st.sampled_from([1, 100, EXTENT_BYTES, 3 * EXTENT_BYTES])
)
# Requests, returns (of any ticket, also of one that still waits), and marks as answered.
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("request"), OFFSETS, LENGTHS),
        st.tuples(st.just("unlock"), st.integers(0, 50), st.just(0)),
        st.tuples(st.just("answered"), st.integers(0, 50), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(MOVES, OFFSETS, LENGTHS)
def test_it_does_what_its_twin_does(moves: list[tuple[str, int, int]], offset: int, length: int) -> None:
    pair = Pair()
    for name, first, second in moves:
        if name == "request":
            pair.request((first, second))
        elif pair.tickets:
            number = sorted(pair.tickets)[first % len(pair.tickets)]
            if name == "unlock":
                pair.unlock(number)
            else:
                pair.tickets[number].answered = True
        assert pair.lock.busy(offset, length) is pair.busy(offset, length)
    # Whatever is left ends in the order in which it may: nobody waits for ever.
    while pair.tickets:
        ready = pair.twin.granted()
        assert ready, "a deadlock"
        pair.unlock(min(ready))
    assert pair.lock.idle


def test_it_does_what_its_twin_does_on_long_walks(rng: random.Random) -> None:
    for _ in range(40):
        pair = Pair()
        for _ in range(60):
            if len(pair.tickets) < 12 and rng.random() < 0.6:
                seam = rng.choice((0, EXTENT_BYTES, 2 * EXTENT_BYTES))
                offset = max(0, seam + rng.randint(-4, 4) * BLOCK_BYTES)
                pair.request((offset, rng.choice((1, 1, 2, 3, 1024, 2048)) * BLOCK_BYTES))
            elif pair.tickets:
                pair.unlock(rng.choice(sorted(pair.tickets)))


def test_a_large_range_is_not_starved_by_small_ones(rng: random.Random) -> None:
    lock = RangeLock()
    small = [lock.request(block * BLOCK_BYTES, BLOCK_BYTES) for block in range(16)]
    large = lock.request(0, 2 * EXTENT_BYTES)
    for _ in range(200):
        small.append(lock.request(rng.randrange(16) * BLOCK_BYTES, BLOCK_BYTES))
        held = [ticket for ticket in small if ticket.granted]
        if not held:
            break
        small.remove(held[0])
        lock.unlock(held[0])
    assert large.granted
    assert not any(ticket.granted for ticket in small)


def test_one_waiter_with_many_blockers_is_named_once() -> None:
    lock = RangeLock()
    blockers = [lock.request(n * EXTENT_BYTES - BLOCK_BYTES, 2 * BLOCK_BYTES) for n in (1, 2, 3)]
    waiter = lock.request(0, 4 * EXTENT_BYTES)
    assert not waiter.granted
    assert lock.unlock(blockers[1]) == []
    assert lock.unlock(blockers[0]) == []
    assert lock.unlock(blockers[2]) == [waiter]
    assert waiter.granted
    assert lock.unlock(waiter) == []
    assert lock.idle


def test_a_waiter_that_gives_up_lets_those_behind_it_go() -> None:
    lock = RangeLock()
    held = lock.request(0, BLOCK_BYTES)
    gives_up = lock.request(0, 4 * BLOCK_BYTES)
    behind = lock.request(2 * BLOCK_BYTES, BLOCK_BYTES)
    assert lock.unlock(gives_up) == [behind]
    assert lock.unlock(held) == []
    assert not gives_up.granted
    assert lock.unlock(behind) == []
    assert lock.idle


def test_readers_pass_what_was_answered_and_what_still_waits() -> None:
    lock = RangeLock()
    held = lock.request(0, BLOCK_BYTES)
    waiting = lock.request(0, 3 * BLOCK_BYTES)
    assert lock.busy(0, 1)
    assert not lock.busy(2 * BLOCK_BYTES, BLOCK_BYTES)
    held.answered = True
    assert not lock.busy(0, 1)
    lock.unlock(held)
    assert waiting.granted
    assert lock.busy(2 * BLOCK_BYTES, BLOCK_BYTES)
    assert "held" in repr(waiting)

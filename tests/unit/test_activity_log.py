"""The activity log beside a naive one, and after a crash at any point of its transactions."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirror.core.activity_log import NEED_STABLE, ActivityLog, DamagedLog, Rebuilt, Transaction
from mirror.core.layout import LogRecord, blank_log_record, encode_log_record, ring_position
from mirror.core.limits import (
    LOG_AHEAD_EXTENTS,
    LOG_CHANGES_MAX,
    LOG_RING_RECORDS,
    LOG_SLICE,
    LOG_SLOTS_MAX,
    RECORD_BYTES,
)

EPOCH = 3
SECTOR_BYTES = 512


class Ring:
    """The ring on a disk."""

    def __init__(self) -> None:
        self.records = [blank_log_record()] * LOG_RING_RECORDS

    def write(self, transaction: Transaction) -> None:
        self.records[transaction.position] = encode_log_record(transaction.record)

    def torn(self, transaction: Transaction, written: Sequence[int]) -> list[bytes]:
        """The ring after a crash in the write of a record, of which only these sectors reached the disk."""
        old, new = self.records[transaction.position], encode_log_record(transaction.record)
        sectors = range(0, RECORD_BYTES, SECTOR_BYTES)
        mixed = b"".join((new if index in written else old)[at : at + SECTOR_BYTES] for index, at in enumerate(sectors))
        records = list(self.records)
        records[transaction.position] = mixed
        return records


def damage(raw: bytes, bit: int) -> bytes:
    flipped = bytearray(raw)
    flipped[bit >> 3] ^= 1 << (bit & 7)
    return bytes(flipped)


def granted(log: ActivityLog, *wanted: tuple[int, int]) -> Transaction:
    transaction = log.plan(wanted)
    assert isinstance(transaction, Transaction)
    return transaction


def filled(slots: int, ring: Ring | None = None, epoch: int = EPOCH) -> ActivityLog:
    """A log whose slots hold extents 0 .. slots - 1, all stable."""
    log = ActivityLog(slots, epoch=epoch)
    for extent in range(slots):
        transaction = granted(log, (extent, extent))
        if ring is not None:
            ring.write(transaction)
        log.commit(transaction)
        log.release(extent, extent, 0)
    return log


class Twin:
    """The same log without economy: a list in order of use, and dictionaries."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.order: list[int] = []
        self.held: dict[int, int] = {}
        self.rounds: dict[int, int] = {}
        self.stable = 0
        self.next: tuple[list[tuple[int, int]], set[int]] | None = None

    def use(self, extent: int) -> None:
        self.order.remove(extent)
        self.order.append(extent)

    def hold(self, first: int, last: int) -> bool:
        extents = list(range(first, last + 1))
        if any(extent not in self.order for extent in extents):
            return False
        for extent in extents:
            self.held[extent] += 1
            self.use(extent)
        return True

    def release(self, first: int, last: int, flush_round: int) -> None:
        for extent in range(first, last + 1):
            self.held[extent] -= 1
            self.rounds[extent] = max(self.rounds[extent], flush_round)

    def waiting(self) -> list[int]:
        return [one for one in self.order if self.held[one] == 0 and self.rounds[one] > self.stable]

    def plan(self, wanted: list[tuple[int, int]]) -> list[tuple[int, int]]:
        for first, last in wanted:
            for extent in range(first, last + 1):
                if extent in self.order:
                    self.use(extent)
        done: list[tuple[int, int]] = []
        new: set[int] = set()
        kept: set[int] = set()
        for first, last in wanted:
            extents = set(range(first, last + 1))
            order, trial_new = list(self.order), new | {one for one in extents if one not in self.order}
            while len(order) + len(trial_new) > self.slots:
                can_go = [
                    one
                    for one in order
                    if self.held[one] == 0 and self.rounds[one] <= self.stable and one not in kept | extents
                ]
                if not can_go:
                    break
                order.remove(can_go[0])
            if len(order) + len(trial_new) > self.slots or len(trial_new) > LOG_CHANGES_MAX:
                break
            self.order, new, kept = order, trial_new, kept | extents
            done.append((first, last))
        if done:
            self.next = done, new
        return done

    def commit(self) -> None:
        assert self.next is not None
        done, new = self.next
        self.next = None
        for extent in new:
            self.order.append(extent)
            self.held[extent] = 0
            self.rounds[extent] = 0
        for first, last in done:
            assert self.hold(first, last)

    def abort(self) -> None:
        self.next = None


class Walk:
    """Performs the same steps on the log and on its twin, and compares them after each."""

    def __init__(self, slots: int) -> None:
        self.log = ActivityLog(slots, epoch=EPOCH)
        self.twin = Twin(slots)
        self.held: list[tuple[int, int]] = []
        self.pending: Transaction | None = None
        self.flush_round = 1

    def hold(self, one: tuple[int, int]) -> None:
        got = self.log.hold(*one)
        assert got == self.twin.hold(*one)
        self.held += [one] if got else []

    def release(self, which: int, written: bool) -> None:
        if self.held:
            one = self.held.pop(which % len(self.held))
            self.log.release(*one, self.flush_round * written)
            self.twin.release(*one, self.flush_round * written)

    def stable(self, behind: int) -> None:
        self.twin.stable = max(self.twin.stable, self.flush_round - behind)
        self.log.stable_through(self.flush_round - behind)
        self.flush_round += 1

    def plan(self, wanted: list[tuple[int, int]]) -> None:
        if self.pending is not None:
            assert self.log.plan(wanted) is None
            return
        expected = self.twin.plan(wanted)
        planned = self.log.plan(wanted)
        if not expected:
            assert planned is NEED_STABLE
            return
        assert isinstance(planned, Transaction)
        assert self.twin.next is not None
        assert list(planned.granted) == expected
        assert {extent for _, extent in planned.record.changes} == self.twin.next[1]
        self.pending = planned

    def end(self, well: bool) -> None:
        if self.pending is None:
            return
        if well:
            self.log.commit(self.pending)
            self.twin.commit()
            self.held += self.pending.granted
        else:
            self.log.abort(self.pending)
            self.twin.abort()
        self.pending = None

    def compare(self) -> None:
        assert self.log.hot_extents() == set(self.twin.order)
        assert self.log.victims_waiting() == self.twin.waiting()
        assert self.log.used == len(self.twin.order) <= self.twin.slots


ranges = st.tuples(st.integers(0, 11), st.integers(0, 2)).map(lambda pair: (pair[0], pair[0] + pair[1]))
steps = st.one_of(
    st.tuples(st.just(Walk.hold), ranges),
    st.tuples(st.just(Walk.release), st.integers(0, 20), st.booleans()),
    st.tuples(st.just(Walk.stable), st.integers(0, 2)),
    st.tuples(st.just(Walk.plan), st.lists(ranges, min_size=1, max_size=4)),
    st.tuples(st.just(Walk.end), st.booleans()),
)


@settings(deadline=None)
@given(st.integers(3, 8), st.lists(steps, max_size=60))
def test_it_holds_grants_and_evicts_as_a_naive_log_does(slots: int, history: list[tuple[Any, ...]]) -> None:
    walk = Walk(slots)
    for step, *arguments in history:
        step(walk, *arguments)
        walk.compare()


@pytest.mark.parametrize(("slots", "extents"), [(3, 6), (8, 12), (20, 60)])
def test_it_does_so_for_long(rng: random.Random, slots: int, extents: int) -> None:
    walk = Walk(slots)
    for _ in range(3000):
        first = rng.randrange(extents)
        kind = rng.random()
        if kind < 0.2:
            walk.hold((first, first + rng.choice([0, 0, 1, 2])))
        elif kind < 0.65:
            walk.release(rng.randrange(100), rng.random() < 0.8)
        elif kind < 0.75:
            walk.stable(rng.randrange(3))
        elif kind < 0.85:
            walk.plan(
                [(first, first + rng.choice([0, 0, 1, 2])) for first in rng.sample(range(extents), rng.randint(1, 3))]
            )
        else:
            walk.end(rng.random() < 0.9)
        walk.compare()
    assert walk.log.next_sequence > 50


# -- a life with a disk, and a crash in it ---------------------------------------------------------------------------


class Life:
    """Writers of random ranges over a log with a ring, keeping by themselves which extents have unfinished writes."""

    def __init__(self, rng: random.Random, slots: int, extents: int) -> None:
        self.rng = rng
        self.extents = extents
        self.ring = Ring()
        self.log = ActivityLog(slots, epoch=EPOCH)
        self.writing: list[tuple[int, int]] = []
        self.unstable: dict[int, int] = {}
        self.flush_round = 1

    def unfinished(self) -> set[int]:
        held = {extent for first, last in self.writing for extent in range(first, last + 1)}
        return held | set(self.unstable)

    def finish_some(self, share: float) -> None:
        for one in [one for one in self.writing if self.rng.random() < share]:
            self.writing.remove(one)
            self.log.release(*one, self.flush_round)
            self.unstable.update(dict.fromkeys(range(one[0], one[1] + 1), self.flush_round))

    def stabilise(self) -> None:
        """A flush on both: what was released before it began is stable. Victims are the only reason to do so here."""
        done = self.flush_round
        self.flush_round += 1
        self.log.stable_through(done)
        self.unstable = {extent: at for extent, at in self.unstable.items() if at > done}

    def wanted(self) -> list[tuple[int, int]]:
        starts = [self.rng.randrange(self.extents) for _ in range(self.rng.randint(1, 4))]
        longest = min(self.log.range_max, 17)
        return [(start, min(self.extents - 1, start + self.rng.randrange(longest))) for start in starts]

    def write_into_hot(self) -> list[tuple[int, int]]:
        """Begin writes where all is hot; what else was wanted."""
        cold = []
        for one in self.wanted():
            if self.log.hold(*one):
                self.writing.append(one)
            else:
                cold.append(one)
        return cold

    def next_transaction(self) -> Transaction:
        """Write into hot extents until something cold is wanted, then plan."""
        while True:
            self.finish_some(0.6)
            cold = self.write_into_hot()
            planned = self.log.plan(cold)
            if isinstance(planned, Transaction):
                return planned
            if planned is NEED_STABLE:
                self.finish_some(1.0)
                self.stabilise()

    def commit(self, transaction: Transaction) -> None:
        self.ring.write(transaction)
        self.log.commit(transaction)
        self.writing += transaction.granted

    def assert_covered(self, records: list[bytes]) -> Rebuilt:
        rebuilt = ActivityLog.rebuild(records, EPOCH)
        assert isinstance(rebuilt, Rebuilt)
        assert self.unfinished() <= rebuilt.extents
        return rebuilt


# Small, just over one slice of slots, and the largest, each beyond one round of the ring.
LOGS = [(17, 60, 200), (LOG_SLICE + 1, 1000, 200), (LOG_SLOTS_MAX, 40_000, 320)]


@pytest.mark.parametrize(("slots", "extents", "transactions"), LOGS)
def test_a_crash_at_any_point_finds_every_unfinished_write(
    rng: random.Random, slots: int, extents: int, transactions: int
) -> None:
    life = Life(rng, slots, extents)
    for number in range(1, transactions):
        transaction = life.next_transaction()
        # Others go on while the record is being written.
        life.write_into_hot()
        crash_here = number < 4 or rng.random() < 0.15 or transactions - number < 3
        if crash_here:
            before = life.assert_covered(life.ring.records)
            assert before.torn is None
            for sectors in ([0], list(range(7)), [7], rng.sample(range(8), 4)):
                torn = life.assert_covered(life.ring.torn(transaction, sectors))
                assert torn.torn in (None, transaction.position)
        if rng.random() < 0.05:
            # The write failed; it may stand on the disk all the same.
            if rng.random() < 0.5:
                life.ring.write(transaction)
            life.log.abort(transaction)
            life.assert_covered(life.ring.records)
            continue
        if crash_here:
            ring = Ring()
            ring.records = list(life.ring.records)
            ring.write(transaction)
            # Durable, but nobody was told yet.
            life.assert_covered(ring.records)
        life.commit(transaction)
        if crash_here:
            after = life.assert_covered(life.ring.records)
            assert after.next_sequence == life.log.next_sequence
            assert life.log.hot_extents() <= after.extents
            assert len(after.extents) <= slots


@pytest.mark.parametrize(("slots", "extents", "transactions"), LOGS)
def test_a_life_goes_on_after_a_torn_record(rng: random.Random, slots: int, extents: int, transactions: int) -> None:
    life = Life(rng, slots, extents)
    for number in range(1, transactions):
        transaction = life.next_transaction()
        if number % 37:
            life.commit(transaction)
            continue
        # The process dies and its server goes on in the same epoch: nothing is held, all that was hot is unstable.
        life.ring.records = life.ring.torn(transaction, [0, 1])
        rebuilt = life.assert_covered(life.ring.records)
        life.log = ActivityLog(slots, rebuilt.next_sequence, epoch=EPOCH, table=rebuilt.table)
        assert life.log.hot_extents() == rebuilt.extents
        assert set(life.log.victims_waiting()) == rebuilt.extents
        life.writing, life.flush_round = [], 1
        life.unstable = dict.fromkeys(rebuilt.extents, 1)
    life.assert_covered(life.ring.records)


# -- rebuilding -------------------------------------------------------------------------------------------------------


def test_an_empty_ring_is_an_empty_log() -> None:
    assert ActivityLog.rebuild(Ring().records, EPOCH) == Rebuilt(frozenset(), 1, (), None)


def test_records_of_a_former_epoch_are_ignored() -> None:
    ring = Ring()
    filled(8, ring, epoch=EPOCH - 1)
    assert ActivityLog.rebuild(ring.records, EPOCH) == Rebuilt(frozenset(), 1, (), None)
    log = ActivityLog(4, epoch=EPOCH)
    ring.write(granted(log, (100, 101)))
    rebuilt = ActivityLog.rebuild(ring.records, EPOCH)
    assert isinstance(rebuilt, Rebuilt)
    assert rebuilt.extents == {100, 101}


def test_a_record_of_a_later_epoch_is_damage() -> None:
    ring = Ring()
    filled(2, ring, epoch=EPOCH + 1)
    rebuilt = ActivityLog.rebuild(ring.records, EPOCH)
    assert isinstance(rebuilt, DamagedLog)
    assert "later than" in rebuilt.why


@pytest.mark.parametrize("count", [0, 1, 5, LOG_RING_RECORDS - 1, LOG_RING_RECORDS, 3 * LOG_RING_RECORDS + 7])
def test_one_bad_record_is_torn_only_where_the_next_one_goes(rng: random.Random, count: int) -> None:
    ring = Ring()
    log = filled(4, ring)
    for extent in range(100, 100 + count):
        transaction = granted(log, (extent, extent))
        ring.write(transaction)
        log.commit(transaction)
        log.release(extent, extent, 0)
    newest = log.next_sequence - 1
    for position in range(LOG_RING_RECORDS):
        records = list(ring.records)
        records[position] = damage(records[position], rng.randrange(RECORD_BYTES * 8))
        rebuilt = ActivityLog.rebuild(records, EPOCH)
        if position == ring_position(newest + 1):
            assert isinstance(rebuilt, Rebuilt)
            assert (rebuilt.torn, rebuilt.next_sequence) == (position, newest + 1)
        elif position == ring_position(newest):
            # Not to be told from a torn one: its transaction is taken as never written.
            assert isinstance(rebuilt, Rebuilt)
            assert (rebuilt.torn, rebuilt.next_sequence) == (position, newest)
        else:
            assert isinstance(rebuilt, DamagedLog)
            assert rebuilt.positions == (position,)


def test_two_bad_records_are_damage(rng: random.Random) -> None:
    ring = Ring()
    log = filled(8, ring)
    after = ring_position(log.next_sequence)
    for other in range(LOG_RING_RECORDS):
        if other != after:
            records = list(ring.records)
            records[after] = bytes(RECORD_BYTES)
            records[other] = damage(records[other], rng.randrange(RECORD_BYTES * 8))
            assert isinstance(ActivityLog.rebuild(records, EPOCH), DamagedLog)


def test_a_write_that_the_disk_lost_is_damage() -> None:
    ring = Ring()
    filled(8, ring)
    for sequence in range(1, 8):
        records = list(ring.records)
        records[ring_position(sequence)] = blank_log_record()
        rebuilt = ActivityLog.rebuild(records, EPOCH)
        assert isinstance(rebuilt, DamagedLog)
        assert "missing" in rebuilt.why


def test_a_record_at_another_ones_place_is_damage() -> None:
    ring = Ring()
    filled(8, ring)
    records = list(ring.records)
    records[20] = records[8]
    assert isinstance(ActivityLog.rebuild(records, EPOCH), DamagedLog)


def test_a_ring_of_another_length_is_damage() -> None:
    assert isinstance(ActivityLog.rebuild([], EPOCH), DamagedLog)
    assert isinstance(ActivityLog.rebuild(Ring().records[1:], EPOCH), DamagedLog)


def test_a_record_of_another_log_size_is_damage() -> None:
    ring = Ring()
    log = filled(8, ring)
    ring.records[ring_position(log.next_sequence)] = encode_log_record(LogRecord(EPOCH, log.next_sequence, 9, (), ()))
    assert isinstance(ActivityLog.rebuild(ring.records, EPOCH), DamagedLog)


def test_a_full_ring_that_leaves_a_slot_unnamed_is_damage() -> None:
    records = [b""] * LOG_RING_RECORDS
    for sequence in range(200, 200 + LOG_RING_RECORDS):
        records[ring_position(sequence)] = encode_log_record(
            LogRecord(EPOCH, sequence, 8, ((3, sequence),), ((0, None),))
        )
    rebuilt = ActivityLog.rebuild(records, EPOCH)
    assert isinstance(rebuilt, DamagedLog)
    assert "every slot" in rebuilt.why


@settings(deadline=None)
@given(st.lists(st.binary(max_size=64), min_size=LOG_RING_RECORDS, max_size=LOG_RING_RECORDS))
def test_garbage_is_damage(garbage: list[bytes]) -> None:
    assert isinstance(ActivityLog.rebuild([one.ljust(RECORD_BYTES, b"\0") for one in garbage], EPOCH), DamagedLog)


# -- single rules -----------------------------------------------------------------------------------------------------


def test_a_cold_extent_is_hot_only_after_commit() -> None:
    log = ActivityLog(4, epoch=EPOCH)
    assert not log.hold(1, 1)
    transaction = granted(log, (1, 1))
    assert not log.hold(1, 1)
    log.commit(transaction)
    assert log.hold(1, 1)
    assert (log.hits, log.misses, log.used) == (1, 2, 1)


def test_a_request_gets_all_its_extents_or_none() -> None:
    log = filled(4)
    assert not log.hold(3, 4)
    assert log.hold(3, 3)
    log.release(3, 3, 0)
    assert log.hold(0, 2)
    # Two slots short of three: nothing moves.
    assert log.plan([(10, 12)]) is NEED_STABLE
    assert log.hot_extents() == {0, 1, 2, 3}
    # The order of asking counts: the small one behind waits too.
    assert log.plan([(10, 12), (20, 20)]) is NEED_STABLE
    assert granted(log, (20, 20), (10, 12)).granted == ((20, 20),)


def test_neither_held_nor_unstable_extents_give_way() -> None:
    log = filled(4)
    assert log.hold(0, 1)
    log.release(1, 1, 5)
    log.release(0, 0, 0)
    assert log.hold(0, 0)
    assert log.victims_waiting() == [1]
    transaction = granted(log, (10, 11))
    assert log.hot_extents() == {0, 1}
    log.commit(transaction)
    assert log.plan([(20, 20)]) is NEED_STABLE
    log.stable_through(4)
    assert log.plan([(20, 20)]) is NEED_STABLE
    log.stable_through(5)
    assert log.victims_waiting() == []
    granted(log, (20, 20))
    assert log.hot_extents() == {0, 10, 11}


def test_an_older_round_does_not_make_a_newer_write_stable() -> None:
    log = filled(1)
    assert log.hold(0, 0)
    assert log.hold(0, 0)
    log.release(0, 0, 7)
    log.release(0, 0, 6)
    log.stable_through(6)
    assert log.plan([(1, 1)]) is NEED_STABLE
    log.stable_through(7)
    log.stable_through(3)
    granted(log, (1, 1))


def test_a_full_log_of_running_writes_has_no_victim_waiting() -> None:
    log = filled(2)
    assert log.hold(0, 1)
    assert log.plan([(5, 5)]) is NEED_STABLE
    assert log.victims_waiting() == []


def test_one_transaction_at_a_time() -> None:
    log = ActivityLog(4, epoch=EPOCH)
    assert log.plan([]) is None
    transaction = granted(log, (0, 0))
    assert log.plan([(1, 1)]) is None
    log.abort(transaction)
    with pytest.raises(AssertionError):
        log.commit(transaction)
    granted(log, (1, 1))


def test_a_victim_is_not_written_to_while_the_record_that_drops_it_is_written() -> None:
    log = filled(1)
    transaction = granted(log, (1, 1))
    assert not log.hold(0, 0)
    log.abort(transaction)
    # The record may stand on the disk: nobody may rely on what was there before.
    assert not log.hold(0, 0)
    assert not log.hold(1, 1)
    again = granted(log, (0, 0))
    assert again.record.sequence == transaction.record.sequence
    assert again.position == transaction.position


def test_a_range_that_is_hot_already_costs_no_record() -> None:
    log = filled(4)
    sequence = log.next_sequence
    transaction = granted(log, (1, 2))
    assert transaction.record.changes == ()
    log.commit(transaction)
    assert log.next_sequence == sequence
    log.release(1, 2, 1)
    assert log.victims_waiting() == [1, 2]


def test_group_commit_shares_one_record_up_to_its_bound() -> None:
    log = ActivityLog(LOG_SLOTS_MAX, epoch=EPOCH)
    wanted = [(start, start + 16) for start in range(0, 17 * 20, 17)]
    transaction = granted(log, *wanted)
    fitting = LOG_CHANGES_MAX // 17
    assert transaction.granted == tuple(wanted[:fitting])
    log.commit(transaction)
    assert granted(log, *wanted[fitting:]).granted == tuple(wanted[fitting:])


def test_a_request_larger_than_the_log_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        ActivityLog(4, epoch=EPOCH).plan([(0, 4)])
    with pytest.raises(AssertionError):
        ActivityLog(LOG_SLOTS_MAX, epoch=EPOCH).plan([(0, LOG_CHANGES_MAX)])


def test_releasing_twice_is_a_bug() -> None:
    log = filled(1)
    with pytest.raises(AssertionError):
        log.release(0, 0, 1)


def test_an_epoch_begins_at_its_first_record_or_goes_on_whole() -> None:
    with pytest.raises(AssertionError):
        ActivityLog(4, 9, epoch=EPOCH)
    with pytest.raises(AssertionError):
        ActivityLog(4, epoch=0)
    with pytest.raises(ValueError, match="slots"):
        ActivityLog(LOG_SLOTS_MAX + 1, epoch=EPOCH)


def test_a_new_epoch_begins_empty_with_another_size() -> None:
    log = ActivityLog(4, epoch=3)
    transaction = log.plan([(1, 2)])
    assert isinstance(transaction, Transaction)
    assert not log.quiet
    log.commit(transaction)
    assert not log.quiet
    with pytest.raises(AssertionError, match="held"):
        log.begin_epoch(4, 8)
    log.release(1, 2, 7)
    assert log.quiet
    log.begin_epoch(4, 8)
    assert (log.slots, log.epoch, log.next_sequence, log.hot_extents()) == (8, 4, 1, set())
    assert log.plan([(1, 8)]), "all slots are free"
    with pytest.raises(AssertionError, match="epoch"):
        ActivityLog(4, epoch=3).begin_epoch(3, 8)


def sequential(log: ActivityLog, extent: int, extents: int) -> tuple[bool, tuple[int, int] | None]:
    """One write of this extent as mirror.primary does it, what is to be logged ahead included."""
    hot = log.hold(extent, extent)
    if not hot:
        commit(log, (extent, extent))
    sure = log.reached >= 0
    wanted = log.ahead_of(log.reached if sure else extent, extents, sure) if sure or not hot else None
    log.reached = -1
    if wanted is not None:
        commit(log, wanted)
        log.logged_ahead(*wanted, 1)
    log.release(extent, extent, 1)
    return hot, wanted


def commit(log: ActivityLog, wanted: tuple[int, int]) -> None:
    transaction = log.plan([wanted])
    if transaction is NEED_STABLE:
        log.stable_through(1)
        transaction = log.plan([wanted])
    assert isinstance(transaction, Transaction)
    assert transaction.granted == (wanted,)
    log.commit(transaction)


def test_a_sequential_writer_meets_two_cold_extents_and_no_more() -> None:
    log = ActivityLog(64, epoch=1)
    seen = [sequential(log, extent, 500) for extent in range(500)]
    assert [extent for extent, (hot, _) in enumerate(seen) if not hot] == [0, 1]
    records = [wanted for _, wanted in seen if wanted is not None]
    assert records[0] == (2, 2), "the first one may be chance"
    assert records[-1][1] == 499, "not behind the end of the volume"
    assert len(records) < 500 / (LOG_AHEAD_EXTENTS // 2 - 1), "several at once"


def test_nothing_is_logged_ahead_of_random_writers_or_in_a_tiny_log() -> None:
    draw = random.Random(5)
    log = ActivityLog(64, epoch=1)
    ahead = [sequential(log, draw.randrange(100_000), 100_000)[1] for _ in range(2000)]
    assert sum(wanted is not None for wanted in ahead) < 20
    tiny = ActivityLog(3, epoch=1)
    assert all(sequential(tiny, extent, 100)[1] is None for extent in range(100))

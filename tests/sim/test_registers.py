"""The checker of histories: hand-made ones of every kind, good and bad, and random ones beside a naive checker."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.sim.history import History, Loss, Operation, Reign, Violation
from tests.sim.registers import Access, Survival, replay

SECTORS = 8


class Story:
    """A history told in a line each, with a clock of its own."""

    def __init__(self) -> None:
        self.history = History(SECTORS)
        self.now = 0

    def tick(self) -> int:
        self.now += 1
        return self.now

    def reign(
        self, replica: str, parent: Reign | None = None, loss: Loss = Loss.NONE, until: int | None = None
    ) -> Reign:
        return self.history.begin_reign(self.tick(), replica, parent, until, loss)

    def call(
        self, reign: Reign, kind: str, tag: int = 0, *, fua: bool = False, at: int = 0, count: int = 4
    ) -> Operation:
        return reign.call(self.tick(), kind, at, count, tag, fua=fua)

    def done(self, operation: Operation, *values: int) -> None:
        operation.answer(self.tick(), values * operation.count if len(values) == 1 else values)

    def write(self, reign: Reign, tag: int, *, fua: bool = False, at: int = 0, count: int = 4) -> None:
        self.done(self.call(reign, "write", tag, fua=fua, at=at, count=count))

    def read(self, reign: Reign, *values: int, at: int = 0, count: int = 4) -> Operation:
        operation = self.call(reign, "read", at=at, count=count)
        self.done(operation, *values)
        return operation

    def flush(self, reign: Reign) -> None:
        self.done(self.call(reign, "flush"))

    def broken(self) -> list[str]:
        return [violation.invariant for violation in self.history.check()]


@pytest.fixture
def story() -> Story:
    return Story()


# -- within a reign ---------------------------------------------------------------------------------------------------


def test_a_new_volume_reads_as_zeroes(story: Story) -> None:
    story.read(story.reign("a"), 0)
    assert not story.broken()


@pytest.mark.parametrize("kind", ["zero", "trim"])
def test_a_reader_sees_the_last_answered_write(story: Story, kind: str) -> None:
    reign = story.reign("a")
    story.write(reign, 1)
    story.write(reign, 2, at=2, count=1)
    story.done(story.call(reign, kind, at=3, count=1))
    story.read(reign, 1, 1, 2, 0)
    assert not story.broken()


def test_a_stale_read_is_found_and_told(story: Story) -> None:
    reign = story.reign("a")
    story.write(reign, 1)
    story.write(reign, 2, at=1, count=2)
    read = story.read(reign, 1)
    (violation,) = story.history.check()
    assert violation.invariant == "linearizable"
    assert violation.sectors == range(1, 3)
    assert [operation.tag for operation in violation.operations] == [0, 1, 2]
    assert str(violation) == (
        "linearizable: #3 read sectors 0..3 [6-7] in reign 1 (a): "
        "sectors 1..2 gave 1 (#1 write of 1 sectors 0..3 [2-3]), "
        "allowed: 2 (#2 write of 2 sectors 1..2 [4-5]). "
        "No order of the operations of this reign explains it"
    )
    assert story.history.check_read(read) == [violation]


def test_what_nobody_wrote_is_found(story: Story) -> None:
    reign = story.reign("a")
    story.read(reign, 7)
    story.write(reign, 7)
    story.read(reign, 7)
    assert story.broken() == ["linearizable"]


def test_a_misplaced_write_is_found(story: Story) -> None:
    reign = story.reign("a")
    story.write(reign, 1, at=0)
    story.read(reign, 1, at=4)
    (violation,) = story.history.check()
    assert "Nobody had written 1 there" in violation.message
    assert "#1 write of 1 sectors 0..3" in violation.message


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_writes_at_the_same_time_take_effect_in_either_order(story: Story, order: tuple[int, int]) -> None:
    reign = story.reign("a")
    operations = {tag: story.call(reign, "write", tag) for tag in (1, 2)}
    early = story.call(reign, "read")
    story.done(operations[1])
    story.done(operations[2])
    story.done(early, order[0])
    story.read(reign, order[1])
    story.read(reign, order[1])
    assert not story.broken()
    story.read(reign, order[0])
    assert story.broken() == ["linearizable"]


def test_each_sector_has_an_order_of_its_own(story: Story) -> None:
    reign = story.reign("a")
    for operation in [story.call(reign, "write", tag) for tag in (1, 2)]:
        story.done(operation)
    story.read(reign, 1, 2, 1, 2)
    assert not story.broken()


def test_a_failed_write_may_land_later_and_then_stays(story: Story) -> None:
    reign = story.reign("a")
    story.call(reign, "write", 1).fail(story.tick())
    story.read(reign, 0)
    story.write(reign, 2)
    story.read(reign, 2)
    story.read(reign, 1)
    assert not story.broken()
    story.read(reign, 2)
    assert story.broken() == ["linearizable"]


def test_a_failed_write_lands_in_some_sectors(story: Story) -> None:
    reign = story.reign("a")
    story.call(reign, "write", 1).fail(story.tick())
    story.read(reign, 0, 1, 1, 0)
    story.read(reign, 0, 1, 1, 0)
    assert not story.broken()


def test_a_read_of_an_open_write_holds_it_there(story: Story) -> None:
    reign = story.reign("a")
    story.call(reign, "write", 1)
    story.read(reign, 1)
    story.read(reign, 0)
    assert story.broken() == ["linearizable"]


def test_many_open_writes_stay_cheap(story: Story) -> None:
    reign = story.reign("a")
    for tag in range(1, 200):
        story.call(reign, "write", tag)
    for tag in range(1, 200, 7):
        story.read(reign, tag)
    assert not story.broken()
    assert story.history.unchecked == 0
    assert story.history.allowed(reign, 0) == {tag for tag in range(1, 200) if tag % 7 != 1 or tag == 197}


def test_too_many_orders_are_counted_and_not_called_wrong(story: Story) -> None:
    reign = story.reign("a")
    operations = [story.call(reign, "write", tag) for tag in range(1, 40)]
    for operation in operations:
        story.done(operation)
    story.read(reign, 1)
    assert not story.broken()
    assert story.history.unchecked == 1


def test_only_the_first_wrong_read_of_a_sector_is_told(story: Story) -> None:
    reign = story.reign("a")
    story.write(reign, 1)
    story.read(reign, 0)
    story.read(reign, 0)
    assert story.broken() == ["linearizable"]


# -- from reign to reign ----------------------------------------------------------------------------------------------


def test_a_lost_acknowledged_write_breaks_ack_c(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    story.write(first, 2)
    second = story.reign("b", first)
    story.read(second, 2, 2, 1, 1)
    (violation,) = story.history.check()
    assert violation.invariant == "ack-c"
    assert violation.sectors == range(2, 4)
    assert "all that reign 1 (a) had answered by" in violation.message


@pytest.mark.parametrize("value", [1, 2])
def test_an_open_write_took_effect_or_never_will(story: Story, value: int) -> None:
    first = story.reign("a")
    story.write(first, 1)
    story.call(first, "write", 2)
    second = story.reign("b", first)
    story.read(second, value)
    story.read(second, value)
    assert not story.broken()


def test_an_open_write_that_was_read_may_not_vanish(story: Story) -> None:
    first = story.reign("a")
    story.call(first, "write", 1)
    story.read(first, 1)
    second = story.reign("b", first)
    story.read(second, 0)
    assert story.broken() == ["ack-c"]


def test_an_old_write_that_lands_late_is_found(story: Story) -> None:
    first = story.reign("a")
    story.call(first, "write", 1)
    second = story.reign("b", first)
    story.read(second, 0)
    story.read(second, 1)
    (violation,) = story.history.check()
    assert violation.invariant == "drain-before-next"
    assert "#1 write of 1 sectors 0..3 [2-, no answer] of reign 1 (a) landed" in violation.message


def test_an_old_write_that_lands_over_a_newer_is_found(story: Story) -> None:
    first = story.reign("a")
    story.call(first, "write", 1)
    second = story.reign("b", first)
    story.write(second, 2)
    story.read(second, 1)
    assert story.broken() == ["drain-before-next"]


def test_what_a_read_saw_holds_for_the_next_reign_too(story: Story) -> None:
    first = story.reign("a")
    story.call(first, "write", 1)
    second = story.reign("b", first)
    story.read(second, 0)
    third = story.reign("a", second)
    story.read(third, 1)
    assert story.broken() == ["ack-c"]


def test_split_histories_are_independent(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    story.call(first, "write", 5, at=4)
    second = story.reign("b", first)
    story.write(first, 2)
    story.write(second, 3)
    story.read(first, 2)
    story.read(second, 3)
    story.read(first, 5, at=4)
    story.read(second, 0, at=4)
    third = story.reign("b", second)
    story.read(third, 3)
    assert not story.broken()


def test_mixed_histories_are_found(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    second = story.reign("b", first)
    story.write(first, 2)
    story.read(second, 2)
    assert story.broken() == ["split-brain-found"]


def test_a_copy_that_stopped_following_lacks_what_came_after(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    cut = story.now
    story.write(first, 2)
    second = story.reign("b", first, until=cut)
    story.read(second, 1)
    assert not story.broken()


def test_a_forced_copy_may_hold_anything_that_was_written_there_but_keeps_it(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    story.write(first, 2)
    story.flush(first)
    second = story.reign("b", first, Loss.ANY)
    story.read(second, 0, 1, 2, 2)
    assert not story.broken()
    story.read(second, 0, 1, 1, 2)
    assert story.broken() == ["linearizable"]


# -- power cuts -------------------------------------------------------------------------------------------------------


def test_what_was_not_flushed_may_be_lost_in_pieces(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    story.flush(first)
    story.write(first, 2)
    story.write(first, 3)
    story.call(first, "write", 4)
    second = story.reign("a", first, Loss.UNFLUSHED)
    story.read(second, 1, 2, 3, 4)
    assert not story.broken()


@pytest.mark.parametrize("fua", [False, True])
def test_what_was_flushed_may_not_be_lost(story: Story, fua: bool) -> None:
    first = story.reign("a")
    story.write(first, 1)
    story.write(first, 2, fua=fua)
    if not fua:
        story.flush(first)
    second = story.reign("a", first, Loss.UNFLUSHED)
    story.read(second, 1, 2, 0, 2)
    assert story.broken() == ["flush", "flush"]


def test_a_flush_covers_only_what_was_answered_before_it_and_only_once_answered(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    late = story.call(first, "write", 2)
    flush = story.call(first, "flush")
    story.done(late)
    assert story.history.flushed(first, 0, story.now) == {0, 1, 2}
    story.done(flush)
    assert story.history.flushed(first, 0, story.now) == {1, 2}
    story.call(first, "flush").fail(story.tick())
    assert story.history.flushed(first, 0, story.now) == {1, 2}
    story.flush(first)
    assert story.history.flushed(first, 0) == {2}


def test_a_read_tells_which_of_two_writes_came_last(story: Story) -> None:
    first = story.reign("a")
    operations = [story.call(first, "write", tag) for tag in (1, 2)]
    for operation in operations:
        story.done(operation)
    story.flush(first)
    assert story.history.flushed(first, 0) == {1, 2}
    story.read(first, 2)
    assert story.history.flushed(first, 0) == {2}


def test_what_a_flush_made_stable_stays_so_over_three_reigns(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    story.flush(first)
    story.write(first, 2)
    second = story.reign("b", first)
    story.write(second, 3, count=1)
    third = story.reign("a", second)
    fourth = story.reign("a", third, Loss.UNFLUSHED)
    assert story.history.allowed(fourth, 0) == {1, 2, 3}
    assert story.history.allowed(fourth, 1) == {1, 2}
    story.read(fourth, 3, 2, 1, 0)
    assert story.broken() == ["flush"]


def test_a_flush_covers_what_its_reign_began_with(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    story.call(first, "write", 2)
    second = story.reign("b", first)
    assert story.history.flushed(second, 0) == {0, 1, 2}
    story.flush(second)
    assert story.history.flushed(second, 0) == {1, 2}
    story.read(second, 2)
    assert story.history.flushed(second, 0) == {2}


def test_a_flush_lost_before_a_promotion_is_told_as_such(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    story.flush(first)
    second = story.reign("a", first, Loss.UNFLUSHED)
    third = story.reign("b", second)
    story.read(third, 0)
    assert story.broken() == ["flush"]


def test_a_second_power_cut_may_show_what_the_first_did_not(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    second = story.reign("a", first, Loss.UNFLUSHED)
    story.read(second, 1)
    third = story.reign("b", second, Loss.UNFLUSHED)
    story.read(third, 0)
    assert not story.broken()


def test_but_not_where_the_start_was_stable(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    second = story.history.begin_reign(story.tick(), "a", first, None, Loss.UNFLUSHED, start_is_stable=True)
    story.read(second, 1)
    third = story.reign("b", second, Loss.UNFLUSHED)
    story.read(third, 0)
    assert story.broken() == ["flush"]


# -- disks beside the history -----------------------------------------------------------------------------------------


def test_disks_are_compared_with_what_may_be_there(story: Story) -> None:
    reign = story.reign("a")
    story.write(reign, 1)
    story.flush(reign)
    story.write(reign, 2)
    history = story.history
    assert not history.check_contents(reign, [2] * 4 + [0] * 4, "disk of a")
    assert not history.check_stable(reign, [1, 2, 2, 1] + [0] * 4, "disk of b")
    (violation,) = history.check_contents(reign, [2, 2, 1, 1] + [0] * 4, "disk of a")
    assert (violation.invariant, violation.sectors) == ("same-order", range(2, 4))
    (violation,) = history.check_stable(reign, [1, 2, 2, 0] + [0] * 4, "disk of b")
    assert str(violation) == (
        "flush: disk of b, on stable storage, after reign 1 (a): sector 3 gave 0,"
        " allowed: 1 (#1 write of 1 sectors 0..3 [2-3]), or 2 (#3 write of 2 sectors 0..3 [6-7])"
    )


# -- beside a naive checker -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Tiny:
    """An operation of the naive checker."""

    writes: bool
    fua: bool
    call_time: int
    done_time: int | None


def orders(accesses: list[Access], start: int) -> Iterator[list[Access]]:
    """Every order of every choice of the open writes that respects time and gives each read what it read."""
    answered = [access for access in accesses if access.operation.done_time is not None]
    still_open = [access for access in accesses if access.operation.done_time is None and access.operation.writes]
    for size in range(len(still_open) + 1):
        for chosen in itertools.combinations(still_open, size):
            for order in itertools.permutations([*answered, *chosen]):
                if respects_time(order) and reads_right(order, start):
                    yield [access for access in order if access.operation.writes]


def respects_time(order: tuple[Access, ...]) -> bool:
    return not any(
        later.operation.done_time is not None and later.operation.done_time < earlier.operation.call_time
        for earlier, later in itertools.combinations(order, 2)
    )


def reads_right(order: tuple[Access, ...], value: int) -> bool:
    for access in order:
        if access.operation.writes:
            value = access.value
        elif access.value != value:
            return False
    return True


def naive_survivors(
    accesses: list[Access], starts: frozenset[int], older: frozenset[int], flush_time: int | None
) -> frozenset[int]:
    found: set[int] = set()
    for start in starts:
        for order in orders(accesses, start):
            kept = [start] if flush_time is not None else [start, *older, *starts]
            for access in order:
                done_time = access.operation.done_time
                covered = flush_time is not None and done_time is not None and done_time < flush_time
                if done_time is not None and (covered or access.operation.fua):
                    kept = []
                kept.append(access.value)
            found |= set(kept)
    return frozenset(found)


def tiny_history(rng: random.Random) -> list[Access]:
    """Mostly right: what reads give is drawn from what a simple volume held meanwhile, and now and then anything."""
    count = rng.randrange(1, 6)
    times = rng.sample(range(1, 30), 2 * count)
    if rng.random() < 0.3:
        times.sort()
    accesses = []
    tags = list(range(1, count + 1))
    for index in range(count):
        call_time, done_time = sorted(times[2 * index : 2 * index + 2])
        is_open = rng.random() < 0.25
        writes = rng.random() < 0.6
        value = rng.choice([0, tags[index], tags[index]]) if writes else rng.choice([0, *tags])
        accesses.append(Access(Tiny(writes, rng.random() < 0.2, call_time, None if is_open else done_time), value))
    rng.shuffle(accesses)
    return accesses


@pytest.mark.parametrize("seed", range(20))
def test_it_agrees_with_a_naive_checker(seed: int) -> None:
    rng = random.Random(seed)
    verdicts = set()
    for _ in range(60):
        accesses = tiny_history(rng)
        starts = frozenset(rng.sample([0, 1, 2, 9], rng.randrange(1, 3)))
        result = replay(starts, accesses)
        finals = {order[-1].value if order else start for start in starts for order in orders(accesses, start)}
        verdicts.add(bool(finals))
        assert bool(result.refused) == (not finals), accesses
        if finals:
            assert result.values == finals, accesses
            flush_time = rng.choice([None, rng.randrange(31)])
            older = frozenset({8, *starts})
            expected = naive_survivors(accesses, starts, older, flush_time)
            assert Survival(starts, lambda older=older: older, accesses, flush_time, 31).values() == expected, (
                accesses,
                flush_time,
            )
    assert verdicts == {False, True}


# -- whole lives ------------------------------------------------------------------------------------------------------


class Life:
    """A volume that keeps its promises, with clients, failovers and power cuts; read number `lie` gives anything."""

    def __init__(self, seed: int, lie: int | None = None) -> None:
        self.rng = random.Random(seed)
        self.lie = lie
        self.story = Story()
        self.reign = self.story.reign("a")
        self.contents = [0] * SECTORS
        self.kept: list[set[int]] = [{0} for _ in range(SECTORS)]
        self.under_way: list[Operation] = []
        self.reads: list[Operation] = []
        # What was said of each read at its answer.
        self.told: list[Violation] = []
        for tag in range(1, 150):
            action = self.rng.random()
            if action < 0.5 or not self.under_way:
                self.begin(tag)
            elif action < 0.97:
                self.end(self.under_way.pop(self.rng.randrange(len(self.under_way))))
            else:
                self.fail_over()

    def begin(self, tag: int) -> None:
        kind = self.rng.choice(["read", "write", "write", "zero", "flush"])
        at = self.rng.randrange(SECTORS)
        count = 0 if kind == "flush" else self.rng.randrange(1, SECTORS - at + 1)
        self.under_way.append(self.story.call(self.reign, kind, tag, at=at, count=count))

    def end(self, operation: Operation) -> None:
        now = self.story.tick()
        if operation.kind == "read":
            values = [self.contents[sector] for sector in operation.sectors]
            if len(self.reads) == self.lie:
                values = [self.rng.choice([0, now // 4, now // 3, now // 2]) for _ in values]
            operation.answer(now, values)
            self.reads.append(operation)
            self.told += self.story.history.check_read(operation)
        elif operation.kind == "flush":
            self.kept = [{value} for value in self.contents]
            operation.answer(now)
        elif self.rng.random() < 0.15:
            operation.fail(now)
            self.take_effect(operation, partly=True)
        else:
            self.take_effect(operation)
            operation.answer(now)

    def take_effect(self, operation: Operation, *, partly: bool = False) -> None:
        for sector in operation.sectors:
            if not partly or self.rng.random() < 0.5:
                self.contents[sector] = operation.tag
                self.kept[sector].add(operation.tag)

    def fail_over(self) -> None:
        for operation in self.under_way:
            if operation.writes:
                self.take_effect(operation, partly=True)
        self.under_way = []
        loss = self.rng.choice([Loss.NONE, Loss.UNFLUSHED])
        if loss is Loss.UNFLUSHED:
            self.contents = [self.rng.choice(sorted(values)) for values in self.kept]
        self.reign = self.story.reign(self.rng.choice("ab"), self.reign, loss)


@pytest.mark.parametrize("seed", range(10))
def test_honest_lives_are_not_accused(seed: int) -> None:
    life = Life(seed)
    assert not life.told
    assert not life.story.history.check()
    assert not life.story.history.check_contents(life.reign, life.contents, "disk")
    assert not life.story.history.check_stable(life.reign, [min(values) for values in life.kept], "disk")


def test_what_is_said_at_once_is_what_is_said_at_the_end() -> None:
    caught = 0
    for seed in range(20):
        life = Life(seed, lie=seed // 2)
        at_end = [(told.invariant, told.sectors) for told in life.story.history.check()]
        at_once = [(told.invariant, told.sectors) for told in life.told]
        # Where a lie was believed, later reads that tell the truth are refused too; `check` names the first only.
        assert set(at_end) <= set(at_once)
        assert bool(at_end) == bool(at_once)
        caught += bool(at_end)
    assert caught > 10

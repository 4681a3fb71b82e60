"""The checker of histories: hand-made ones of every kind, good and bad."""

import pytest

from tests.sim.recording import Loss
from tests.sim.story import Story


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


def test_a_grown_volume_has_zeroes_at_its_end(story: Story) -> None:
    first = story.reign("a")
    story.write(first, 1)
    story.flush(first)
    story.history.grow(12)
    story.read(first, 0, at=8)
    story.write(first, 2, at=6)
    second = story.reign("b", first)
    story.read(second, 2, 2, 0, 0, at=8)
    assert not story.broken()
    story.read(second, 0, 2, 0, 0, at=8)
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
    (violation,) = history.check_stable(reign, {2: 1, 3: 0, 4: 0}, "disk of b")
    assert str(violation) == (
        "flush: disk of b, on stable storage, after reign 1 (a): sector 3 gave 0,"
        " allowed: 1 (#1 write of 1 sectors 0..3 [2-3]), or 2 (#3 write of 2 sectors 0..3 [6-7])"
    )

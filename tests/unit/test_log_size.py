"""The size of the activity log by a goal: the reuse curve beside a dumb twin, the decision over all its rows."""

import itertools
import random
from collections import OrderedDict

import pytest

from mirror.core import log_size
from mirror.core.limits import EXTENT_BYTES, LOG_SLOTS_MAX, LOG_SLOTS_MIN, MIB
from mirror.core.log_size import SIZES, USES_MIN, Look, ReuseCurve, decide, resync_bytes_per_s, resync_s, sampled


def misses_of_a_real_log(uses: list[int], slots: int) -> float:
    """The dumb twin: the log itself, least recently used first."""
    hot: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for extent in uses:
        if extent in hot:
            hot.move_to_end(extent)
        else:
            missed += 1
            hot[extent] = None
            if len(hot) > slots:
                hot.popitem(last=False)
    return missed / len(uses)


def curve_of(uses: list[int], volume_extents: int, every: int = 0) -> ReuseCurve:
    curve = ReuseCurve(volume_extents)
    if every:
        curve.every, curve.mask = every, every - 1
    for extent in uses:
        if sampled(extent, curve.mask):
            curve.note(extent)
    curve.tell(len(uses))
    return curve


def spread(source: random.Random, count: int, extents: int) -> list[int]:
    """Some extents are used much, most of them seldom."""
    return [int(extents * source.random() ** 3) for _ in range(count)]


def test_the_sizes_go_from_the_smallest_to_the_largest_log() -> None:
    assert SIZES[0] == LOG_SLOTS_MIN
    assert SIZES[-1] == LOG_SLOTS_MAX
    assert all(two == 2 * one for one, two in itertools.pairwise(SIZES))


def test_the_curve_is_exact_where_all_are_sampled(rng: random.Random) -> None:
    uses = spread(rng, 5000, 256)
    curve = curve_of(uses, 256, every=1)
    for slots in SIZES:
        assert curve.misses(slots) == pytest.approx(misses_of_a_real_log(uses, slots))


@pytest.mark.parametrize(("volume_extents", "every", "apart"), [(256, 4, 0.15), (2048, 16, 0.15), (16384, 64, 0.15)])
def test_the_curve_of_a_sample_is_near_the_truth(
    volume_extents: int, every: int, apart: float, rng: random.Random
) -> None:
    uses = spread(rng, 120_000, volume_extents)
    curve = curve_of(uses, volume_extents)
    assert curve.every == every
    for slots in SIZES:
        found = curve.misses(slots)
        assert found is not None
        assert abs(found - misses_of_a_real_log(uses, slots)) < apart, slots


def test_a_scan_is_missed_by_every_log(rng: random.Random) -> None:
    curve = curve_of([extent for _ in range(2) for extent in range(40_000)], 40_000)
    assert curve.misses(SIZES[-1]) == pytest.approx(1.0, abs=0.01)


def test_few_uses_tell_nothing_and_old_ones_fade() -> None:
    curve = curve_of([1] * (USES_MIN - 1), 64, every=1)
    assert curve.misses(64) is None
    for _ in range(10 * USES_MIN):
        curve.note(1)
    assert curve.misses(64) is None, "nobody told of so many uses"
    curve.tell(10 * USES_MIN)
    assert curve.misses(64) is not None
    for _ in range(20):
        curve.fade()
    assert USES_MIN <= sum(curve._uses) <= 2 * USES_MIN
    assert curve.misses(64) is not None


def test_the_list_of_the_sample_is_bounded() -> None:
    curve = curve_of(list(range(100_000)), 64, every=1)
    assert len(curve._order) <= 256


def look(
    slots: int = 1024,
    goal_s: float = 30.0,
    speed: float | None = 400.0 * MIB,
    misses: dict[int, float] | None = None,
    volume_extents: int = 1 << 20,
) -> Look:
    """`misses`: of each size; a size that is not named misses as much as the next smaller one."""

    def of(size: int) -> float | None:
        if misses is None:
            return None
        return next((misses[one] for one in sorted(misses, reverse=True) if one <= size), 1.0)

    return Look(slots, volume_extents, goal_s, speed, of)


# 30 s at 400 MiB/s are 3 000 extents: 2 048.
FALLING = {64: 0.9, 1024: 0.5, 2048: 0.1, 4096: 0.05, 8192: 0.0}


@pytest.mark.parametrize(
    ("seen", "rule", "slots"),
    [
        (look(8192), "over-goal", 2048),
        (look(8192, misses={64: 0.0}), "over-goal", 64),
        (look(8192, misses=FALLING), "over-goal", 2048),
        (look(64, goal_s=1.0, speed=1.0 * MIB), "smallest", None),
        (look(1024, volume_extents=1000), "whole-volume", None),
        (look(), "unmeasured", None),
        (look(misses={64: 0.004}), "fits", None),
        (look(misses=FALLING), "too-small", 2048),
        (look(64, misses={64: 0.5, 256: 0.103, 512: 0.1}), "too-small", 256),
        (look(misses={64: 1.0}), "no-use", None),
        (look(2048, misses=FALLING), "goal", None),
    ],
)
def test_each_row_of_the_decision(seen: Look, rule: str, slots: int | None) -> None:
    assert decide(seen)[::2] == (rule, slots)


def test_every_row_is_reached_and_what_it_chooses_is_within_the_goal() -> None:
    rules = set()
    curves: list[dict[int, float] | None] = [None, {64: 0.0}, {64: 1.0}, FALLING, {64: 0.6, 256: 0.2, 1024: 0.004}]
    everything = itertools.product(
        [64, 100, 1024, 8192], [1.0, 30.0, 3600.0], [None, 1.0 * MIB, 400.0 * MIB], curves, [10, 5000, 1 << 20]
    )
    for slots, goal_s, speed, misses, extents in everything:
        seen = look(slots, goal_s, speed, misses, extents)
        decision = decide(seen)
        rules.add(decision.rule)
        if decision.slots is not None:
            assert decision.slots in SIZES
            assert decision.slots == SIZES[0] or resync_s(decision.slots, extents, speed) <= goal_s
            # And there it stays.
            again = decide(look(decision.slots, goal_s, speed, misses, extents))
            assert again.slots is None, (decision, again)
    assert rules == {row.rule for row in log_size.TABLE}


def test_the_speed_to_reckon_with() -> None:
    assert resync_bytes_per_s(None) is None
    assert resync_bytes_per_s({"dirty_bytes": 1000 * MIB, "seconds": 10}) == 100 * MIB
    # One of holes.
    assert resync_bytes_per_s({"dirty_bytes": 1000 * MIB, "seconds": 0.1}) == log_size.BYTES_PER_S_MAX


def test_how_long_a_resync_takes_is_bounded_by_the_volume() -> None:
    assert resync_s(1024, 10, 10.0 * EXTENT_BYTES) == 1.0
    assert resync_s(1024, 1 << 20, 1024.0 * EXTENT_BYTES) == 1.0

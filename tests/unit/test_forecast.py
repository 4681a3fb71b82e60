"""What a plan will cost, as far as anybody can know it before."""

import dataclasses

import pytest

from mirror.core.forecast import FROM_PEER, TO_PEER, forecast, noted, rough_speed_of, speed_of
from mirror.core.generation import Action, Outcome
from mirror.core.limits import BLOCK_BYTES, MIB
from tests.unit.test_generation import standing

SIZE = 1 << 20
MINE = standing("a", dirty_blocks=3)
THEIRS = standing("b", dirty_blocks=2)


@pytest.mark.parametrize(
    ("action", "known_bytes", "direction", "count"),
    [
        (Action.NONE, None, None, 0),
        (Action.SOURCE_BITMAP, None, TO_PEER, 5 * BLOCK_BYTES),
        (Action.SOURCE_BITMAP, 4 * BLOCK_BYTES, TO_PEER, 4 * BLOCK_BYTES),
        (Action.TARGET_BITMAP, 0, FROM_PEER, 0),
        (Action.SOURCE_FULL, 4 * BLOCK_BYTES, TO_PEER, SIZE),
        (Action.TARGET_FULL, None, FROM_PEER, SIZE),
        (Action.WAIT, None, None, None),
        (Action.REFUSE, 7, None, None),
        (Action.SPLIT_BRAIN, 7, None, None),
    ],
)
def test_bytes_and_direction_of_every_action(
    action: Action, known_bytes: int | None, direction: str | None, count: int | None
) -> None:
    found = forecast(Outcome("rule", action, "why", "what to do"), MINE, THEIRS, known_bytes, 1000.0)
    assert (found.direction, found.bytes) == (direction, count)
    assert found.expected_s == (None if count is None else round(count / 1000, 1))
    assert found.as_json()["action"] == action.value
    assert (found.rule, found.reason, found.remedy) == ("rule", "why", "what to do")


def test_the_sources_word_replaces_the_sum_of_both_maps() -> None:
    found = forecast(Outcome("rule", Action.TARGET_BITMAP, "why"), MINE, THEIRS, None, 1000.0)
    told = found.with_bytes(4 * BLOCK_BYTES, 1000.0)
    assert told == forecast(Outcome("rule", Action.TARGET_BITMAP, "why"), MINE, THEIRS, 4 * BLOCK_BYTES, 1000.0)
    assert found.with_bytes(0, None).expected_s == 0.0


def test_both_maps_can_not_name_more_than_the_volume() -> None:
    much = dataclasses.replace(MINE, dirty_blocks=SIZE // BLOCK_BYTES)
    assert forecast(Outcome("r", Action.SOURCE_BITMAP, ""), much, THEIRS, None, None).bytes == SIZE


def test_without_a_measured_speed_the_time_is_unknown_unless_nothing_is_to_do() -> None:
    assert forecast(Outcome("r", Action.SOURCE_FULL, ""), MINE, THEIRS, None, None).expected_s is None
    assert forecast(Outcome("r", Action.SOURCE_BITMAP, ""), MINE, THEIRS, 0, None).expected_s == 0.0


MUCH, LITTLE = {"dirty_bytes": 1000 * MIB, "seconds": 10.0}, {"dirty_bytes": MIB, "seconds": 0.1}


@pytest.mark.parametrize(
    ("note", "speed"),
    [
        (None, None),
        (MUCH, 100.0 * MIB),
        # All beginning and end.
        (LITTLE, None),
        ({**LITTLE, "bytes_per_s": 7}, 7.0),
        ({**MUCH, "bytes_per_s": 7}, 100.0 * MIB),
        ({**MUCH, "seconds": 0.0}, None),
        ({"seconds": 1.0}, None),
        ({**MUCH, "dirty_bytes": "much"}, None),
        ({**MUCH, "seconds": None}, None),
        ({"bytes_per_s": "fast"}, None),
        ({"bytes_per_s": 0}, None),
        # What a peer may have written.
        ({"bytes_per_s": 10**400}, None),
        ({"dirty_bytes": 10**400, "seconds": 1.0}, None),
        ({"dirty_bytes": 1 << 62, "seconds": 5e-324}, None),
        ({"dirty_bytes": float("nan"), "seconds": float("nan")}, None),
    ],
)
def test_the_speed_of_resyncs(note: dict[str, object] | None, speed: float | None) -> None:
    assert speed_of(note) == speed


def test_a_forecast_makes_do_with_a_small_one() -> None:
    assert rough_speed_of(LITTLE) == pytest.approx(10 * MIB)
    assert rough_speed_of({**LITTLE, "bytes_per_s": 7}) == 7.0
    assert rough_speed_of(MUCH) == 100 * MIB
    for nothing in (None, {}, {**LITTLE, "seconds": 0.0}, {**LITTLE, "dirty_bytes": 0}):
        assert rough_speed_of(nothing) is None


def test_a_small_resync_does_not_make_the_speed_forgotten() -> None:
    """One short loss of the link, and the log would be sized, and a plan told, by nothing."""
    first = noted(MUCH, None)
    assert first == {**MUCH, "bytes_per_s": 100 * MIB}
    second = noted(LITTLE, noted(LITTLE, first))
    assert second == {**LITTLE, "bytes_per_s": 100 * MIB}
    assert speed_of(second) == 100 * MIB
    assert noted(LITTLE, None) == LITTLE
    # Nor does one of another speed that was measured.
    assert speed_of(noted({**MUCH, "seconds": 100.0}, second)) == 10 * MIB

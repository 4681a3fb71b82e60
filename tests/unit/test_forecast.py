"""What a plan will cost, as far as anybody can know it before."""

import dataclasses

import pytest

from mirror.core.forecast import FROM_PEER, TO_PEER, forecast, speed_of
from mirror.core.generation import Action, Outcome
from mirror.core.limits import BLOCK_BYTES
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


@pytest.mark.parametrize(
    ("note", "speed"),
    [
        (None, None),
        ({"dirty_bytes": 1000, "seconds": 2.0}, 500.0),
        ({"dirty_bytes": 0, "seconds": 2.0}, None),
        ({"dirty_bytes": 1000, "seconds": 0.0}, None),
        ({"seconds": 1.0}, None),
        ({"dirty_bytes": "much", "seconds": 1.0}, None),
    ],
)
def test_the_speed_of_the_last_resync(note: dict[str, object] | None, speed: float | None) -> None:
    assert speed_of(note) == speed

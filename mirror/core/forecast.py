"""What a handshake's outcome will cost, said before anything is done: which way, how many bytes, how long.

The bytes are at most, because a resync sends only what differs. They are the sum of both maps until somebody knows
their union: a dry run asks for both maps, and the source of a resync tells its target. The time rests on the speed
that the last resync of some size had, comparing included. The note of a resync bears that speed on: a few blocks after
a short loss of the link say little of it, and must not make it forgotten. Before the first of some size a forecast
makes do with the last one, and before any the time is unknown.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mirror.core.generation import Action, Outcome, Standing
from mirror.core.limits import BLOCK_BYTES, MIB

TO_PEER = "to the peer"
FROM_PEER = "from the peer"

_DIRECTIONS = {
    Action.SOURCE_BITMAP: TO_PEER,
    Action.SOURCE_FULL: TO_PEER,
    Action.TARGET_BITMAP: FROM_PEER,
    Action.TARGET_FULL: FROM_PEER,
}
# A shorter resync is all beginning and end.
RESYNC_BYTES_MIN = 64 * MIB
# What a clock of milliseconds shows, and no volume or speed is larger.
_SECONDS_MIN, _NUMBER_MAX = 0.001, 1 << 63
# What a note of a resync calls that speed.
_SPEED = "bytes_per_s"
_APART = (Action.WAIT, Action.REFUSE, Action.SPLIT_BRAIN)


class Forecast(NamedTuple):
    """The plan that the table chose, for people. `bytes` and `expected_s` are None where nothing can be said."""

    rule: str
    action: Action
    reason: str
    remedy: str
    direction: str | None
    bytes: int | None
    expected_s: float | None

    def with_bytes(self, count: int, speed: float | None) -> "Forecast":
        """The same plan, now that it is known how much it covers."""
        return self._replace(bytes=count, expected_s=_expected_s(count, speed))

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "action": self.action.value}


def forecast(
    outcome: Outcome, mine: Standing, theirs: Standing, known_bytes: int | None, speed: float | None
) -> Forecast:
    """`known_bytes`: what a resync by bitmap would cover, where both maps are known; `speed` in bytes a second."""
    count = _bytes(outcome.action, mine, theirs, known_bytes)
    return Forecast(
        outcome.rule,
        outcome.action,
        outcome.reason,
        outcome.remedy,
        _DIRECTIONS.get(outcome.action),
        count,
        _expected_s(count, speed),
    )


def _expected_s(count: int | None, speed: float | None) -> float | None:
    if not count:
        return None if count is None else 0.0
    return round(count / speed, 1) if speed else None


def _bytes(action: Action, mine: Standing, theirs: Standing, known_bytes: int | None) -> int | None:
    if action in _APART:
        return None
    if action is Action.NONE:
        return 0
    if action in (Action.SOURCE_FULL, Action.TARGET_FULL):
        return mine.size_bytes
    if known_bytes is not None:
        return known_bytes
    return min(mine.size_bytes, (mine.dirty_blocks + theirs.dirty_blocks) * BLOCK_BYTES)


def noted(resync: Mapping[str, Any], former: Mapping[str, Any] | None) -> dict[str, Any]:
    """The note of a resync that has ended, with the speed to reckon with: its own, or what the former note bears."""
    speed = speed_of(resync) or speed_of(former)
    return {**resync, _SPEED: round(speed)} if speed else dict(resync)


def speed_of(note: Mapping[str, Any] | None) -> float | None:
    """Bytes a second that resyncs cover, by the note of the last one; None where none of some size was measured."""
    if note is None:
        return None
    own = _own_speed(note) if _number(note.get("dirty_bytes")) >= RESYNC_BYTES_MIN else None
    return own or _number(note.get(_SPEED)) or None


def rough_speed_of(note: Mapping[str, Any] | None) -> float | None:
    """The same for a forecast, which makes do with a small one that mostly began and ended."""
    return speed_of(note) or (None if note is None else _own_speed(note))


def _own_speed(note: Mapping[str, Any]) -> float | None:
    """That of the resync itself, whatever its size."""
    covered, seconds = _number(note.get("dirty_bytes")), _number(note.get("seconds"))
    return covered / seconds if covered and seconds >= _SECONDS_MIN else None


def _number(value: Any) -> float:
    """0 for what is none that a note of ours has: the peer wrote it."""
    return float(value) if isinstance(value, int | float) and 0 < value < _NUMBER_MAX else 0.0

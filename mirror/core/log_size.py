"""The size of the activity log, by a goal: how long a resync after a crash may take.

A larger log makes fewer writes wait for a log record, and leaves more to compare after a crash. The operator names the
seconds that a crash may cost; within them the log is as large as the writes need.

What a log of another size would do is not guessed from how often this one misses: `ReuseCurve` measures it. For a
sample of the extents it keeps the order of their last uses; how many others came in between tells for each use the
smallest log that would still hold the extent (reuse distances, sampled in space: Waldspurger et al., "Efficient MRC
Construction with SHARDS", FAST 2015). One extent in `every` is looked at, the others pay for a multiplication. A few
extents take most of the uses: those that the sample has too few or too many of are counted as held by any log.

`decide` is a table. It lets a log grow for misses that a larger one saves, and shrink for the goal's sake alone: within
the goal a large log costs nothing, and each change of size holds the requests for a moment.

What lost: doubling on misses and halving without (it never settles where the working set lies between two sizes, and a
scan over the whole volume drives it to the limit, though no log helps against that); a list of the extents evicted
last (it tells of one larger size, and of no smaller one).

Pure: the caller locks and reads counters.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mirror.core.forecast import speed_of
from mirror.core.limits import EXTENT_BYTES, LOG_SLOTS_MAX, LOG_SLOTS_MIN, MIB

# Sizes to choose from: each doubles what a crash costs, so that finer steps would only mean more changes.
SIZES = tuple(LOG_SLOTS_MIN << step for step in range((LOG_SLOTS_MAX // LOG_SLOTS_MIN).bit_length()))

# Before any resync of this volume was measured: what one disk and a gigabit link do.
BYTES_PER_S_ASSUMED = 100 * MIB
# The last resync may have been one of holes: comparing what a log named goes no faster than this (2 cores, measured).
BYTES_PER_S_MAX = 400 * MIB

# Sampled uses from which a curve is believed: a percent is two of them.
USES_MIN = 200
# Part of the requests whose misses are not worth a change: at one in 200 a record of 100 us adds 0.5 us to the mean.
MISSES_WORTH = 0.005
# The speed of resyncs varies by so much without meaning anything.
GOAL_SLACK = 1.25

# The sample's list is searched from end to end, which takes 1 us where it is full: a write may pay for a tenth of that.
_LIST_MAX = 256
# Up to so many extents of a volume one in so many is sampled: fewer where the list reaches past the largest log.
_EVERY: tuple[tuple[float, int], ...] = ((256, 4), (4096, 16), (math.inf, 64))


class ReuseCurve:
    """Reuse distances of the extents of one volume. `sampled` is for the path of a write: is this one to be noted?"""

    def __init__(self, volume_extents: int) -> None:
        self.every = next(every for extents, every in _EVERY if volume_extents <= extents)
        self.mask = self.every - 1
        # Most recently used last.
        self._order: list[int] = []
        # Uses whose extent a log of SIZES[i] still holds, and none smaller; at the end those that none holds.
        self._uses = [0.0] * (len(SIZES) + 1)
        # All uses, sampled or not, and how many the caller had counted when it told last.
        self._all = 0.0
        self._told = 0

    def note(self, extent: int) -> None:
        """One use of a sampled extent."""
        order = self._order
        try:
            place = order.index(extent)
        except ValueError:
            self._uses[-1] += 1
            if len(order) >= _LIST_MAX:
                del order[0]
        else:
            others = (len(order) - 1 - place) * self.every
            del order[place]
            self._uses[next((at for at, size in enumerate(SIZES) if others < size), len(SIZES))] += 1
        order.append(extent)

    def tell(self, all_uses: int) -> None:
        """How many uses there were since the beginning, sampled or not."""
        self._all += all_uses - self._told
        self._told = all_uses

    def misses(self, slots: int) -> float | None:
        """The part of the uses that a log of this size would miss; None while too few are known."""
        noted, due = sum(self._uses), self._all / self.every
        if min(noted, due) < USES_MIN:
            return None
        missed = sum(count for size, count in zip(SIZES, self._uses, strict=False) if size > slots) + self._uses[-1]
        return min(1.0, missed / due)

    def fade(self) -> None:
        """Count what was noted so far half: the curve is to follow what clients do now."""
        if min(sum(self._uses), self._all / self.every) > 2 * USES_MIN:
            self._uses = [count / 2 for count in self._uses]
            self._all /= 2


def sampled(extent: int, mask: int) -> bool:
    """Whether the extent belongs to the sample: by a multiplicative hash, as extents in use often lie in strides."""
    return not (extent + 1) * 2654435761 >> 26 & mask


@dataclass(frozen=True)
class Look:
    """All that the decision rests on. `misses(slots)` is ReuseCurve's; `bytes_per_s` that of a resync, if known."""

    slots: int
    volume_extents: int
    goal_s: float
    bytes_per_s: float | None
    misses: Callable[[int], float | None]

    @property
    def slots_max(self) -> int:
        """The largest log within the goal, never below the smallest size."""
        fitting = int(self.goal_s * (self.bytes_per_s or BYTES_PER_S_ASSUMED) / EXTENT_BYTES)
        return max((size for size in SIZES if size <= fitting), default=SIZES[0])

    @property
    def best(self) -> int:
        """The smallest log within the goal that misses about as little as any within it."""
        least = self.misses(self.slots_max)
        if least is None:
            return self.slots_max
        allowed = [size for size in SIZES if size <= self.slots_max]
        return next(size for size in allowed if (self.misses(size) or 0.0) <= least + MISSES_WORTH)

    @property
    def over_goal(self) -> bool:
        return resync_s(self.slots, self.volume_extents, self.bytes_per_s) > GOAL_SLACK * self.goal_s

    @property
    def holds_all(self) -> bool:
        """The whole volume: no larger log misses less."""
        return self.slots >= self.volume_extents

    @property
    def missed(self) -> float:
        return self.misses(self.slots) or 0.0


class Decision(NamedTuple):
    """`slots` None: stay as it is."""

    rule: str
    reason: str
    slots: int | None = None


class Row(NamedTuple):
    applies: Callable[[Look], bool]
    rule: str
    reason: str
    slots: Callable[[Look], int | None] = lambda _: None


# The first row that applies decides.
TABLE: tuple[Row, ...] = (
    Row(
        lambda look: look.over_goal and look.slots > SIZES[0],
        "over-goal",
        "a resync after a crash would take longer than resync_after_crash",
        lambda look: min(look.best, look.slots_max),
    ),
    Row(lambda look: look.over_goal, "smallest", "no log is smaller, though the goal asks for it"),
    Row(lambda look: look.holds_all, "whole-volume", "it holds the whole volume"),
    Row(lambda look: look.misses(look.slots) is None, "unmeasured", "too few writes were measured"),
    Row(lambda look: look.missed < MISSES_WORTH, "fits", "what is written to fits into it"),
    Row(
        lambda look: look.best > look.slots and look.missed - (look.misses(look.best) or 0.0) >= MISSES_WORTH,
        "too-small",
        "a larger one misses less, and is within resync_after_crash",
        lambda look: look.best,
    ),
    Row(
        lambda look: look.missed - (look.misses(SIZES[-1]) or 0.0) < MISSES_WORTH,
        "no-use",
        "no larger one would miss less",
    ),
    Row(lambda _: True, "goal", "a larger one would exceed resync_after_crash"),
)


def decide(look: Look) -> Decision:
    row = next(row for row in TABLE if row.applies(look))
    slots = row.slots(look)
    return Decision(row.rule, row.reason, None if slots == look.slots else slots)


def resync_s(slots: int, volume_extents: int, bytes_per_s: float | None) -> float:
    """How long comparing all that a log of this size names takes at most."""
    return min(slots, volume_extents) * EXTENT_BYTES / (bytes_per_s or BYTES_PER_S_ASSUMED)


def resync_bytes_per_s(last_resync: Mapping[str, Any] | None) -> float | None:
    """The speed to reckon with, by the note of the last resync; None when none was measured."""
    speed = speed_of(last_resync)
    return min(speed, float(BYTES_PER_S_MAX)) if speed else None

"""What was measured, and what comes of it: rounds, medians and ratios. Nothing here measures.

A figure is named by the work, the target that did it, and a key with its unit. Of each there is one value a round. A
ratio is taken round by round, where both were measured in the same rounds, and then the median: so a minute in which
the machine was slow is in both parts of it.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Of these the worst round counts, not the median: a bound holds always or it is none.
WORST = ("max_ms", "peak_mib")


class Figure(NamedTuple):
    """Names one measured value."""

    work: str
    target: str
    key: str


class Round(NamedTuple):
    """What one measurement brought: values by key, and latencies (us) by percent where it has a distribution."""

    values: Mapping[str, float]
    percentiles_us: Mapping[float, float] = {}


class Value(NamedTuple):
    """A figure or ratio: the median and the extremes over the rounds."""

    middle: float
    lowest: float
    highest: float


@dataclass
class Record:
    """A whole run; as JSON it is what bench/results/ holds."""

    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    # work -> target -> one dictionary of values a round
    rounds: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    # work -> target -> [[percent, median latency in us], ...]
    latencies: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    # Foreground writes around a resync: see bench/experiments.py.
    timeline: dict[str, Any] = field(default_factory=dict)
    # target or work -> why it could not be measured
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, work: str, target: str, rounds: list[Round]) -> None:
        kept = [{key: round(value, 4) for key, value in one.values.items()} for one in rounds]
        self.rounds.setdefault(work, {})[target] = kept
        percents = rounds[0].percentiles_us
        if percents:
            curve = [
                [percent, statistics.median(one.percentiles_us[percent] for one in rounds)] for percent in percents
            ]
            self.latencies.setdefault(work, {})[target] = curve

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))

    def values(self, figure: Figure) -> list[float]:
        """One a round; empty when it was not measured."""
        rounds = self.rounds.get(figure.work, {}).get(figure.target, [])
        return [one[figure.key] for one in rounds if figure.key in one]

    def value(self, figure: Figure, beside: Figure | None = None) -> Value | None:
        """The figure, or its ratio to another one; None when either is missing."""
        values = self.values(figure)
        if beside is not None:
            values = ratios(values, self.values(beside))
        if not values:
            return None
        middle = max(values) if beside is None and figure.key in WORST else statistics.median(values)
        return Value(middle, min(values), max(values))


def ratios(values: list[float], others: list[float]) -> list[float]:
    """Round by round; of the medians, where there are not as many rounds of both."""
    if not values or not others:
        return []
    if len(values) != len(others):
        values, others = [statistics.median(values)], [statistics.median(others)]
    return [one / other for one, other in zip(values, others, strict=True) if other]


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that so many percent of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def p99_by_time(writes: list[tuple[float, float]], begin_s: float, window_s: float) -> list[list[float]]:
    """[seconds since `begin_s`, p99 in us] for each window in which something was answered."""
    windows: dict[int, list[float]] = {}
    for when_s, latency_us in writes:
        windows.setdefault(int((when_s - begin_s) // window_s), []).append(latency_us)
    return [[round(number * window_s, 3), percentile(windows[number], 99)] for number in sorted(windows)]

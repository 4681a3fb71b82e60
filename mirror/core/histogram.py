"""Counts of latencies in buckets: eight for each power of two of microseconds, so percentiles are right to 6 %."""

from collections.abc import Iterable

# Up to 38 hours.
BUCKETS = 8 * 40


class Histogram:
    """`add` takes nanoseconds. Several threads may add at once; a lost count is one in a great many."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts = [0] * BUCKETS

    def add(self, duration_ns: int) -> None:
        value = duration_ns >> 7  # units of 0.128 us
        bits = value.bit_length()
        index = value if bits < 4 else (bits - 3) * 8 + ((value >> (bits - 4)) & 7)
        self._counts[index if index < BUCKETS else -1] += 1

    @property
    def count(self) -> int:
        return sum(self._counts)

    def percentile_us(self, fraction: float) -> float | None:
        """The middle of the bucket that holds this fraction of all; None while nothing was counted."""
        total = self.count
        if not total:
            return None
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if seen >= fraction * total:
                return round((_lower(index) + _lower(index + 1)) / 2 * 128 / 1000, 1)
        raise AssertionError("the counts add up to their sum")


def merged(parts: Iterable[Histogram]) -> Histogram:
    """One of all that these have counted."""
    whole = Histogram()
    for part in parts:
        whole._counts = [one + other for one, other in zip(whole._counts, part._counts, strict=True)]
    return whole


def _lower(index: int) -> int:
    if index < 8:
        return index
    bits = index // 8 + 3
    return (8 + index % 8) << (bits - 4)

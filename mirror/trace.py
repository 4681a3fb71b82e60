"""What a volume measures of itself: counters and latency histograms, cheap enough to be always on.

A histogram has eight buckets for each power of two of microseconds, so a percentile is right to about 6 %.
"""

import time
from collections import deque

# Latencies kept for whoever asks for those of late: more than come in between two looks of a resync's throttle.
RECENT_WRITES = 4096


class Histogram:
    """Counts of latencies; `add` takes nanoseconds."""

    def __init__(self) -> None:
        self._counts = [0] * (8 * 40)

    def add(self, duration_ns: int) -> None:
        value = duration_ns >> 7  # units of 0.128 us
        bits = value.bit_length()
        index = value if bits < 4 else (bits - 3) * 8 + ((value >> (bits - 4)) & 7)
        self._counts[min(index, len(self._counts) - 1)] += 1

    def percentile_us(self, fraction: float) -> float | None:
        """The upper end of the bucket that holds this fraction of all; None while nothing was counted."""
        total = sum(self._counts)
        if not total:
            return None
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if seen >= fraction * total:
                return round(_upper(index) * 128 / 1000, 1)
        raise AssertionError("the counts add up to their sum")


def _upper(index: int) -> int:
    if index < 8:
        return index + 1
    bits = index // 8 + 3
    return ((8 + index % 8) + 1) << (bits - 4)


class Trace:
    """Counters of one volume since its process started."""

    def __init__(self) -> None:
        self.writes = self.written_bytes = 0
        self.reads = self.read_bytes = 0
        self.flushes = self.trims = self.trimmed_bytes = self.zeroes = self.zeroed_bytes = 0
        self.write_latency = Histogram()
        self.flush_latency = Histogram()
        self._recent_writes: deque[int] = deque(maxlen=RECENT_WRITES)

    start = staticmethod(time.perf_counter_ns)

    def write(self, started_ns: int, length: int) -> None:
        duration_ns = time.perf_counter_ns() - started_ns
        self.write_latency.add(duration_ns)
        self._recent_writes.append(duration_ns)
        self.writes += 1
        self.written_bytes += length

    def flush(self, started_ns: int) -> None:
        self.flush_latency.add(time.perf_counter_ns() - started_ns)
        self.flushes += 1

    def read(self, length: int) -> None:
        self.reads += 1
        self.read_bytes += length

    def trimmed(self, length: int) -> None:
        self.trims += 1
        self.trimmed_bytes += length

    def zeroed(self, length: int) -> None:
        self.zeroes += 1
        self.zeroed_bytes += length

    def take_recent_writes(self) -> list[int]:
        """The latencies in nanoseconds of the writes since the last call, at most RECENT_WRITES; for one caller."""
        recent = self._recent_writes
        return [recent.popleft() for _ in range(len(recent))]

    def counters(self) -> dict[str, int]:
        return {
            "reads": self.reads,
            "read_bytes": self.read_bytes,
            "writes": self.writes,
            "written_bytes": self.written_bytes,
            "flushes": self.flushes,
            "trims": self.trims,
            "trimmed_bytes": self.trimmed_bytes,
            "zeroes": self.zeroes,
            "zeroed_bytes": self.zeroed_bytes,
        }

    def latency(self) -> dict[str, dict[str, float | None]]:
        return {
            name: {"p50_us": histogram.percentile_us(0.5), "p99_us": histogram.percentile_us(0.99)}
            for name, histogram in (("write", self.write_latency), ("flush", self.flush_latency))
        }

"""What a volume measures of itself: counters, latency histograms and spans, cheap enough to be always on."""

import time
from collections import deque

from mirror.core.histogram import Histogram
from mirror.spans import Span, Spans

# Latencies kept for whoever asks for those of late: more than come in between two looks of a resync's throttle.
RECENT_WRITES = 4096


class Trace:
    """Counters of one volume since its process started."""

    def __init__(self) -> None:
        self.writes = self.written_bytes = 0
        self.reads = self.read_bytes = 0
        self.flushes = self.trims = self.trimmed_bytes = self.zeroes = self.zeroed_bytes = 0
        self.spans = Spans()
        self._recent_writes: deque[int] = deque(maxlen=RECENT_WRITES)

    @staticmethod
    def start() -> int:
        return time.perf_counter_ns()

    def write(self, started_ns: int, length: int, offset: int, durable: bool, span: Span | None, begun_ns: int) -> None:
        """A write is answered; `begun_ns`: it had its turn and its extents in the log."""
        ended_ns = time.perf_counter_ns()
        duration_ns = ended_ns - started_ns
        spans = self.spans
        spans.window.writes.add(duration_ns)
        self._recent_writes.append(duration_ns)
        self.writes += 1
        self.written_bytes += length
        if span is not None or duration_ns > spans.slow_ns:
            spans.write(self.writes, ended_ns, duration_ns, begun_ns, span, (offset, length, durable))

    def flush(self, started_ns: int, span: Span) -> None:
        ended_ns = time.perf_counter_ns()
        self.spans.window.flushes.add(ended_ns - started_ns)
        self.spans.flush(ended_ns, ended_ns - started_ns, span)
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
        return {"write": _latency(self.spans.all_writes()), "flush": _latency(self.spans.all_flushes())}


def _latency(histogram: Histogram) -> dict[str, float | None]:
    return {"p50_us": histogram.percentile_us(0.5), "p99_us": histogram.percentile_us(0.99)}

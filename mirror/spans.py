"""Spans: where the time of a request goes, measured on a live volume for one write in SAMPLE_EVERY.

A write that is not looked at costs a test for each stage. What is kept is of the last minutes, in two windows that take
turns, so it is bounded: a histogram for each kind of request and stage, and the slowest requests with their stages.
Every request slower than usual is among those; when one was not looked at, the next ones are, all of them, for whatever
made it slow mostly goes on. These are slower than most, so percentiles are of the regular looks alone, as long as there
are enough of them. When nothing is asked, nothing but counters is moved.
"""

import heapq
import threading
import time
from collections import deque
from typing import Any, NamedTuple

from mirror.core import stages
from mirror.core.histogram import Histogram, merged
from mirror.core.stages import AFTER, BEFORE, DURABLE_WRITE, FLUSHES, TOTAL, WRITE, stages_of

# One look costs 6 us, in 32 writes of 30 to 50 us each: half a percent. A power of two, for it is one test of bits.
SAMPLE_EVERY = 32
# A window: what is told is of the last one to two of these.
WINDOW_NS = 120 * 10**9
# Slowest requests kept of a window.
SLOWEST_KEPT = 16
# What is slow when nobody knows what is usual; and how many times the p50 is, when it is known.
SLOW_NS, SLOW_TIMES = 50_000_000, 10
# After a slow one so many writes are looked at, but not more often than this.
BURST_WRITES, BURST_NS = 64, 10**9
# Fewer regular looks say little of a p99: then all looks count.
REGULAR_ENOUGH = 50
# Of looks that took so long it is kept when they were, so many of each kind: what else was at that moment may explain
# them. The slowest of all don't tell that: they may be of other causes.
SLOW_LOOK_NS, SLOW_LOOKS_KEPT = 10**6, 128
# What is usual is reckoned after so many looks.
RECKON_EVERY = 256
SPANS_KEPT = 64
PERCENTILES = (("p50_us", 0.5), ("p99_us", 0.99), ("p99_9_us", 0.999))


class Span:
    """One request's laps: `lap` books the time since the last one to what it names."""

    __slots__ = ("at_ns", "laps_ns", "peer_ns")

    def __init__(self) -> None:
        self.at_ns = 0
        self.laps_ns = [0] * stages.LAPS
        self.peer_ns = 0

    def begin(self, started_ns: int) -> None:
        self.at_ns = started_ns
        self.laps_ns[:] = (0,) * stages.LAPS
        self.peer_ns = 0

    def lap(self, number: int) -> None:
        now_ns = time.perf_counter_ns()
        self.laps_ns[number] += now_ns - self.at_ns
        self.at_ns = now_ns

    def end(self, ended_ns: int) -> None:
        """The request was over then: what its thread did since does not count."""
        self.laps_ns[stages.INTERPRETER] += ended_ns - self.at_ns


class Slow(NamedTuple):
    """A slow request; `stages_ns` is what is known."""

    ended_ns: int
    kind: str
    offset: int
    length: int
    total_ns: int
    stages_ns: dict[str, int]


class Window:
    """What one stretch of time brought; `writes` counts every write, `stages` the regular looks, `others` the rest."""

    def __init__(self, began_ns: int) -> None:
        self.began_ns = began_ns
        self.writes = Histogram()
        self.flushes = Histogram()
        # kind -> stage -> histogram
        self.stages: dict[str, dict[str, Histogram]] = {}
        self.others: dict[str, dict[str, Histogram]] = {}
        self.slowest: list[tuple[int, int, Slow]] = []

    def add(self, kind: str, durations_ns: dict[str, int], total_ns: int, regular: bool) -> None:
        found = (self.stages if regular else self.others).setdefault(kind, {})
        for name, duration_ns in (*durations_ns.items(), (TOTAL, total_ns)):
            histogram = found.get(name)
            if histogram is None:
                histogram = found[name] = Histogram()
            histogram.add(duration_ns)

    def keeps(self, total_ns: int) -> bool:
        """Whether it is one of the slowest so far."""
        return len(self.slowest) < SLOWEST_KEPT or total_ns > self.slowest[0][0]

    def keep(self, slow: Slow, number: int) -> None:
        """`number` is used once, so that two are never compared beyond it."""
        entry = (slow.total_ns, number, slow)
        if len(self.slowest) < SLOWEST_KEPT:
            heapq.heappush(self.slowest, entry)
        else:
            heapq.heappushpop(self.slowest, entry)


class Spans:
    """Those of one volume. `mask` decides which write is looked at: one whose number has none of its bits."""

    def __init__(self, every: int = SAMPLE_EVERY) -> None:
        assert every & (every - 1) == 0, f"one in {every}: no power of two"
        self._usual_mask = every - 1
        # The first writes of a window are looked at, all of them: where few come, one in many would be none.
        self.mask = 0
        self.slow_ns = SLOW_NS
        self.window = Window(time.perf_counter_ns())
        self._former = Window(self.window.began_ns)
        # Of all windows before this one, since the process started.
        self._past_writes, self._past_flushes = Histogram(), Histogram()
        # kind -> when it ended, what it took, whether it was a regular look
        self._slow_looks: dict[str, deque[tuple[int, int, bool]]] = {}
        self._turn_lock = threading.Lock()
        self._free: list[Span] = []
        self._looks = 0
        self._burst_end = BURST_WRITES
        self._next_burst_ns = 0

    def take(self, started_ns: int) -> Span:
        """A span of a request that began then."""
        try:
            span = self._free.pop()
        except IndexError:
            span = Span()
        span.begin(started_ns)
        return span

    def write(
        self, number: int, ended_ns: int, total_ns: int, begun_ns: int, span: Span | None, where: tuple[int, int, bool]
    ) -> None:
        """Write `number` was looked at, or slow. `where`: offset, length, durable; `begun_ns`: sent and written from
        then on, 0 where nobody knows."""
        offset, length, durable = where
        kind = DURABLE_WRITE if durable else WRITE
        if self._turn(ended_ns):
            self._begin_burst(number)
        if span is not None:
            # While all are looked at, one in so many as ever.
            regular = self.mask > 0 or number & self._usual_mask == 0
            self._look(kind, ended_ns, total_ns, span, offset, length, regular)
            if not self.mask and number >= self._burst_end:
                self.mask = self._usual_mask
            return
        started_ns = ended_ns - total_ns
        known = {BEFORE: begun_ns - started_ns, AFTER: ended_ns - begun_ns} if begun_ns else {}
        self._keep(Slow(ended_ns, kind, offset, length, total_ns, known))
        if ended_ns >= self._next_burst_ns and self.mask > 0:
            self._next_burst_ns = ended_ns + BURST_NS
            self._begin_burst(number)

    def _begin_burst(self, number: int) -> None:
        self._burst_end = number + BURST_WRITES
        self.mask = 0

    def flush(self, ended_ns: int, total_ns: int, span: Span) -> None:
        """A flush ended; each is looked at, beside what a disk takes for it that is nothing."""
        self._look(FLUSHES, ended_ns, total_ns, span, 0, 0)

    def applied(self, kind: str, ended_ns: int, durations_ns: dict[str, int], offset: int, length: int) -> None:
        """A secondary carried out what its peer asked."""
        self._add(kind, ended_ns, durations_ns, sum(durations_ns.values()), offset, length)

    def _add(
        self,
        kind: str,
        ended_ns: int,
        durations_ns: dict[str, int],
        total_ns: int,
        offset: int,
        length: int,
        regular: bool = True,
    ) -> None:
        """One whose stages are known."""
        self._turn(ended_ns)
        self.window.add(kind, durations_ns, total_ns, regular)
        if total_ns >= SLOW_LOOK_NS:
            looks = self._slow_looks.get(kind)
            if looks is None:
                looks = self._slow_looks[kind] = deque(maxlen=SLOW_LOOKS_KEPT)
            looks.append((ended_ns, total_ns, regular))
        if self.window.keeps(total_ns):
            self._keep(Slow(ended_ns, kind, offset, length, total_ns, durations_ns))

    def _look(
        self, kind: str, ended_ns: int, total_ns: int, span: Span, offset: int, length: int, regular: bool = True
    ) -> None:
        span.end(ended_ns)
        durations_ns = stages_of(span.laps_ns, span.peer_ns)
        if len(self._free) < SPANS_KEPT:
            self._free.append(span)
        self._add(kind, ended_ns, durations_ns, total_ns, offset, length, regular)
        self._looks += 1
        if self._looks % RECKON_EVERY == 0:
            self._reckon()

    def _keep(self, slow: Slow) -> None:
        self._turn(slow.ended_ns)
        self._looks += 1
        self.window.keep(slow, self._looks)

    def _reckon(self) -> None:
        usual_us = merged((self._former.writes, self.window.writes)).percentile_us(0.5)
        if usual_us is not None:
            self.slow_ns = min(SLOW_NS, int(usual_us * 1000) * SLOW_TIMES)

    def _turn(self, now_ns: int) -> bool:
        """Begin a new window when it is time."""
        if now_ns - self.window.began_ns < WINDOW_NS:
            return False
        with self._turn_lock:
            window = self.window
            age_ns = now_ns - window.began_ns
            if age_ns < WINDOW_NS:
                return False
            self._past_writes = merged((self._past_writes, window.writes))
            self._past_flushes = merged((self._past_flushes, window.flushes))
            # One that nobody ended for so long is of another time.
            self._former = window if age_ns < 2 * WINDOW_NS else Window(now_ns)
            self.window = Window(now_ns)
            return True

    # What is told

    def all_writes(self) -> Histogram:
        """Since the process started."""
        return merged((self._past_writes, self.window.writes))

    def all_flushes(self) -> Histogram:
        return merged((self._past_flushes, self.window.flushes))

    def report(self, now_ns: int) -> dict[str, Any]:
        """The last minutes: percentiles by kind and stage, and the slowest requests, the slowest first."""
        self._turn(now_ns)
        windows = (self._former, self.window)
        kinds = {kind for window in windows for kind in (*list(window.stages), *list(window.others))}
        slowest = sorted((entry for window in windows for entry in list(window.slowest)), reverse=True)
        return {
            "seconds": round((now_ns - windows[0].began_ns) / 1e9, 1),
            "writes": _figures(merged(window.writes for window in windows)),
            "stages": {kind: self._by_stage(kind) for kind in sorted(kinds)},
            "slow_looks": {kind: self._slow_looks_of(kind, now_ns) for kind in sorted(kinds)},
            "slow_us": round(self.slow_ns / 1000),
            "slowest": [_slow(slow, now_ns) for _, _, slow in slowest[:SLOWEST_KEPT]],
        }

    def _regular_are_enough(self, kind: str) -> bool:
        parts = [window.stages[kind] for window in (self._former, self.window) if kind in window.stages]
        return sum(part[TOTAL].count for part in parts if TOTAL in part) >= REGULAR_ENOUGH

    def _slow_looks_of(self, kind: str, now_ns: int) -> list[dict[str, Any]]:
        """The latest first, of those that percentiles are of."""
        enough = self._regular_are_enough(kind)
        return [
            {"ago_s": round((now_ns - ended_ns) / 1e9, 1), "total_us": round(total_ns / 1000)}
            for ended_ns, total_ns, regular in reversed(list(self._slow_looks.get(kind, ())))
            if (regular or not enough) and ended_ns >= self._former.began_ns
        ]

    def _by_stage(self, kind: str) -> dict[str, Any]:
        windows = (self._former, self.window)
        regular = [window.stages[kind] for window in windows if kind in window.stages]
        others = [window.others[kind] for window in windows if kind in window.others]
        parts = regular if self._regular_are_enough(kind) else [*regular, *others]
        names = {name: None for part in parts for name in list(part)}
        return {name: _figures(merged(part[name] for part in parts if name in part)) for name in names}


def _figures(histogram: Histogram) -> dict[str, Any]:
    return {"count": histogram.count, **{name: histogram.percentile_us(fraction) for name, fraction in PERCENTILES}}


def _slow(slow: Slow, now_ns: int) -> dict[str, Any]:
    return {
        "kind": slow.kind,
        "offset": slow.offset,
        "length": slow.length,
        "ago_s": round((now_ns - slow.ended_ns) / 1e9, 1),
        "total_us": round(slow.total_ns / 1000),
        "stages_us": {name: round(duration_ns / 1000) for name, duration_ns in slow.stages_ns.items()},
    }

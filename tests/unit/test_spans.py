"""Spans: laps become stages, windows end, the slowest are kept, and a slow write has the next ones looked at."""

import random
from collections.abc import Sequence

import pytest

from mirror.core import stages
from mirror.core.histogram import Histogram, merged
from mirror.core.stages import AFTER, BEFORE, DISK, DURABLE_WRITE, FLUSHES, LINK, PEER_DISK, TOTAL, WRITE, stages_of
from mirror.spans import BURST_WRITES, RECKON_EVERY, SAMPLE_EVERY, SLOW_NS, SLOWEST_KEPT, WINDOW_NS, Span, Spans
from mirror.trace import Trace

US = 1000


def laps(**durations_us: int) -> list[int]:
    """By the names of the laps, in microseconds."""
    found = [0] * stages.LAPS
    for name, duration_us in durations_us.items():
        found[getattr(stages, name)] = duration_us * US
    return found


@pytest.mark.parametrize(
    ("laps_ns", "peer_us", "own_disk_us", "link_us"),
    [
        # Both disks are quick: the link is what is left.
        (laps(SEND=5, OWN_DISK=4, ANSWER=21), 6, 4, 24),
        # The peer's disk takes nearly all of the waiting.
        (laps(SEND=5, OWN_DISK=4, ANSWER=9000), 8990, 4, 19),
        # The own disk does, and the answer was there long before: at most what was waited for it counts.
        (laps(SEND=5, OWN_DISK=9000, ANSWER=1), 6, 9000, 6),
        # Both are slow at the same time.
        (laps(SEND=5, OWN_DISK=9000, ANSWER=1), 9000, 9000, 6),
        # A peer that does not say: all of it is the link's.
        (laps(SEND=5, OWN_DISK=4, ANSWER=9000), 0, 4, 9005),
        # The peer began before it was asked, or its clock runs faster: what was waited for, no more.
        (laps(SEND=1, OWN_DISK=1, ANSWER=2), 4, 1, 0),
        (laps(), 0, 0, 0),
    ],
)
def test_laps_become_stages(laps_ns: Sequence[int], peer_us: int, own_disk_us: int, link_us: int) -> None:
    found = stages_of(laps_ns, peer_us * US)
    assert (found[DISK], found[LINK], found[PEER_DISK]) == (own_disk_us * US, link_us * US, peer_us * US)
    assert set(found) == set(stages.STAGES)


def test_percentiles_are_right_to_six_percent() -> None:
    draw = random.Random(1)
    values = [int(draw.lognormvariate(11, 2)) for _ in range(5000)]
    histogram, parts = Histogram(), [Histogram(), Histogram()]
    for number, value in enumerate(values):
        histogram.add(value)
        parts[number % 2].add(value)
    assert merged(parts).percentile_us(0.99) == histogram.percentile_us(0.99)
    for fraction in (0.5, 0.99, 0.999):
        exact_us = sorted(values)[int(fraction * len(values)) - 1] / 1000
        told_us = histogram.percentile_us(fraction)
        assert told_us is not None
        assert exact_us * 0.93 - 0.1 <= told_us <= exact_us * 1.07 + 0.1
    assert Histogram().percentile_us(0.5) is None
    histogram.add(1 << 60)  # longer than the last bucket
    assert histogram.count == 5001


def span(spans: Spans, ended_ns: int, **durations_us: int) -> Span:
    taken = spans.take(ended_ns)
    taken.laps_ns[:] = laps(**durations_us)
    return taken


def write(spans: Spans, number: int, ended_ns: int, total_us: int, looked_at: bool, durable: bool = False) -> None:
    taken = span(spans, ended_ns, OWN_DISK=total_us) if looked_at else None
    spans.window.writes.add(total_us * US)
    spans.write(number, ended_ns, total_us * US, ended_ns - 7 * US, taken, (4096 * number, 4096, durable))


def test_figures_are_of_the_last_two_windows_and_sums_of_all() -> None:
    spans = Spans()
    begin = spans.window.began_ns
    for window in range(4):
        for number in range(10):
            write(spans, number, begin + window * WINDOW_NS + number, 100 * 10**window, looked_at=True)
    report = spans.report(begin + 3 * WINDOW_NS + 100)
    assert report["stages"][WRITE][DISK]["count"] == report["stages"][WRITE][TOTAL]["count"] == 20
    assert report["seconds"] == pytest.approx(WINDOW_NS / 1e9, rel=0.1)
    assert {entry["total_us"] for entry in report["slowest"]} == {10_000, 100_000}
    assert spans.all_writes().count == 40
    # Nobody writes any more: after a while nothing is told.
    assert spans.report(begin + 6 * WINDOW_NS)["stages"] == {}
    assert spans.all_writes().count == 40


def test_kinds_are_told_apart() -> None:
    spans = Spans()
    at_ns = spans.window.began_ns + 1
    write(spans, 1, at_ns, 10, looked_at=True)
    write(spans, 2, at_ns, 1000, looked_at=True, durable=True)
    spans.flush(at_ns, 5000 * US, span(spans, at_ns, ROUND=4990))
    found = spans.report(at_ns)["stages"]
    assert set(found) == {WRITE, DURABLE_WRITE, FLUSHES}
    assert found[FLUSHES][stages.FLUSH]["p50_us"] == pytest.approx(4990, rel=0.13)


def test_the_slowest_are_kept_and_no_more() -> None:
    spans = Spans()
    at_ns = spans.window.began_ns + 1
    totals = list(range(1, 200))
    random.Random(2).shuffle(totals)
    for number, total_us in enumerate(totals):
        write(spans, number, at_ns, total_us, looked_at=True)
    slowest = spans.report(at_ns)["slowest"]
    assert [entry["total_us"] for entry in slowest] == list(range(199, 199 - SLOWEST_KEPT, -1))
    assert slowest[0]["stages_us"][DISK] == 199
    assert len(spans._free) == 1, "spans are used again"


def test_a_slow_write_is_caught_though_nobody_looked_at_it() -> None:
    spans = Spans()
    ended_ns = spans.window.began_ns + 10**9
    write(spans, 17, ended_ns, 60_000, looked_at=False)
    [entry] = spans.report(ended_ns)["slowest"]
    assert entry == {
        "kind": WRITE,
        "offset": 17 * 4096,
        "length": 4096,
        "ago_s": 0.0,
        "total_us": 60_000,
        "stages_us": {BEFORE: 59_993, AFTER: 7},
    }


def test_after_a_slow_write_the_next_ones_are_looked_at() -> None:
    spans = Spans()
    ended_ns = spans.window.began_ns + 10**9
    spans.mask = SAMPLE_EVERY - 1
    write(spans, 5, ended_ns, 60_000, looked_at=False)
    assert spans.mask == 0
    write(spans, 5 + BURST_WRITES - 1, ended_ns + 1, 10, looked_at=True)
    assert spans.mask == 0
    write(spans, 5 + BURST_WRITES, ended_ns + 2, 10, looked_at=True)
    assert spans.mask == SAMPLE_EVERY - 1
    # Not again and again: a volume that has slow writes all the time is not slowed down further.
    write(spans, 100, ended_ns + 3, 60_000, looked_at=False)
    assert spans.mask == SAMPLE_EVERY - 1
    write(spans, 101, ended_ns + 2 * 10**9, 60_000, looked_at=False)
    assert spans.mask == 0


def test_those_after_a_slow_one_do_not_count_among_the_others() -> None:
    """A disk that is slow for forty writes in a thousand: a twenty-fifth of the writes, and most of all looks."""
    spans = Spans()
    at_ns = spans.window.began_ns
    for number in range(30_000):
        looked_at = number & spans.mask == 0
        total_us = 20_000 if number % 1000 < 40 else 40
        at_ns += 2 * 10**6
        spans.window.writes.add(total_us * US)
        if looked_at or total_us * US > spans.slow_ns:
            taken = span(spans, at_ns, OWN_DISK=total_us) if looked_at else None
            spans.write(number + 1, at_ns, total_us * US, at_ns, taken, (0, 4096, False))
    found = spans.report(at_ns)
    all_looks = merged(part[WRITE][TOTAL] for part in (spans.window.stages, spans.window.others))
    assert all_looks.percentile_us(0.7) == pytest.approx(20_000, rel=0.13)
    regular = spans.window.stages[WRITE][TOTAL]
    assert regular.count == pytest.approx(30_000 / SAMPLE_EVERY, rel=0.1)
    assert regular.percentile_us(0.9) == pytest.approx(40, rel=0.13)
    assert found["stages"][WRITE][TOTAL]["count"] == found["stages"][WRITE][DISK]["count"] == regular.count


def test_where_few_are_looked_at_all_of_them_count() -> None:
    spans = Spans()
    for number in range(1, BURST_WRITES):
        write(spans, number, spans.window.began_ns + number, 10, looked_at=True)
    assert spans.report(spans.window.began_ns + 100)["stages"][WRITE][TOTAL]["count"] == BURST_WRITES - 1


def test_slow_is_a_multiple_of_what_is_usual() -> None:
    spans = Spans()
    assert spans.slow_ns == SLOW_NS
    at_ns = spans.window.began_ns + 1
    for number in range(RECKON_EVERY + 1):
        write(spans, number, at_ns, 40, looked_at=True)
    assert 360 * US <= spans.slow_ns <= 440 * US
    for number in range(20 * RECKON_EVERY):
        write(spans, number, at_ns, 20_000, looked_at=True)
    assert spans.slow_ns == SLOW_NS


def test_the_first_writes_of_a_window_are_looked_at() -> None:
    spans = Spans()
    begin = spans.window.began_ns
    for number in range(1, BURST_WRITES + 1):
        assert spans.mask == 0
        write(spans, number, begin + number, 10, looked_at=True)
    assert spans.mask == SAMPLE_EVERY - 1
    write(spans, 1000, begin + WINDOW_NS, 10, looked_at=True)
    assert spans.mask == 0


def test_one_write_in_so_many_has_a_span() -> None:
    trace = Trace()
    trace.spans.mask = SAMPLE_EVERY - 1
    spans = [trace.writes & trace.spans.mask == 0 for trace.writes in range(4 * SAMPLE_EVERY)]
    assert sum(spans) == 4
    with pytest.raises(AssertionError):
        Spans(every=12)


def test_a_lap_books_the_time_since_the_last_one() -> None:
    trace = Trace()
    started_ns = trace.start()
    taken = trace.spans.take(started_ns)
    taken.lap(stages.TURN)
    taken.lap(stages.OWN_DISK)
    taken.lap(stages.TURN)
    assert sum(taken.laps_ns) == taken.at_ns - started_ns
    assert taken.laps_ns[stages.LOG] == 0


def test_what_a_thread_does_after_the_answer_is_no_part_of_the_request() -> None:
    spans = Spans()
    span = spans.take(1000)
    spans.write(1, 6000, 5000, 2000, span, (0, 4096, False))
    assert sum(span.laps_ns) == 5000

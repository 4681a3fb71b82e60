"""SVG pictures of a record: latencies side by side, and the foreground's p99 around a resync.

Written by hand: two line charts need no library, and the same record makes the same bytes, so that a test can tell
whether a picture in the repository is of the figures beside it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from bench import budget, works
from bench.figures import Record

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 46, 50
COLOURS = ("#222222", "#d1495b", "#edae49", "#00798c", "#66a182", "#8d5fa8", "#2e6fd9")
Points = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` onto 0 to 1, evenly in `scale` of them."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high, value = (
            math.log(max(one, 1e-9)) if self.logarithmic else one for one in (self.low, self.high, value)
        )
        return min(1.0, max(0.0, (value - low) / (high - low)))


def decades(title: str, values: Iterable[float]) -> Axis:
    """A logarithmic axis of microseconds around the values, with ticks at 1, 2 and 5."""
    found = [value for value in values if value > 0] or [1.0]
    steps = [digit * 10.0**power for power in range(-1, 8) for digit in (1, 2, 5)]
    low = max((step for step in steps if step <= min(found)), default=steps[0])
    high = min((step for step in steps if step > max(found)), default=steps[-1])
    ticks = [(step, f"{step:g} µs" if step < 1000 else f"{step / 1000:g} ms") for step in steps if low <= step <= high]
    return Axis(title, low, high, ticks, logarithmic=True)


def even(title: str, high: float, unit: str) -> Axis:
    """A linear axis from 0, with five ticks or so at whole steps."""
    step = next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e9) if high / step <= 8)
    ticks = [(number * step, f"{number * step:g} {unit}") for number in range(int(high / step) + 1)]
    return Axis(title, 0.0, high, ticks)


def nines(percent: float) -> float:
    """0 for 0 %, 1 for 90 %, 2 for 99 %: where the tail of a distribution is, it has room."""
    return -math.log10(max(1 - percent / 100, 1e-6))


@dataclass(frozen=True)
class Chart:
    """Curves over two axes; `band`: a stretch of the x axis that is shaded, and what it is."""

    title: str
    across: Axis
    up: Axis
    curves: Mapping[str, Points]
    band: tuple[float, float, str] | None = None

    def svg(self) -> str:
        text = 'font-family="sans-serif" font-size="12" fill="#222222"'
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<g {text}><text x="{LEFT}" y="24" font-size="15">{escape(self.title)}</text>',
            *self._band(),
            *self._grid(),
            *self._curves(),
            "</g></svg>",
        ]
        return "\n".join(parts) + "\n"

    def _x(self, value: float) -> float:
        return round(LEFT + self.across.place(value) * (WIDTH - LEFT - RIGHT), 1)

    def _y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - self.up.place(value) * (HEIGHT - TOP - BOTTOM), 1)

    def _band(self) -> list[str]:
        if self.band is None:
            return []
        begin, end = self._x(self.band[0]), self._x(self.band[1])
        shade = (
            f'<rect x="{begin}" y="{TOP}" width="{end - begin:.1f}" height="{HEIGHT - TOP - BOTTOM}" fill="#eef3fb"/>'
        )
        return [shade, f'<text x="{begin + 4}" y="{TOP + 15}" fill="#2e6fd9">{escape(self.band[2])}</text>']

    def _grid(self) -> list[str]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = []
        for value, label in self.across.ticks:
            x = self._x(value)
            parts.append(f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}" stroke="#dddddd"/>')
            parts.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{escape(label)}</text>')
        for value, label in self.up.ticks:
            y = self._y(value)
            parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}" stroke="#dddddd"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        middle = (LEFT + right) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{escape(self.across.title)}</text>')
        return parts

    def _curves(self) -> list[str]:
        parts = []
        for number, (name, points) in enumerate(self.curves.items()):
            colour = COLOURS[number % len(COLOURS)]
            path = " ".join(f"{self._x(across)},{self._y(up)}" for across, up in points)
            y = TOP + 12 + number * 20
            x = WIDTH - RIGHT + 14
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 20}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>')
            parts.append(f'<text x="{x + 26}" y="{y}">{escape(name)}</text>')
        return parts


def latencies(record: Record, work: str) -> str | None:
    """How long so many percent of the requests took at most, a curve for each target."""
    curves = record.latencies.get(work)
    if not curves:
        return None
    percents = (0, 50, 90, 99, 99.9, 99.99)
    across = Axis(
        "so many of the requests took at most so long",
        0.0,
        nines(99.99),
        [(nines(percent), f"{percent:g} %") for percent in percents],
    )
    up = decades("", (latency for points in curves.values() for _, latency in points))
    drawn = {name: [(nines(percent), latency) for percent, latency in points] for name, points in curves.items()}
    return Chart(work, across, up, drawn).svg()


def resync(record: Record) -> str | None:
    """p99 of the foreground's writes by time, with and without a resync."""
    timeline = record.timeline
    if not timeline:
        return None
    # A window's figure stands in its middle, the time begins with the first write.
    half_s = timeline["window_s"] / 2
    begin_s = min(when for when, _ in timeline["beside"])
    curves = {
        "both in step": [(when + half_s, p99) for when, p99 in timeline["without"]],
        "around the resync": [(when - begin_s + half_s, p99) for when, p99 in timeline["beside"]],
    }
    last_s = max(when for points in curves.values() for when, _ in points) + half_s
    up = decades("", (p99 for points in curves.values() for _, p99 in points))
    band = (-begin_s, timeline["resync_s"] - begin_s, "resync")
    title = "4 KiB random writes, depth 1, during a resync: p99 of each half second"
    return Chart(title, even("seconds", last_s, "s"), up, curves, band).svg()


def all_of(record: Record) -> dict[str, str]:
    """Pictures by name, of what was measured."""
    drawn = {
        "latency": latencies(record, works.WRITE),
        "latency-busy": latencies(record, works.WRITE_BUSY),
        "latency-depth-16": latencies(record, works.WRITE_DEEP),
        "latency-fsync": latencies(record, works.FLUSH),
        "resync": resync(record),
        "budget": budget.picture(record, works.BUDGET),
    }
    return {name: picture for name, picture in drawn.items() if picture is not None}

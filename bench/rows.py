"""The table that a run ends in: what is compared with what, and the goal. One list; a row is data and nothing else.

What has to be measured follows from the figures that the rows name.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from bench import budget, drbd, works
from bench.figures import Figure, Record, Value
from bench.works import (
    ALONE,
    APART,
    BARE,
    FILE,
    LARGE_FILE,
    MIRRORED_A,
    MIRRORED_B,
    MIRRORED_C,
    NO_SPIN,
    QUORUM,
    SMALL_LOG,
    TWO_FILES,
    UNTOUCHED,
    UNTOUCHED_FILE,
)

NOT_AVAILABLE = "not available"
VERDICTS = {True: "pass", False: "falls short", None: ""}


class Goal(NamedTuple):
    """A bound on a figure (`unit` is its own) or on a ratio (×)."""

    sign: str
    limit: float
    unit: str = "×"

    def passed(self, value: float) -> bool:
        return value <= self.limit if self.sign == "≤" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g} {self.unit}"


def at_most(limit: float, unit: str = "×") -> Goal:
    return Goal("≤", limit, unit)


def at_least(limit: float, unit: str = "×") -> Goal:
    return Goal("≥", limit, unit)


@dataclass(frozen=True)
class Row:
    """`figure`, or its ratio to `beside`. Without a goal it is there to compare with."""

    section: str
    name: str
    figure: Figure
    beside: Figure | None
    goal: Goal | None


def row(
    section: str, name: str, goal: Goal | None, key: str, one: tuple[str, str], other: tuple[str, str] | None = None
) -> Row:
    """`one` and `other`: (work, target)."""
    return Row(section, name, Figure(*one, key), Figure(*other, key) if other else None, goal)


SMALL = "One write at a time, × nbdkit file"
DURABLE = "Durable writes, × nbdkit file"
MANY = "Throughput, × nbdkit file"
READS = "Reads, × nbdkit file"
EXTENTS = "Cold extents"
RESYNC = "Resync"
OWN = "By itself"
BUDGET = "Where the time of one request goes"
VETH = "Each replica in a network namespace of its own, × nbdkit file"

IDLE, BESIDE, WITHOUT = "idle", "beside writes", "writes without"

ROWS = (
    row(SMALL, "C, p50", at_most(1.2), "p50_us", (works.WRITE, MIRRORED_C), (works.WRITE, FILE)),
    row(SMALL, "C, p99", at_most(3), "p99_us", (works.WRITE, MIRRORED_C), (works.WRITE, FILE)),
    row(SMALL, "C without spinning, p50", at_most(2.2), "p50_us", (works.WRITE, NO_SPIN), (works.WRITE, FILE)),
    row(
        SMALL,
        "C beside two busy loops, p50",
        at_most(2.7),
        "p50_us",
        (works.WRITE_BUSY, MIRRORED_C),
        (works.WRITE_BUSY, FILE),
    ),
    row(
        SMALL,
        "C beside two busy loops, p99, × the same without spinning",
        at_most(1),
        "p99_us",
        (works.WRITE_BUSY, MIRRORED_C),
        (works.WRITE_BUSY, NO_SPIN),
    ),
    row(SMALL, "A, p50", at_most(1.2), "p50_us", (works.WRITE, MIRRORED_A), (works.WRITE, FILE)),
    row(SMALL, "B, p50", at_most(1.2), "p50_us", (works.WRITE, MIRRORED_B), (works.WRITE, FILE)),
    row(SMALL, "qemu quorum, p50", None, "p50_us", (works.WRITE, QUORUM), (works.WRITE, FILE)),
    row(SMALL, "qemu quorum, p99", None, "p99_us", (works.WRITE, QUORUM), (works.WRITE, FILE)),
    row(DURABLE, "C, write and fsync, p50", at_most(2), "p50_us", (works.FLUSH, MIRRORED_C), (works.FLUSH, FILE)),
    row(DURABLE, "C, FUA write, p50", at_most(1.5), "p50_us", (works.FUA, MIRRORED_C), (works.FUA, FILE)),
    *(
        row(DURABLE, f"{TWO_FILES}, {what}, p50", None, "p50_us", (work, TWO_FILES), (work, FILE))
        for what, work in (("write and fsync", works.FLUSH), ("FUA write", works.FUA))
    ),
    row(
        MANY,
        "C, 4 KiB writes, depth 16, IOPS",
        at_least(0.3),
        "operations_per_s",
        (works.WRITE_DEEP, MIRRORED_C),
        (works.WRITE_DEEP, FILE),
    ),
    row(
        MANY,
        "the same, × qemu quorum",
        at_least(3),
        "operations_per_s",
        (works.WRITE_DEEP, MIRRORED_C),
        (works.WRITE_DEEP, QUORUM),
    ),
    row(
        MANY,
        "C, 1 MiB sequential writes, depth 4",
        at_least(0.7),
        "bytes_per_s",
        (works.LARGE, MIRRORED_C),
        (works.LARGE, FILE),
    ),
    row(READS, "C, depth 1, IOPS", at_least(0.85), "operations_per_s", (works.READ, MIRRORED_C), (works.READ, FILE)),
    row(
        READS,
        "C, depth 16, IOPS",
        at_least(0.85),
        "operations_per_s",
        (works.READ_DEEP, MIRRORED_C),
        (works.READ_DEEP, FILE),
    ),
    *(
        row(READS, f"{BARE}, depth {depth}, IOPS", None, "operations_per_s", (work, BARE), (work, FILE))
        for depth, work in ((1, works.READ), (16, works.READ_DEEP))
    ),
    row(
        EXTENTS,
        "random over 20 times the log, p50, × hot",
        at_most(1.5),
        "p50_us",
        (works.COLD, SMALL_LOG),
        (works.HOT, SMALL_LOG),
    ),
    row(
        EXTENTS,
        "the same at depth 16, IOPS, × hot",
        at_least(0.5),
        "operations_per_s",
        (works.COLD_DEEP, SMALL_LOG),
        (works.HOT_DEEP, SMALL_LOG),
    ),
    row(EXTENTS, f"{LARGE_FILE}, p50, × hot", None, "p50_us", (works.COLD, LARGE_FILE), (works.HOT, LARGE_FILE)),
    row(
        EXTENTS,
        f"{LARGE_FILE}, at depth 16, IOPS, × hot",
        None,
        "operations_per_s",
        (works.COLD_DEEP, LARGE_FILE),
        (works.HOT_DEEP, LARGE_FILE),
    ),
    row(EXTENTS, "the slowest of them, depth 1", at_most(50, "ms"), "max_ms", (works.COLD, SMALL_LOG)),
    row(EXTENTS, "the slowest of them, depth 16", at_most(50, "ms"), "max_ms", (works.COLD_DEEP, SMALL_LOG)),
    row(EXTENTS, "the same right after hot writes", at_most(50, "ms"), "max_ms", (works.COLD_AFTER_HOT, SMALL_LOG)),
    *(
        Row(EXTENTS, name, Figure(works.TOUCH, target, "p99_9_us"), Figure(works.TOUCH, target, "p99_us"), goal)
        for name, target, goal in (
            ("sequential, first touch of each extent, p99.9, × p99", UNTOUCHED, at_most(2)),
            (f"{UNTOUCHED_FILE}, sequential, p99.9, × p99", UNTOUCHED_FILE, None),
        )
    ),
    row(
        RESYNC,
        "idle, speed, × nbdcopy",
        at_least(0.7),
        "bytes_per_s",
        (works.RESYNC, IDLE),
        (works.RESYNC, works.NBDCOPY),
    ),
    row(RESYNC, "idle, the busier side", at_most(1, "cores"), "cores", (works.RESYNC, IDLE)),
    Row(
        RESYNC,
        "1 % at random: sent, × dirty",
        Figure(works.SCATTERED, IDLE, "sent_bytes"),
        Figure(works.SCATTERED, IDLE, "dirty_bytes"),
        at_most(1),
    ),
    row(RESYNC, "1 % at random, time", at_most(5, "s"), "seconds", (works.SCATTERED, IDLE)),
    row(
        RESYNC,
        "foreground write, p99, × without a resync",
        at_most(2),
        "p99_us",
        (works.RESYNC, BESIDE),
        (works.RESYNC, WITHOUT),
    ),
    row(
        RESYNC,
        "speed beside the foreground, × idle",
        at_least(0.3),
        "bytes_per_s",
        (works.RESYNC, BESIDE),
        (works.RESYNC, IDLE),
    ),
    row(OWN, "memory of the largest process, volume of 100 GiB", at_most(64, "MiB"), "peak_mib", (works.MEMORY, IDLE)),
    row(OWN, "no peer, p50, × nbdkit file", at_most(1.15), "p50_us", (works.WRITE, ALONE), (works.WRITE, FILE)),
    row(
        OWN,
        "no peer, depth 16, IOPS, × nbdkit file",
        at_least(0.75),
        "operations_per_s",
        (works.WRITE_DEEP, ALONE),
        (works.WRITE_DEEP, FILE),
    ),
    row(OWN, f"{BARE}, p50, × nbdkit file", None, "p50_us", (works.WRITE, BARE), (works.WRITE, FILE)),
    row(
        OWN,
        f"{BARE}, depth 16, IOPS, × nbdkit file",
        None,
        "operations_per_s",
        (works.WRITE_DEEP, BARE),
        (works.WRITE_DEEP, FILE),
    ),
    *(
        row(BUDGET, f"{name}, as the client sees it, p50", None, "client_us", (works.BUDGET, name))
        for name in budget.KINDS
    ),
    row(BUDGET, "a write that no span looks at pays", None, "not_looked_at_ns", (works.BUDGET, budget.SPANS)),
    row(BUDGET, "a look, at one write in 32", None, "look_ns", (works.BUDGET, budget.SPANS)),
    row(VETH, "C, p50", at_most(1.2), "p50_us", (works.WRITE, APART), (works.WRITE, FILE)),
    row(VETH, "C, p99", at_most(3), "p99_us", (works.WRITE, APART), (works.WRITE, FILE)),
    row(VETH, "C, write and fsync, p50", at_most(2), "p50_us", (works.FLUSH, APART), (works.FLUSH, FILE)),
    row(VETH, "C, FUA write, p50", at_most(1.5), "p50_us", (works.FUA, APART), (works.FUA, FILE)),
    row(
        VETH,
        "C, depth 16, IOPS",
        at_least(0.3),
        "operations_per_s",
        (works.WRITE_DEEP, APART),
        (works.WRITE_DEEP, FILE),
    ),
    row(
        VETH,
        "C, 1 MiB sequential writes, depth 4",
        at_least(0.7),
        "bytes_per_s",
        (works.LARGE, APART),
        (works.LARGE, FILE),
    ),
)

OWN_DISK = "In a guest, × each one's own unmirrored disk"

# Of `make bench-drbd`, a run of its own: there to compare with, so without goals.
DRBD_ROWS = tuple(
    row(OWN_DISK, f"{target}, {what}", None, key, (works.GUESTS, target), (works.GUESTS, other))
    for what, key in (("depth 1, p50", "p50_us"), ("depth 1, p99", "p99_us"), ("depth 16, IOPS", drbd.DEEP))
    for target, other in ((drbd.DRBD, drbd.GUEST_DISK), (drbd.GUEST_MIRROR, drbd.GUEST_FILE))
)


def matching(text: str, rows: Iterable[Row] = ROWS) -> list[Row]:
    """Rows whose section, name, work or target holds the text."""
    wanted = text.lower()
    return [one for one in rows if wanted in " | ".join((one.section, one.name, *one.figure[:2])).lower()]


def needed(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Which target has to do which work, each once."""
    found: dict[str, list[str]] = {}
    for one in rows:
        for figure in (one.figure, one.beside):
            if figure is not None and figure.target not in found.setdefault(figure.work, []):
                found[figure.work].append(figure.target)
    return found


class Judged(NamedTuple):
    """A row and what came of it; `value` is None where nothing was measured, `passed` also where there is no goal."""

    row: Row
    value: Value | None
    passed: bool | None

    @property
    def verdict(self) -> str:
        return NOT_AVAILABLE if self.value is None else VERDICTS[self.passed]


def judge(record: Record, rows: Iterable[Row] = ROWS) -> list[Judged]:
    judged = []
    for one in rows:
        value = record.value(one.figure, one.beside)
        passed = one.goal.passed(value.middle) if value is not None and one.goal is not None else None
        judged.append(Judged(one, value, passed))
    return judged

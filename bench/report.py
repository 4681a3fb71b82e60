"""From a record to what people read: the table on the terminal, docs/performance.md, and how a number is written."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import budget, pictures, processor, tried, works
from bench.figures import Record, Value
from bench.rows import DRBD_ROWS, NOT_AVAILABLE, ROWS, Judged, Row, judge

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
LATEST = RESULTS / "latest.json"
BESIDE_DRBD = RESULTS / "drbd.json"
TRIED = RESULTS / "tried.json"
PROFILE = RESULTS / "profile.json"
# A full run on another machine is kept as `machine-NAME.json`.
ELSEWHERE = "machine-*.json"
PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- from here on written by `make report` -->"
END = "<!-- until here written by `make report` -->"

HEADINGS = ("", "now", "rounds", "measured", "goal", "")
STYLES = {"pass": "green", "falls short": "red"}
# What a figure looks like to people: its unit, and how many of it are one.
UNITS = {
    "ns": ("ns", 1.0, ".0f"),
    "us": ("µs", 1.0, ".0f"),
    "ms": ("ms", 1.0, ".1f"),
    "mib": ("MiB", 1.0, ".0f"),
    "per_s": ("/s", 1.0, ".0f"),
    "bytes_per_s": ("MB/s", 1e6, ".0f"),
    "bytes": ("MiB", float(1 << 20), ".1f"),
    "seconds": ("s", 1.0, ".2f"),
    "cores": ("cores", 1.0, ".2f"),
}


def load(path: Path = LATEST) -> Record:
    """A record that was written; an empty one, of which nothing is available, when there is none."""
    return Record(**json.loads(path.read_text())) if path.exists() else Record()


def elsewhere() -> list[Record]:
    """The full runs that were kept of other machines."""
    return [load(path) for path in sorted(RESULTS.glob(ELSEWHERE))]


def amount(value: float, key: str) -> str:
    """A figure with its unit, by the end of its key."""
    end = max((end for end in UNITS if key.endswith(end)), key=len)
    unit, size, form = UNITS[end]
    return f"{value / size:{form}} {unit}"


def fact(item: tuple[str, Any]) -> str:
    """A key with its unit at the end, and its value, in words."""
    key, value = item
    if key.endswith("_bytes"):
        key, value = key.removesuffix("_bytes"), f"{value >> 20} MiB"
    elif key.endswith("_percent"):
        key, value = key.removesuffix("_percent"), f"{value} %"
    return f"{key.replace('_', ' ')}: {value}"


def ratio(value: float) -> str:
    return f"{value:.2f}"


def cells(judged: Judged, record: Record) -> tuple[str, ...]:
    """The row as text, under HEADINGS."""
    row, value = judged.row, judged.value
    goal = str(row.goal) if row.goal else ""
    if value is None:
        return row.name, "", "", "", goal, judged.verdict
    if row.beside is None:
        return row.name, amount(value.middle, row.figure.key), _range(value, row), "", goal, judged.verdict
    parts = [record.value(figure) for figure in (row.figure, row.beside)]
    keys = (row.figure.key, row.beside.key)
    both = " : ".join(amount(part.middle, key) for part, key in zip(parts, keys, strict=True) if part is not None)
    return row.name, f"{ratio(value.middle)} ×", _range(value, row), both, goal, judged.verdict


def _range(value: Value, row: Row) -> str:
    if value.lowest == value.highest:
        return ""
    text = ratio if row.beside is not None else lambda one: amount(one, row.figure.key).split()[0]
    return f"{text(value.lowest)}–{text(value.highest)}"


def summary(record: Record, rows: Iterable[Row] = ROWS) -> str:
    judged = [one for one in judge(record, rows) if one.row.goal is not None]
    if not judged:
        return "None of these has a goal."
    passed, absent = (sum(one.verdict == word for one in judged) for word in ("pass", NOT_AVAILABLE))
    return f"Of {len(judged)} goals {passed} are reached; {absent} could not be measured."


def picture_path(name: str, path: Path = LATEST) -> Path:
    return path.with_name(f"{path.stem}-{name}.svg")


def terminal_table(record: Record, rows: Iterable[Row]) -> Table:
    table = Table(caption="now: the median of the rounds; rounds: from the least to the most", highlight=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in HEADINGS[1:4] else "left")
    section = ""
    for one in judge(record, rows):
        if one.row.section != section:
            section = one.row.section
            table.add_section()
            table.add_row(f"[bold]{section}")
        *words, verdict = cells(one, record)
        style = STYLES.get(verdict, "dim")
        table.add_row(f"  {words[0]}", *words[1:], f"[{style}]{verdict}[/]" if verdict else "")
    return table


def markdown(record: Record, rows: Iterable[Row], command: str) -> str:
    """The machine, what could not be measured, the table."""
    if not record.machine:
        return f"No full run of `{command}` is in the repository yet."
    absent = [f"Not available: {name}: {reason}." for name, reason in record.absent.items()]
    lines = []
    section = ""
    for one in judge(record, rows):
        if one.row.section != section:
            section = one.row.section
            lines += ["", f"**{section}**", "", f"| {' | '.join(HEADINGS)} |", "| --- " * len(HEADINGS) + "|"]
        lines.append(f"| {' | '.join(cells(one, record))} |")
    machine, settings = (f"{'; '.join(map(fact, one.items()))}." for one in (record.machine, record.settings))
    origin = [f"Machine: {machine}", f"Sizes: {settings}", *absent, summary(record, rows)]
    return "\n\n".join([*origin, "\n".join(lines).strip()])


def _budget(record: Record) -> list[str]:
    tables = budget.tables(record, works.BUDGET)
    return ["### Where the time of one request goes", *tables] if tables else []


def _profile(record: Record) -> list[str]:
    """What `python -m bench.profile` found; its own machine, for it is a run of its own."""
    tables = processor.tables(record)
    if not tables:
        return []
    origin = f"Machine: {'; '.join(map(fact, record.machine.items()))}."
    picture = f"![where the processor goes](../bench/results/{PROFILE.with_suffix('.svg').name})"
    return ["### Where the processor goes", origin, picture, *tables]


def page(
    text: str, record: Record, beside_drbd: Record, again: Record, profiled: Record, others: Iterable[Record] = ()
) -> str:
    """docs/performance.md made anew from what was measured; `again`: what was tried."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    parts = [
        markdown(record, ROWS, "make bench"),
        *(f"![{name}](../bench/results/{picture_path(name).name})" for name in pictures.all_of(record)),
        *_budget(record),
        *_profile(profiled),
        *(part for other in others for part in ("### On another machine", markdown(other, ROWS, "make bench"))),
        "### In guests, with DRBD",
        markdown(beside_drbd, DRBD_ROWS, "make bench-drbd"),
        "### What was tried, measured again",
        markdown(again, tried.ROWS, "make bench-tried"),
    ]
    return "\n\n".join([f"{head}{BEGIN}", *parts, f"{END}{tail}"])

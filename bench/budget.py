"""Where the time of one request goes: client, nbdkit, lock, log, both disks, the way to the peer and back.

From the spans that a volume keeps by itself (`nbdmirror why-slow DIR --json`), on both sides, and from what the client
saw; medians, so that they need not add up to the last microsecond. A request that is looked at takes longer for that,
so its steps are scaled to what all take. The peer works while the own disk does, so its steps lie beside that.
`python -m bench.budget` measures nothing else; `python -m bench` has it with the rest.

The price of the spans themselves is measured apart from any server: of a write that is not looked at, and of a look.
"""

import re
import sys
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import NamedTuple

import click

from bench import cycles, fio
from bench.figures import Record, Round
from bench.processes import BenchError, command
from bench.scale import MIB, Scale
from bench.servers import NbdMirror, ask

Say = Callable[[str], None]
SMALLEST_LOG_EXTENTS = 64
SMALLEST_LOG_BYTES = SMALLEST_LOG_EXTENTS * 4 * MIB
SPANS = "spans"
LEAST_US = 0.2


class Kind(NamedTuple):
    """`spans`: what `why-slow` calls it; on the peer's side `applied`."""

    spans: str
    applied: str
    size_bytes: int
    filled_bytes: int
    # Of bench/cycles.py; otherwise fio's random writes.
    cycle: str = ""
    settings: str = ""
    # Sent before its record is written.
    ahead: bool = False


_COLD = f"activity_log_extents = {SMALLEST_LOG_EXTENTS}"
KINDS: dict[str, Kind] = {
    "hot write": Kind("write", "apply", 64 * MIB, 64 * MIB),
    "cold write": Kind("write", "apply", 20 * SMALLEST_LOG_BYTES, 0, settings=_COLD, ahead=True),
    "FUA write": Kind("durable write", "durable apply", 64 * MIB, 64 * MIB, "fua"),
    "write and flush": Kind("flush", "apply flush", 64 * MIB, 64 * MIB, "flush"),
}


class Step(NamedTuple):
    """From `begin_us` on, counted from when the client asked."""

    name: str
    begin_us: float
    us: float


def steps(_scale: Scale) -> int:
    return len(KINDS) + 1


def measure(work: str, directory: Path, scale: Scale, record: Record, say: Say) -> None:
    directory.mkdir()
    for number, (name, kind) in enumerate(KINDS.items()):
        say(f"{work}: {name}")
        record.add(work, name, [_measure_kind(kind, directory / str(number), scale)])
    say(f"{work}: the spans themselves")
    record.add(work, SPANS, [price_of_spans()])


def _measure_kind(kind: Kind, directory: Path, scale: Scale) -> Round:
    directory.mkdir()
    target = NbdMirror("budget", directory, kind.size_bytes, kind.filled_bytes, "C", kind.settings)
    try:
        target.start()
        if kind.filled_bytes:
            # What the filling brought is forgotten with the servers.
            fio.fill(target.uri, kind.filled_bytes)
            target.stop()
            for replica in reversed(target.replicas):
                target.serve(replica)
            target.wait_in_step()
        target.wait_until_proven()
        seconds = 2 * scale.seconds
        if kind.cycle:
            seen = cycles.measure(target, kind.cycle, kind.size_bytes, seconds)
        else:
            options = ("--rw=randwrite", "--bs=4k", "--iodepth=1", *fio.timed(kind.size_bytes, seconds))
            seen = fio.measure(target.uri, options, seconds)
        (own, all_us), (peer, _) = (_stages(replica) for replica in target.replicas)
    finally:
        target.stop()
    values = {f"{stage}_us": us for stage, us in own[kind.spans].items()}
    values |= {f"peer_{stage}_us": us for stage, us in peer.get(kind.applied, {}).items()}
    values["ahead"] = float(kind.ahead)
    values["client_us"] = seen.values["p50_us"]
    # A cycle of both is one request of each kind; each flush is looked at.
    flushes = kind.spans == "flush"
    values["write_us"] = all_us if flushes else 0.0
    values["answered_us"] = all_us + (values["total_us"] if flushes else 0.0)
    return Round(values)


def _stages(replica: Path) -> tuple[dict[str, dict[str, float]], float]:
    """By kind and stage, and of all writes, looked at or not."""
    found = ask(replica, "why_slow")
    if found is None:
        raise BenchError(f"{replica} does not say why it is slow")
    of_kinds = {
        kind: {stage: figures["p50_us"] or 0.0 for stage, figures in stages.items()}
        for kind, stages in found["stages"].items()
    }
    return of_kinds, found["writes"]["p50_us"] or 0.0


def _sent_ahead(client_us: float, answered_us: float, us: Callable[[str], float]) -> list[Step]:
    """The peer is at work while the record is written: nobody waits for it, so that its way is not to be seen."""
    at = outside = max(0.0, client_us - answered_us) / 2
    found = [Step("client, nbdkit: in", 0.0, outside)]
    for key, name in (("range", "lock"), ("interpreter", "interpreter"), ("link", "send")):
        found.append(Step(name, at, us(key)))
        at += us(key)
    begin = at
    for key, name in (
        ("peer_receive", "peer: receive"),
        ("peer_own_disk", "peer: park"),
        ("peer_reply", "peer: answer"),
    ):
        found.append(Step(name, begin, us(key)))
        begin += us(key)
    for key, name in (("log", "log"), ("own_disk", "own disk")):
        found.append(Step(name, at, us(key)))
        at += us(key)
    found.append(Step("client, nbdkit: out", max(at, begin), outside))
    return found


def waterfall(values: Mapping[str, float]) -> list[Step]:
    """One request as its steps, in the order in which they begin."""

    looked_at_us = values["total_us"] + values["write_us"]
    scale = min(1.0, values["answered_us"] / looked_at_us) if looked_at_us else 1.0

    def us(name: str) -> float:
        return max(0.0, scale * values.get(f"{name}_us", 0.0))

    if values.get("ahead"):
        return _sent_ahead(values["client_us"], values["answered_us"], us)
    # Half on the way in, half on the way out, for want of a clock that both share.
    at = outside = max(0.0, values["client_us"] - values["answered_us"]) / 2
    found = [Step("client, nbdkit: in", 0.0, outside)]
    before = (("write", "the write before"), ("range", "lock"), ("log", "log"), ("flush", "other flushes"))
    for key, name in (*before, ("interpreter", "interpreter")):
        # Less is the least that a histogram can tell.
        if us(key) > LEAST_US:
            found.append(Step(name, at, us(key)))
            at += us(key)
    known = us("peer_receive") + us("peer_own_disk") + us("peer_reply")
    both = max(us("total") - us("range") - us("log") - us("flush") - us("interpreter"), us("own_disk"))
    way = max(0.0, both - known) / 2
    found.append(Step("own disk", at, us("own_disk")))
    # A flush that was sent with the write before it is over, or nearly, when it is asked for.
    begin = max(0.0, at + min(0.0, both - known))
    for name, length in (
        ("send, way there, waking", way),
        ("peer: receive", us("peer_receive")),
        ("peer: disk", us("peer_own_disk")),
        ("peer: answer", us("peer_reply")),
        ("way back, waking", way),
    ):
        found.append(Step(name, begin, length))
        begin += length
    found.append(Step("client, nbdkit: out", max(at + both, begin), outside))
    return found


# -- what people read


def tables(record: Record, work: str) -> list[str]:
    """Markdown, a table for each kind."""
    made = []
    for name, values in _measured(record, work).items():
        rows = [f"| {step.name} | {step.begin_us:.1f} | {step.us:.1f} |" for step in waterfall(values)]
        head = f"**{name}**: {values['client_us']:.0f} µs for the client (p50)"
        made.append("\n".join([head, "", "| step | begins, µs | takes, µs |", "| --- | ---: | ---: |", *rows]))
    return made


def _measured(record: Record, work: str) -> dict[str, Mapping[str, float]]:
    rounds = record.rounds.get(work, {})
    return {name: rounds[name][0] for name in KINDS if rounds.get(name)}


WIDTH, LEFT, RIGHT, ROW, HEAD = 720, 190, 80, 17, 34
# By who is at work.
COLOURS = {"client": "#999999", "peer": "#00798c", "own": "#d1495b", "send": "#edae49", "way": "#edae49"}
OTHERS = "#2e6fd9"


def picture(record: Record, work: str) -> str | None:
    """A waterfall for each kind, each in a scale of its own."""
    found = _measured(record, work)
    if not found:
        return None
    parts: list[str] = []
    y = 8
    for name, values in found.items():
        made = waterfall(values)
        end_us = max(step.begin_us + step.us for step in made) or 1.0
        y += HEAD
        parts.append(f'<text x="10" y="{y - 10}" font-size="15">{escape(name)}: {end_us:.0f} µs</text>')
        for step in made:
            x, wide = (value / end_us * (WIDTH - LEFT - RIGHT) for value in (step.begin_us, step.us))
            colour = COLOURS.get(re.split(r"\W", step.name)[0], OTHERS)
            parts.append(f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(step.name)}</text>')
            size = f'width="{max(wide, 0.5):.1f}" height="{ROW - 4}"'
            parts.append(f'<rect x="{LEFT + x:.1f}" y="{y + 2}" {size} fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + x + wide + 5:.1f}" y="{y + 12}">{step.us:.1f}</text>')
            y += ROW
    height = y + 12
    text = 'font-family="sans-serif" font-size="12" fill="#222222"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f"<g {text}>",
    ]
    return "\n".join([*head, *parts, "</g></svg>"]) + "\n"


# -- the price of the spans

_SETUP = (
    "from mirror.trace import Trace; trace = Trace(); trace.writes = 1; trace.spans.mask = 31; start = trace.start;"
    "where = (0, 4096, False)"
)
# As mirror.primary, mirror.change and mirror.deferred do it.
_NO_LOOK = ("span = None if trace.writes & trace.spans.mask else 1", *("if span is not None: pass",) * 8)
_LOOK = (
    "at = start(); span = trace.spans.take(at)",
    *(f"span.lap({number})" for number in (0, 1, 2, 3, 4, 5, 0)),
    "trace.spans.write(1, start(), start() - at, at, span, where)",
)


def price_of_spans() -> Round:
    """In a process of its own: the benchmark looks at the product from outside."""
    return Round({"not_looked_at_ns": _time_ns(_NO_LOOK), "look_ns": _time_ns(_LOOK)})


def _time_ns(statements: tuple[str, ...]) -> float:
    words = [sys.executable, "-m", "timeit", "-u", "nsec", "-n", "20000", "-r", "5", "-s", _SETUP, *statements]
    said = command(words)
    found = re.search(r"best of \d+: ([\d.e+]+) nsec", said)
    if found is None:
        raise BenchError(f"timeit said {said!r}")
    return float(found.group(1))


@click.command()
@click.option("--quick", is_flag=True, help="Half a minute instead of a whole one.")
@click.option("--directory", type=click.Path(path_type=Path, exists=True), default="/var/tmp", show_default=True)
def main(quick: bool, directory: Path) -> None:
    """Where the time of one request goes: client, nbdkit, lock, log, disks, and the way to the peer and back.

    For a hot, a cold and a FUA write and for a write with a flush: a table of the steps, and the picture
    bench/results/part-budget.svg.

    \b
    Example:
      python -m bench.budget --quick --directory /mnt/disk
    """
    # It needs this module.
    from bench.__main__ import main as bench

    bench(["--row", "one request goes", "--directory", str(directory), *(["--quick"] if quick else [])])


if __name__ == "__main__":
    main()

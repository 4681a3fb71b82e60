"""nbdmirror why-slow: where the time of requests goes, and the main cause in one sentence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from cli import output
from cli.ask import STATUS_S, fetch
from cli.parameters import directory_argument
from cli.status_view import limit_text, resync_text, verify_text
from mirror.core.units import size_text
from mirror.core.why_slow import SLOW_US, time_text

# What people are told a stage is, in the order in which a request meets them.
WORDS = {
    "receive": "receive it",
    "range": "wait for its turn",
    "log": "cold extent",
    "own_disk": "own disk",
    "link": "link",
    "peer_disk": "peer's disk",
    "flush": "other flushes",
    "reply": "answer",
    "interpreter": "interpreter",
    "range_or_log": "before it was sent",
    "disk_or_link": "disk or link",
    "gate": "the gate: a role changes, or a session begins",
    "total": "in all",
}
COLUMNS = (("p50", "p50_us"), ("p99", "p99_us"), ("p99.9", "p99_9_us"))
SLOWEST_SHOWN = 8


@click.command("why-slow")
@directory_argument
@click.option("--json", "as_json", is_flag=True, help="For machines; docs/operations.md describes the keys.")
def why_slow(directory: Path, as_json: bool) -> None:
    """Tell why a volume is slow.

    Where the time of writes and flushes goes by stage, the slowest requests of the last minutes, what waits now, and
    the main cause with what helps. Ask the primary: it sees the whole way. A secondary knows what its own disk takes.

    Stages overlap, because both disks work at the same time; "cold extent" is the wait for the activity log, and
    "interpreter" what is between the stages.

    Exit status 1: nothing serves the replica, so nothing was measured.

    \b
    Examples:
      nbdmirror why-slow /srv/vol
      nbdmirror why-slow /srv/vol --json | jq -r .says
    """
    with output.errors_as_json(as_json):
        facts = fetch(directory, "why_slow", STATUS_S)
        click.echo(json.dumps(facts, indent=2)) if as_json else output.say(page(facts))


def page(facts: dict[str, Any]) -> Text:
    """All of it for people; the sentence first."""
    style = "green" if facts["cause"] == "nothing" else "bold yellow"
    lines = [Text(f"{facts['name']}, {facts['role']}: ").append(facts["says"], style), Text()]
    lines += _table(facts) or [Text("no request was measured in the last minutes")]
    if facts["slowest"]:
        lines += [Text(), Text("slowest of the last minutes", "bold")]
        lines += [Text(f"  {_request(entry)}") for entry in facts["slowest"][:SLOWEST_SHOWN]]
    return Text("\n").join([*lines, Text(), output.rows(_beside(facts))])


def _table(facts: dict[str, Any]) -> list[Text]:
    lines: list[Text] = []
    for kind, stages in facts["stages"].items():
        count = stages["total"]["count"]
        heading = f"{kind} ({count} measured in {facts['seconds']:.0f} s)"
        lines.append(Text(f"{heading:44}" + "".join(f"{name:>10}" for name, _ in COLUMNS), "bold"))
        for stage in sorted(stages, key=list(WORDS).index):
            line = Text(f"  {WORDS[stage]:42}")
            for _, key in COLUMNS:
                value_us = stages[stage][key] or 0.0
                line.append(f"{time_text(value_us):>10}", "yellow" if value_us >= SLOW_US[kind] else "")
            lines.append(line)
    return lines


def _request(entry: dict[str, Any]) -> str:
    # What took no part of it says nothing.
    parts = sorted(entry["stages_us"].items(), key=lambda item: -item[1])
    told = [f"{WORDS[name]} {time_text(us)}" for name, us in parts if us * 20 >= entry["total_us"]]
    where = f" of {size_text(entry['length'])} at {entry['offset']}" if entry["length"] else ""
    known = ", ".join(told) or "stages unknown"
    return f"{time_text(entry['total_us'])}, {entry['ago_s']:.0f} s ago: {entry['kind']}{where}: {known}"


def _beside(facts: dict[str, Any]) -> Iterator[tuple[str, str | Text]]:
    oldest = facts["oldest"]
    if oldest is None:
        yield "oldest now", "no request is under way"
    else:
        age = f", for {time_text(oldest['age_s'] * 1e6)}" if oldest["age_s"] is not None else ""
        where = f" at {oldest['offset']}" if oldest["offset"] is not None else ""
        yield "oldest now", f"{oldest['kind']}{where} waits for: {WORDS[oldest['waits_for']]}{age}"
    writes = facts["writes"]
    if writes["count"]:
        yield "all writes", f"{writes['count']}: " + ", ".join(f"{n} {time_text(writes[k])}" for n, k in COLUMNS)
    yield "processor", _use_text(facts["processor"])
    # An older server, still running, tells nothing of it.
    if facts.get("peer_processor"):
        yield "peer's processor", _use_text(facts["peer_processor"])
    yield "resync", resync_text(facts["resync"]) if facts["resync"] else "none runs"
    if facts["resync"] and facts["resync"]["limit"]:
        yield "resync rate", limit_text(facts["resync"]["limit"])
    proof = facts["proof"]
    if proof is not None and proof["state"] == "running":
        yield "proof", f"compares {size_text(proof['left_bytes'] or 0)} of what was written lately, at a bounded rate"
    yield "verify", verify_text(facts["verify"]) if facts["verify"] else "none runs"


def _use_text(processor: dict[str, Any]) -> str:
    # An older server, still running, tells nothing of before.
    busy_s = sum(one["began_ago_s"] - one["ended_ago_s"] for one in processor.get("before", ()))
    text = f"{processor['own_cores']} cores used by the server, {processor['idle_percent']} % idle"
    return f"{text}; scarce for {busy_s:.0f} s of the last minutes" if busy_s else text

"""A replica's status for people: a page, and one line for logs and pipes."""

import datetime
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from cli import output
from cli.output import duration_text
from mirror.core.units import size_text

Status = dict[str, Any]

_GOOD = ("primary", "secondary", "UpToDate", "Connected")
_BAD = ("Failed", "Inconsistent")


def page(status: Status) -> Text:
    """Everything, in two columns; the warnings below."""
    lines = [output.rows(_pairs(status))]
    lines += [Text.assemble(("warning: ", "bold yellow"), warning) for warning in status["warnings"]]
    return Text("\n").join(lines)


def _pairs(status: Status) -> Iterator[tuple[str, str | Text]]:
    yield "volume", f"{status['name']}, {size_text(status['size'])}, protocol {status['protocol']}"
    yield "role", _state(status["role"]) if status["serving"] else Text("not served: read from disk", "yellow")
    yield "disk", _state(status["disk"])
    if status["connection"]:
        yield "connection", _state(status["connection"])
    yield "peer", _peer(status["peer"])
    if status["plan"]:
        yield "plan", plan_text(status["plan"])
    if status["retry"]:
        yield "retry", Text(_retry(status["retry"]), "yellow")
    yield "generation", status["generation"]
    dirty = status["dirty_bytes"]
    yield "dirty", Text(f"{size_text(dirty)} missing on the peer", "yellow") if dirty else "nothing"
    yield from _resyncs(status)
    yield from _compared(status)
    if status["resize"]:
        yield "resize", _resize(status["resize"])
    yield from _activity_log(status["activity_log"])
    # An older server, still running, tells nothing of it.
    spin = status.get("spin")
    if spin is not None and spin["pays"] is not None:
        yield "spin", _spin(**spin)
    if status["io"]:
        yield from _io(status["io"])
    if status["latency"]:
        yield from _latency(status["latency"])
    if status.get("clients"):
        yield "clients", ", ".join(f"{who} ({count} connections)" for who, count in status["clients"].items())


def _resyncs(status: Status) -> Iterator[tuple[str, str | Text]]:
    if status["resync"]:
        yield "resync", resync_text(status["resync"])
        if status["resync"]["limit"]:
            yield "resync rate", limit_text(status["resync"]["limit"])
    if status["last_resync"]:
        yield "last resync", _last_resync(status["last_resync"])


def _compared(status: Status) -> Iterator[tuple[str, str | Text]]:
    """What is known of whether the copies are equal."""
    suspects = status["suspects"]
    if suspects["bytes"]:
        yield "suspects", Text(f"{size_text(suspects['bytes'])}: {ranges_text(suspects)}", "bold red")
    if status["proof"]:
        yield "proof", _proof(status["proof"])
    if status["verify"]:
        yield "verify", verify_text(status["verify"])
    if status["last_verify"]:
        yield "last verify", _last_verify(status["last_verify"])


def line(status: Status) -> str:
    """The state on one line, with the time of day."""
    peer = status["peer"]
    parts = [
        datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        status["name"],
        status["role"] or "not served",
        status["disk"],
        *([status["connection"]] if status["connection"] else []),
        *([f"peer {peer['role'] or 'unknown'}/{peer['disk'] or 'unknown'}"] if peer["address"] else []),
        f"dirty {size_text(status['dirty_bytes'])}",
    ]
    if status["resync"]:
        parts.append(f"resync {resync_text(status['resync'])}")
    if status["suspects"]["bytes"]:
        parts.append(f"suspects {size_text(status['suspects']['bytes'])}")
    if status["verify"]:
        parts.append(f"verify {verify_text(status['verify'])}")
    if status["resize"]:
        parts.append(f"resize {_resize(status['resize'])}")
    if status["io"]:
        parts.append(f"{status['io']['writes']} writes, {status['io']['reads']} reads")
    parts += [f"warning: {warning}" for warning in status["warnings"]]
    return "; ".join(parts)


def _state(text: str | None) -> Text:
    style = "green" if text in _GOOD else "bold red" if text in _BAD else "yellow"
    return Text(text or "unknown", style)


def _peer(peer: dict[str, Any]) -> Text | str:
    if not peer["address"]:
        return "none: the volume stands alone"
    return Text.assemble(
        peer["address"], ", ", _state(peer["role"] or "role unknown"), ", ", _state(peer["disk"] or "disk unknown")
    )


def plan_text(plan: dict[str, Any]) -> str:
    """The rule, the way, how much and how long, and why."""
    parts = [plan["action"] if plan["direction"] is None else f"resync {plan['direction']}"]
    if plan["bytes"]:
        parts.append(f"at most {size_text(plan['bytes'])}")
        expected_s = plan["expected_s"]
        parts.append(f"about {duration_text(expected_s)}" if expected_s is not None else "duration unknown")
    return f"{plan['rule']}: {', '.join(parts)} ({plan['reason']})"


def _retry(retry: dict[str, Any]) -> str:
    times = "time" if retry["failures"] == 1 else "times"
    soon = duration_text(retry["next_try_in_s"])
    return f"the plan failed {retry['failures']} {times}, next try in {soon}: {retry['reason']}"


def resync_text(resync: dict[str, Any]) -> str:
    total = resync["total_bytes"]
    percent = 100 * resync["done_bytes"] / total if total else 0.0
    left = f", {duration_text(resync['eta_s'])} left" if resync["eta_s"] is not None else ""
    return f"{resync['direction']}: {percent:.0f} % of {size_text(total)} at {size_text(resync['bytes_per_s'])}/s{left}"


def limit_text(limit: dict[str, Any]) -> str:
    """How far the resync is held back, and why."""
    share = f"{100 * limit['share']:.0f} %, " if limit["share"] < 1 else ""
    most = f", at most {size_text(limit['bytes_per_s_max'])}/s" if limit["bytes_per_s_max"] else ""
    return f"{share}{limit['reason']}{most}"


def _resize(resize: dict[str, Any]) -> str:
    wanted = f"to {size_text(resize['next_size'])}: " if resize["next_size"] else ""
    return f"{wanted}{resize['stage']}"


def _last_resync(last: dict[str, Any]) -> str:
    rule = f" ({last['rule']})" if last.get("rule") else ""
    return (
        f"{last['started']}{rule}: {size_text(last['dirty_bytes'])} compared, {size_text(last['sent_bytes'])} sent, "
        f"{size_text(last['skipped_bytes'])} skipped, in {duration_text(last['seconds'])}"
    )


def ranges_text(found: dict[str, Any], most: int = 4) -> str:
    """The first ranges as offset+length."""
    ranges = found["ranges"]
    more = ", ..." if found["more"] or len(ranges) > most else ""
    return ", ".join(f"{offset}+{length}" for offset, length in ranges[:most]) + more


def verify_text(run: dict[str, Any]) -> str:
    """How far a running verify is."""
    total = run["total_bytes"]
    percent = 100 * run["done_bytes"] / total if total else 100.0
    left = f", {duration_text(run['eta_s'])} left" if run["eta_s"] is not None else ""
    found = f"; {size_text(run['differing_bytes'])} differ" if run["differing_bytes"] else ""
    begin = f"; once round from {size_text(run['begin'])}" if run.get("begin") else ""
    return f"{percent:.0f} % of {size_text(total)} at {size_text(run['bytes_per_s'])}/s{left}{found}{begin}"


def _last_verify(last: dict[str, Any]) -> Text:
    words = {"equal": "equal", "differs": "differs", "repaired": "differed, repaired"}
    result = words.get(last["result"], last["result"])
    when = last["ended"] or last["started"]
    differing = f", {size_text(last['differing_bytes'])} differed" if last["differing_bytes"] else ""
    text = f"{when}: {result}, {size_text(last['checked_bytes'])} compared{differing}"
    return Text(text, "bold red" if last["result"] == "differs" else "")


def _proof(proof: dict[str, Any]) -> Text:
    state, left, rest = proof["state"], proof.get("left_bytes"), proof.get("rest_left_bytes")
    if state == "running":
        return Text(f"running: {size_text(left or 0)} of what was written lately to compare", "yellow")
    if state == "proven":
        return Text(
            f"proven; {size_text(rest)} of the rest to compare slowly" if rest else "proven, all of it", "green"
        )
    if state == "failed":
        return Text(f"failed: {proof['reason']}", "bold red")
    return Text("waits for a primary, or the end of a resync", "yellow")


def _activity_log(log: dict[str, Any]) -> Iterator[tuple[str, str]]:
    text = f"{log['used']} of {log['extents']} extents"
    yield "activity log", text if log["hits"] is None else f"{text}, {log['hits']} hits, {log['misses']} misses"
    if log["resync_s"] is None:
        return
    goal = f" (resync_after_crash {duration_text(log['goal_s'])}: {log['reason']})" if log["goal_s"] else ""
    yield "after a crash", _trade(log) + goal
    for name in ("smaller", "larger"):
        if log[name] is not None:
            yield f"a {name} log", f"of {log[name]['extents']} extents: {_trade(log[name])}"


def _trade(log: dict[str, Any]) -> str:
    missed = f", {100 * log['miss_rate']:.1f} % of writes wait for a log record" if log["miss_rate"] is not None else ""
    return f"at most {duration_text(log['resync_s'])} of resync{missed}"


def _spin(setting: str | int, pays: bool) -> str:
    if setting != "auto":
        return str(setting) if setting == "off" else f"{setting} µs"
    return "auto: one write at a time " + ("spins" if pays else "sleeps, for spinning does not pay now")


def _io(io: dict[str, int]) -> Iterator[tuple[str, str]]:
    yield "written", f"{io['writes']} writes, {size_text(io['written_bytes'])}; {io['flushes']} flushes"
    yield "read", f"{io['reads']} reads, {size_text(io['read_bytes'])}"
    if io["trims"] or io["zeroes"]:
        trimmed, zeroed = size_text(io["trimmed_bytes"]), size_text(io["zeroed_bytes"])
        yield "freed", f"{io['trims']} trims, {trimmed}; {io['zeroes']} zeroes, {zeroed}"


def _latency(latency: dict[str, dict[str, float | None]]) -> Iterator[tuple[str, str]]:
    for name, values in latency.items():
        if values["p50_us"] is not None and values["p99_us"] is not None:
            yield f"{name} latency", f"{values['p50_us']:.0f} µs (p50), {values['p99_us']:.0f} µs (p99)"

"""Why it is slow: from what a replica has measured of its requests to the main cause and what helps. Pure.

First the *blame*: the stage that takes the time of the requests that are slow. What is typical goes before what happens
to one in a hundred, and that before what happens now and then; a request that waits at this moment goes before all.
Then the table of causes is read from the top: the first row of that stage whose condition holds.

The facts are what `nbdmirror why-slow DIR --json` prints; docs/operations.md describes its keys.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mirror.core.limits import SILENT_S
from mirror.core.stages import (
    AFTER,
    APPLY,
    APPLY_FLUSH,
    BEFORE,
    COLD,
    DISK,
    DURABLE_APPLY,
    DURABLE_WRITE,
    FLUSH,
    FLUSHES,
    LINK,
    PEER_DISK,
    PYTHON,
    RANGE,
    RECEIVE,
    REPLY,
    TOTAL,
    WRITE,
)

Facts = Mapping[str, Any]

PLURALS = {
    WRITE: "writes",
    DURABLE_WRITE: "durable writes",
    FLUSHES: "flushes",
    APPLY: "writes for the peer",
    DURABLE_APPLY: "durable writes for the peer",
    APPLY_FLUSH: "flushes for the peer",
}
# From here on people ask why: a write goes to memory and over a link, what is to be durable waits for a disk.
SLOW_US = {
    WRITE: 1000.0,
    APPLY: 1000.0,
    DURABLE_WRITE: 10_000.0,
    DURABLE_APPLY: 10_000.0,
    FLUSHES: 10_000.0,
    APPLY_FLUSH: 10_000.0,
}
DURABLE = (DURABLE_WRITE, DURABLE_APPLY, FLUSHES, APPLY_FLUSH)
# What a role measures: the rest is of the time before it was taken.
KINDS = {
    "primary": (WRITE, DURABLE_WRITE, FLUSHES),
    "secondary": (APPLY, DURABLE_APPLY, APPLY_FLUSH),
}
# A single request is slow, or waits now, from here on; half a tenth of a second is noticed.
OUTLIER_US = 50_000.0
# One thread at a time runs Python: with so much of a core the others mostly wait for it.
BUSY_CORES = 0.85
# Of fewer requests a percentile says little.
COUNT_MIN = {"p50_us": 8, "p99_us": 50}
# One in a hundred says nothing of a stall that took so many times as long.
STALL_TIMES = 20
# Requests end a moment after the silence that held them up.
AGES_DIFFER_S = 0.1
# A log of twice the size that spares less than this part of the misses is of no use.
WORTH = 0.1
# Room is made ahead, so a full log is not quite full.
LOG_FULL = 0.75
# How old what is seen of the processors at the moment of asking may be: a look of the second before has yet to come.
NOW_S = 1.2
# With nothing idle whoever is woken waits for turns of a few milliseconds: so long where one wants each core, twice as
# long where two do. What takes longer is no such wait.
SCARCE_IDLE_PERCENT, TURNS_US = 5, 10_000.0
# Of a request that nobody looked at, two halves are known: the stages that each may be.
HALVES = {BEFORE: (RANGE, COLD), AFTER: (DISK, LINK, PEER_DISK)}
GATE = "gate"
# Whose processors: keys of the facts.
OWN, PEERS = "processor", "peer_processor"


class Blame(NamedTuple):
    """`stage_us` of `total_us` of requests of this kind go there; `scope` says of which. `began_ago_s`, `ended_ago_s`:
    of the slowest one, where it is about single ones. `is_typical`: half of all take as long."""

    stage: str
    kind: str
    scope: str
    stage_us: float
    total_us: float
    began_ago_s: float | None = None
    ended_ago_s: float | None = None
    is_typical: bool = False

    @property
    def worst_us(self) -> float:
        """What the slowest single one took."""
        if self.began_ago_s is None or self.ended_ago_s is None:
            return self.total_us
        return (self.began_ago_s - self.ended_ago_s) * 1e6


class Cause(NamedTuple):
    """A row: of which stage, when, its name, and what is said: what it is, and what helps."""

    stages: tuple[str, ...]
    when: Callable[[Facts, Blame], bool]
    name: str
    says: str
    helps: str


def _always(_facts: Facts, _blame: Blame) -> bool:
    return True


def _resync(facts: Facts, _blame: Blame) -> bool:
    return facts["resync"] is not None


def _verify(facts: Facts, _blame: Blame) -> bool:
    return facts["verify"] is not None


def _proof(facts: Facts, _blame: Blame) -> bool:
    return facts["proof"] is not None and facts["proof"]["state"] == "running"


def _durable(_facts: Facts, blame: Blame) -> bool:
    return blame.kind in DURABLE


def _durable_for_the_peer(facts: Facts, blame: Blame) -> bool:
    return _durable(facts, blame) and facts["role"] == "secondary"


def _takes_a_core(whose: str) -> Callable[[Facts, Blame], bool]:
    """That server has as much to do as its interpreter can; `whose` processor, by its key in the facts."""

    def when(facts: Facts, blame: Blame) -> bool:
        # What hangs for long does not wait for a processor.
        quick = blame.total_us < OUTLIER_US
        return quick and _processors_explain(facts, whose, blame, lambda use: use["own_cores"] >= BUSY_CORES)

    return when


def _has_neighbours(whose: str) -> Callable[[Facts, Blame], bool]:
    """Each that wants a core too may have a turn before, at each of the wake-ups of a request; not half of the time."""

    def when(facts: Facts, blame: Blame) -> bool:
        # Who waits for a disk is woken once.
        one_turn = blame.is_typical or blame.stage in (DISK, PEER_DISK)

        def explains(use: Facts) -> bool:
            wanting = 1.0 if one_turn else max(1.0, use["runnable"] / facts[whose]["cores"])
            return bool(use["idle_percent"] <= SCARCE_IDLE_PERCENT and blame.total_us < TURNS_US * wanting)

        return _processors_explain(facts, whose, blame, explains)

    return when


def _processors_explain(facts: Facts, whose: str, blame: Blame, explains: Callable[[Facts], bool]) -> bool:
    """Whether that holds of how processors were used while these requests ran, or half of them.

    What is to be durable waits for a disk.
    """
    processor = facts[whose]
    if blame.kind in DURABLE or processor is None:
        return False
    # The peer's is of its last look, which is among those before if it counts.
    now = [{**processor, "began_ago_s": NOW_S, "ended_ago_s": 0.0}] if whose == OWN else []
    uses = [use for use in (*now, *processor["before"]) if explains(use)]
    times = _when(facts, blame)
    met = sum(any(_met(use, *time) for use in uses) for time in times)
    return 2 * met >= len(times) > 0


def _when(facts: Facts, blame: Blame) -> list[tuple[float, float]]:
    """When they ran, as ages of begin and end: the single one, or those looked at that took about as long."""
    if blame.began_ago_s is not None and blame.ended_ago_s is not None:
        return [(blame.began_ago_s, blame.ended_ago_s)]
    looks = [one for one in facts["slow_looks"].get(blame.kind, ()) if 2 * one["total_us"] >= blame.total_us]
    return [(one["ago_s"] + one["total_us"] / 1e6, one["ago_s"]) for one in looks]


def _met(use: Facts, began_ago_s: float, ended_ago_s: float) -> bool:
    """Whether a request from then to then met it; ages are rounded to a tenth."""
    return bool(use["began_ago_s"] + AGES_DIFFER_S >= ended_ago_s and began_ago_s >= use["ended_ago_s"] - AGES_DIFFER_S)


def _peer_is_silent(facts: Facts, blame: Blame) -> bool:
    silence = facts["peer_silence"]
    return blame.ended_ago_s == 0.0 and silence is not None and (silence["silent_s"] or 0.0) > SILENT_S


def _peer_was_silent(facts: Facts, blame: Blame) -> bool:
    """One of its silences explains half of the request, or the request met one as a whole."""
    began_ago_s, ended_ago_s, silence = blame.began_ago_s, blame.ended_ago_s, facts["peer_silence"]
    if began_ago_s is None or ended_ago_s is None or silence is None:
        return False
    for before in silence["before"]:
        first_s, last_s = before["began_ago_s"] + AGES_DIFFER_S, before["ended_ago_s"] - AGES_DIFFER_S
        common_s = min(began_ago_s, first_s) - max(ended_ago_s, last_s)
        if common_s >= min(began_ago_s - ended_ago_s, first_s - last_s) / 2:
            return True
    return False


def _peer_tells_nothing(facts: Facts, blame: Blame) -> bool:
    return not _figure(facts, blame.kind, PEER_DISK, "p99_us")


def _answers_sooner_under_a(facts: Facts, blame: Blame) -> bool:
    return facts["protocol"] != "A" and blame.kind == WRITE


def _answers_sooner_under_b(facts: Facts, blame: Blame) -> bool:
    return facts["protocol"] == "C" and blame.kind == WRITE


def _log_has_room(facts: Facts, _blame: Blame) -> bool:
    used, extents = facts["activity_log"]["used"], facts["activity_log"]["extents"]
    return bool(facts["activity_log"]["holds_all"] or (used is not None and used < LOG_FULL * extents))


def _no_larger_log_helps(facts: Facts, _blame: Blame) -> bool:
    log, larger = facts["activity_log"], facts["activity_log"]["larger"]
    if log["miss_rate"] is None or larger is None or larger["miss_rate"] is None:
        return False
    return bool(log["miss_rate"] - larger["miss_rate"] < WORTH * log["miss_rate"])


def _goal(facts: Facts, _blame: Blame) -> bool:
    return facts["activity_log"]["goal_s"] is not None


_RESYNC_HELPS = "it ends by itself; until then a lower `resync_rate` in the primary's volume.toml"
_PEER_HELPS = "`nbdmirror status DIR` on its node, if that runs; a shorter `peer_timeout_s` in volume.toml waits less"
_PEER_DISK_HELPS = "`nbdmirror why-slow DIR` and `iostat -x 1` on the peer's node"
_LINK_HELPS = "`ping` the peer's node and look for losses (`ss -ti`)"
_DISK_HELPS = "`iostat -x 1` on this node shows who uses it; a faster disk as `backing`"

CAUSES: tuple[Cause, ...] = (
    Cause((GATE,), _always, "held", "requests are held while a role changes or a session begins", "wait; `status`"),
    Cause(
        (RANGE, COLD, LINK, PEER_DISK, FLUSH, AFTER),
        _peer_is_silent,
        "peer-gone",
        "the peer is silent: requests wait until it answers or counts as lost",
        _PEER_HELPS,
    ),
    Cause(
        (LINK, PEER_DISK, AFTER),
        _peer_was_silent,
        "peer-gone",
        "the peer was silent, or was lost: requests waited for it",
        _PEER_HELPS,
    ),
    Cause(
        (PYTHON, REPLY),
        _always,
        "processor",
        "the processor is busy: requests wait for their turn in the interpreter",
        "more cores or fewer busy neighbours; fewer and larger requests",
    ),
    Cause(
        (RANGE, DISK, LINK, PEER_DISK, RECEIVE),
        _takes_a_core(OWN),
        "processor",
        "the processor is busy: this server takes all that one core has",
        "fewer and larger requests, or several volumes instead of one",
    ),
    Cause(
        (RANGE, DISK, LINK, PEER_DISK, RECEIVE),
        _has_neighbours(OWN),
        "processor",
        "the processors are busy: nothing of them is idle, so whoever is woken waits for a turn",
        "more cores or fewer busy neighbours: `top` on this node",
    ),
    Cause((RANGE, DISK, LINK, PEER_DISK), _resync, "resync", "a resync runs beside the clients", _RESYNC_HELPS),
    Cause(
        (RANGE, DISK, PEER_DISK),
        _verify,
        "verify",
        "a verify reads both disks beside the clients",
        "`nbdmirror verify DIR --stop`, and again with `--rate 50M`",
    ),
    Cause(
        (RANGE, DISK, PEER_DISK),
        _proof,
        "proof",
        "what was written lately is compared with the peer, as after each handshake",
        "it ends by itself, within about a minute",
    ),
    Cause(
        (LINK, PEER_DISK),
        _takes_a_core(PEERS),
        "peer-processor",
        "the processor of the peer's node is busy: its server takes all that one core has",
        "fewer and larger requests, or several volumes instead of one",
    ),
    Cause(
        (LINK, PEER_DISK),
        _has_neighbours(PEERS),
        "peer-processor",
        "the processors of the peer's node are busy: nothing of them is idle, so its server waits for turns",
        "more cores or fewer busy neighbours there: `top` on the peer's node",
    ),
    Cause(
        (DISK,),
        _durable_for_the_peer,
        "own-flush",
        "this replica's disk takes long to make writes durable",
        "a disk with a protected write cache; what asks for so many flushes, `nbdmirror why-slow` on the primary shows",
    ),
    Cause(
        (DISK,),
        _durable,
        "own-flush",
        "this replica's disk takes long to make writes durable",
        "a disk with a protected write cache; fewer flushes and FUA writes by the client",
    ),
    Cause((DISK,), _always, "own-disk", "this replica's disk is slow", _DISK_HELPS),
    Cause(
        (PEER_DISK,),
        _durable,
        "peer-flush",
        "the peer's disk takes long to make writes durable",
        "a disk with a protected write cache on the peer's node; fewer flushes and FUA writes by the client",
    ),
    Cause(
        (PEER_DISK,),
        _answers_sooner_under_b,
        "peer-disk",
        "the peer's disk is slow",
        f"{_PEER_DISK_HELPS}; protocol A or B do not wait for it",
    ),
    Cause((PEER_DISK,), _always, "peer-disk", "the peer's disk is slow", _PEER_DISK_HELPS),
    Cause(
        (LINK,),
        _peer_tells_nothing,
        "link-or-peer",
        "the link or the peer is slow; the peer's release does not say which",
        "`ping` the peer's node, and `iostat -x 1` there; upgrade nbdmirror on it",
    ),
    Cause(
        (LINK,),
        _answers_sooner_under_a,
        "link",
        "the link to the peer is slow",
        f"{_LINK_HELPS}; protocol A does not wait for the link",
    ),
    Cause((LINK, RECEIVE), _always, "link", "the link to the peer is slow", _LINK_HELPS),
    Cause(
        (COLD,),
        _log_has_room,
        "cold-extents",
        "writes are the first to their extents since the start, and wait for a log record",
        "it ends when each extent was written once; a faster disk for the replica's directory, where the log is",
    ),
    Cause(
        (COLD,),
        _no_larger_log_helps,
        "cold-extents",
        "writes meet extents that are not in the activity log, and one of twice the size would not hold them either",
        "writes that are closer together; a faster disk for the replica's directory, where the log is",
    ),
    Cause(
        (COLD,),
        _goal,
        "cold-extents",
        "writes meet extents that are not in the activity log, and wait for a log record",
        "a longer `resync_after_crash` in volume.toml lets the log be larger",
    ),
    Cause(
        (COLD,),
        _always,
        "cold-extents",
        "writes meet extents that are not in the activity log, and wait for a log record",
        "more `activity_log_extents` in volume.toml, or `resync_after_crash` instead, which finds their number",
    ),
    Cause(
        (RANGE, BEFORE),
        _always,
        "overlaps",
        "writes wait for others of the same blocks",
        "one writer for a block: look for programs that write the same range at the same time",
    ),
    Cause(
        (FLUSH,),
        _always,
        "flushes",
        "flushes wait for the ones before them",
        "fewer flushes by the client, or a disk with a protected write cache on both nodes",
    ),
    Cause(
        (AFTER,),
        _always,
        "disk-or-link",
        "a disk or the link was slow for a moment, and nobody looked",
        "ask again while it is slow: the requests after a slow one are measured",
    ),
)
NOTHING = {
    "primary": Cause((), _always, "nothing", "nothing is slow", "nothing to do"),
    "secondary": Cause((), _always, "nothing", "nothing is slow here", "ask the primary, which sees the whole way"),
}


class Answer(NamedTuple):
    cause: Cause
    blame: Blame | None

    @property
    def sentence(self) -> str:
        """The cause, what it rests on, and what helps."""
        says, helps = self.cause.says, self.cause.helps
        if self.blame is None:
            return f"{says}; {helps}"
        share = f"{time_text(self.blame.stage_us)} of {time_text(self.blame.total_us)}"
        return f"{says} ({self.blame.scope}: {share}); what helps: {helps}"


def answer(facts: Facts) -> Answer:
    """The main cause."""
    blame = next(_blames(facts), None)
    if blame is None:
        return Answer(NOTHING[facts["role"]], None)
    cause = next(row for row in CAUSES if blame.stage in row.stages and row.when(facts, blame))
    return Answer(cause, blame)


def _blames(facts: Facts) -> Iterator[Blame]:
    """What is slow, the best reason to ask first."""
    kinds = KINDS[facts["role"]]
    oldest = facts["oldest"]
    if oldest is not None and (age_us := (oldest["age_s"] or 0) * 1e6) >= OUTLIER_US:
        scope = f"a {oldest['kind']} waits now"
        yield Blame(oldest["waits_for"], oldest["kind"], scope, age_us, age_us, oldest["age_s"], 0.0)
    half = _of_many(facts, kinds, "p50_us", "half of the")
    hundredth = _of_many(facts, kinds, "p99_us", "one in a hundred of the")
    single = _of_single_ones(facts, kinds)
    last = [hundredth, single]
    if single is not None and hundredth is not None and single.worst_us >= STALL_TIMES * hundredth.total_us:
        last.reverse()
    yield from (blame for blame in (half, *last) if blame is not None)


def _of_many(facts: Facts, kinds: Sequence[str], percentile: str, scope: str) -> Blame | None:
    found = [
        (total_us / SLOW_US[kind], kind, total_us)
        for kind in facts["stages"]
        if kind in kinds
        and facts["stages"][kind][TOTAL]["count"] >= COUNT_MIN[percentile]
        and (total_us := _figure(facts, kind, TOTAL, percentile)) >= SLOW_US[kind]
        and not (kind == WRITE and _all_writes_are_quick(facts, percentile))
    ]
    if not found:
        return None
    _, kind, total_us = max(found)
    stage = _worst(facts, kind, percentile)
    stage_us = _figure(facts, kind, stage, percentile)
    return Blame(stage, kind, f"{scope} {PLURALS[kind]}", stage_us, total_us, is_typical=percentile == "p50_us")


def _all_writes_are_quick(facts: Facts, percentile: str) -> bool:
    """Stages are known of those that follow a slow one, above all; the latency itself of each write."""
    writes = facts.get("writes")
    return writes is not None and writes["count"] >= COUNT_MIN[percentile] and writes[percentile] < SLOW_US[WRITE]


def _of_single_ones(facts: Facts, kinds: Sequence[str]) -> Blame | None:
    outliers = [
        entry
        for entry in facts["slowest"]
        if entry["kind"] in kinds and entry["total_us"] >= OUTLIER_US and entry["stages_us"]
    ]
    if not outliers:
        return None
    sums: dict[str, float] = {}
    for entry in outliers:
        for stage, stage_us in entry["stages_us"].items():
            sums[stage] = sums.get(stage, 0.0) + stage_us
    most = _largest(sums)
    # Those that it explains; the others may have causes of their own.
    explained = [entry for entry in outliers if _largest(entry["stages_us"]) == most] or outliers
    worst = explained[0]
    stage = _resolved(facts, worst["kind"], most)
    total_us = sum(entry["total_us"] for entry in explained) / len(explained)
    stage_us = sum(entry["stages_us"].get(most, 0.0) for entry in explained) / len(explained)
    ended_ago_s = worst["ago_s"]
    began_ago_s = ended_ago_s + worst["total_us"] / 1e6
    return Blame(stage, worst["kind"], "now and then", stage_us, total_us, began_ago_s, ended_ago_s)


def _largest(stages_us: Mapping[str, float]) -> str:
    return max(stages_us, key=lambda name: stages_us[name])


def _worst(facts: Facts, kind: str, percentile: str) -> str:
    names: list[str] = [name for name in facts["stages"][kind] if name != TOTAL]
    return max(names, key=lambda name: _figure(facts, kind, name, percentile))


def _resolved(facts: Facts, kind: str, stage: str) -> str:
    """Of a half, the stage that is slow at times; the half itself where none is."""
    if stage not in HALVES:
        return stage
    likely = max(HALVES[stage], key=lambda name: _figure(facts, kind, name, "p99_9_us"))
    return likely if _figure(facts, kind, likely, "p99_9_us") >= SLOW_US[kind] else stage


def _figure(facts: Facts, kind: str, stage: str, percentile: str) -> float:
    return float(facts["stages"].get(kind, {}).get(stage, {}).get(percentile) or 0.0)


def time_text(us: float) -> str:
    """40 µs, 3.1 ms, 2.0 s."""
    if us < 1000:
        return f"{us:.0f} µs"
    return f"{us / 1000:.1f} ms" if us < 1e6 else f"{us / 1e6:.1f} s"

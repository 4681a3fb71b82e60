"""The table of causes, over facts that were recorded from replicas made slow, and over synthetic ones row by row."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli.why_slow import WORDS, page
from mirror.core import stages
from mirror.core.stages import AFTER, BEFORE, TOTAL
from mirror.core.why_slow import CAUSES, HALVES, SLOW_US, Blame, answer, time_text

LOG: dict[str, Any] = {
    "extents": 1024,
    "used": 1000,
    "holds_all": False,
    "miss_rate": 0.5,
    "goal_s": None,
    "larger": {"miss_rate": 0.2},
}
WELL: dict[str, Any] = {"silent_s": 0.06, "before": []}
IDLE: dict[str, Any] = {"cores": 2, "own_cores": 0.2, "idle_percent": 60, "runnable": 1, "before": []}
RECORDED: dict[str, dict[str, Any]] = {
    # Those were recorded before a server told of its peer's silence, of other logs, and of the processors before now.
    name: {
        "peer_silence": WELL if found["peer"] else None,
        **found,
        "activity_log": {"larger": None, "used": None, "holds_all": False, **found["activity_log"]},
        "slow_looks": {
            kind: [{"ago_s": 0.5, "total_us": of_stages[TOTAL]["p99_us"]}]
            for kind, of_stages in found["stages"].items()
        },
        "processor": {"runnable": 1, "before": [], **found["processor"]},
        "peer_processor": None,
    }
    for name, found in json.loads(Path(__file__).with_name("why_slow_facts.json").read_text()).items()
}


def figures(us: float) -> dict[str, Any]:
    return {"count": 100, "p50_us": us, "p99_us": us, "p99_9_us": us}


def facts(kind: str = "write", **more: Any) -> dict[str, Any]:
    """Of a primary where each stage of `kind` takes 10 us, or what `more` names; other keys replace those."""
    of_stages = {name: figures(more.pop(name, 10.0)) for name in (*stages.STAGES, stages.RECEIVE, stages.REPLY)}
    of_stages[TOTAL] = figures(sum(found["p50_us"] for found in of_stages.values()))
    return {
        "role": "primary",
        "protocol": "C",
        "stages": {kind: of_stages},
        "slow_looks": {kind: [{"ago_s": 0.5, "total_us": of_stages[TOTAL]["p99_us"]}]},
        "slowest": [],
        "oldest": None,
        "peer_silence": WELL,
        "processor": IDLE,
        "peer_processor": None,
        "activity_log": LOG,
        "resync": None,
        "verify": None,
        "proof": {"state": "proven"},
        **more,
    }


BUSY = {"processor": {**IDLE, "own_cores": 0.97, "idle_percent": 3}}
SLOW = 30_000.0


@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name: str) -> None:
    found = RECORDED[name]
    assert answer(found).cause.name == name.rpartition("-")[0] == found["cause"]
    assert answer(found).sentence == found["says"]


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (facts(), "nothing"),
        (facts(role="secondary"), "nothing"),
        (facts(own_disk=SLOW), "own-disk"),
        (facts(peer_disk=SLOW), "peer-disk"),
        (facts(link=SLOW), "link"),
        (facts(link=SLOW, peer_disk=0.0), "link-or-peer"),
        (facts(log=SLOW), "cold-extents"),
        (facts(log=SLOW, activity_log={**LOG, "goal_s": 30.0}), "cold-extents"),
        (facts(range=SLOW), "overlaps"),
        (facts(flush=SLOW, kind="flush"), "flushes"),
        (facts(interpreter=SLOW), "processor"),
        (facts(own_disk=SLOW, kind="flush"), "own-flush"),
        (facts(own_disk=SLOW, kind="durable write"), "own-flush"),
        (facts(peer_disk=SLOW, kind="flush"), "peer-flush"),
        (facts(own_disk=SLOW, resync={"limit": None}), "resync"),
        (facts(range=SLOW, resync={"limit": None}), "resync"),
        (facts(log=SLOW, resync={"limit": None}), "cold-extents"),
        (facts(own_disk=SLOW, verify={"state": "running"}), "verify"),
        (facts(range=SLOW, proof={"state": "running"}), "proof"),
        (facts(link=SLOW, proof={"state": "running"}), "link"),
        (facts(range=SLOW, proof=None), "overlaps"),
        # A volume that takes a whole core waits for the interpreter at the end of each system call.
        (facts(own_disk=SLOW, **BUSY), "processor"),
        # What takes so long is no wait for a processor.
        (facts(own_disk=1e6, **BUSY), "own-disk"),
        (facts(role="secondary", kind="apply", own_disk=SLOW), "own-disk"),
        (facts(role="secondary", kind="apply", receive=SLOW), "link"),
        (facts(role="secondary", kind="apply flush", own_disk=SLOW), "own-flush"),
        # A flush of 5 ms is what a disk takes.
        (facts(own_disk=5000.0, kind="flush"), "nothing"),
    ],
)
def test_what_is_typical(given: dict[str, Any], cause: str) -> None:
    assert answer(given).cause.name == cause


def slow(total_us: float, **stages_us: float) -> dict[str, Any]:
    return {"kind": "write", "ago_s": 60.0, "total_us": total_us, "stages_us": stages_us}


def test_now_and_then() -> None:
    assert answer(facts(slowest=[slow(49_000, own_disk=49_000)])).cause.name == "nothing"
    assert answer(facts(slowest=[slow(90_000, own_disk=80_000, link=10_000)])).cause.name == "own-disk"
    # What is typical is the better reason: one stall of two minutes ago explains no slow day.
    assert answer(facts(link=SLOW, slowest=[slow(9e6, own_disk=9e6)])).cause.name == "link"
    # Nothing is known of its stages.
    assert answer(facts(slowest=[slow(90_000)])).cause.name == "nothing"


def test_a_half_that_nobody_looked_into_is_told_by_what_is_slow_at_times() -> None:
    given = facts(slowest=[slow(90_000, **{BEFORE: 10, AFTER: 89_990})])
    assert answer(given).cause.name == "disk-or-link"
    given["stages"]["write"]["peer_disk"]["p99_9_us"] = 20_000.0
    assert answer(given).cause.name == "peer-disk"
    given = facts(slowest=[slow(90_000, **{BEFORE: 89_990, AFTER: 10})])
    assert answer(given).cause.name == "overlaps"
    given["stages"]["write"]["log"]["p99_9_us"] = 20_000.0
    assert answer(given).cause.name == "cold-extents"


@pytest.mark.parametrize("waits_for", [*stages.STAGES, "gate"])
def test_what_hangs_now_goes_before_all(waits_for: str) -> None:
    hanging = {"kind": "write", "offset": 0, "length": 4096, "age_s": 2.0, "waits_for": waits_for}
    found = answer(facts(interpreter=SLOW, oldest=hanging))
    assert waits_for in found.cause.stages
    assert "waits now: 2.0 s" in found.sentence
    assert answer(facts(oldest={**hanging, "age_s": 0.01})).cause.name == "nothing"
    assert answer(facts(oldest={**hanging, "age_s": None})).cause.name == "nothing"


SILENT = {**WELL, "silent_s": 0.9}
BEFORE_THAT = {"before": [{"began_ago_s": 90.0, "ended_ago_s": 89.0}, {"began_ago_s": 21.4, "ended_ago_s": 19.9}]}
GONE = {**BEFORE_THAT, "silent_s": None}
BACK = {**WELL, **BEFORE_THAT}


def stall(stage: str, ago_s: float, total_us: float = 1.5e6) -> dict[str, Any]:
    return {**slow(total_us, **{stage: total_us}), "ago_s": ago_s}


def hanging(stage: str, age_s: float = 2.0) -> dict[str, Any]:
    return {"kind": "write", "offset": 0, "length": 4096, "age_s": age_s, "waits_for": stage}


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        # It waits for a silent one now: not for a link, nor for others that wait for it.
        (facts(peer_silence=SILENT, oldest=hanging("link")), "peer-gone"),
        (facts(peer_silence=SILENT, oldest=hanging("peer_disk")), "peer-gone"),
        (facts(peer_silence=SILENT, oldest=hanging("flush")), "peer-gone"),
        (facts(peer_silence=SILENT, oldest=hanging("own_disk")), "own-disk"),
        (facts(peer_silence={**WELL, "silent_s": 0.3}, oldest=hanging("link")), "link"),
        (facts(peer_silence=None, oldest=hanging("link")), "link"),
        # Those that were under way while it was silent, also if that ended the session.
        (facts(peer_silence=BACK, slowest=[stall("link", 19.9)]), "peer-gone"),
        (facts(peer_silence=GONE, slowest=[stall("link", 19.9)]), "peer-gone"),
        (facts(peer_silence=BACK, slowest=[stall(AFTER, 19.8)]), "peer-gone"),
        (facts(peer_silence=BACK, slowest=[stall("link", 20.0, 100_000.0)]), "peer-gone"),
        (facts(peer_silence=BACK, slowest=[stall("link", 18.0, 9e6)]), "peer-gone"),
        (facts(peer_silence=BACK, slowest=[stall("own_disk", 19.9)]), "own-disk"),
        # Others.
        (facts(peer_silence=BACK, slowest=[stall("link", 22.0)]), "link"),
        (facts(peer_silence=BACK, slowest=[stall("link", 19.0)]), "link"),
        (facts(peer_silence=GONE, slowest=[stall("link", 5.0)]), "link"),
        (facts(peer_silence=BACK, slowest=[stall(AFTER, 5.0)]), "disk-or-link"),
        # What is typical is not of one silence.
        (facts(link=SLOW, peer_silence=SILENT), "link"),
        (facts(link=SLOW, peer_silence=GONE), "link"),
        (facts(log=SLOW, peer_silence=SILENT), "cold-extents"),
    ],
)
def test_a_peer_that_is_gone_is_no_slow_link(given: dict[str, Any], cause: str) -> None:
    assert answer(given).cause.name == cause


def test_a_stall_goes_before_one_in_a_hundred_that_is_nothing_beside_it() -> None:
    given = facts(link=2000.0, slowest=[stall("own_disk", 5.0)])
    given["stages"]["write"][TOTAL]["p50_us"] = 100.0
    assert answer(given).cause.name == "own-disk"
    given["slowest"] = [stall("own_disk", 5.0, 60_000.0)]
    assert answer(given).cause.name == "own-disk"
    given["stages"]["write"][TOTAL]["p99_us"] = 4000.0
    assert answer(given).cause.name == "link", "fifteen times as long: what is slow every day comes first"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (facts(link=SLOW), "protocol A"),
        (facts(link=SLOW, protocol="B"), "protocol A"),
        (facts(link=SLOW, protocol="A"), ""),
        (facts(link=SLOW, kind="flush"), ""),
        (facts(peer_disk=SLOW), "protocol A or B"),
        (facts(peer_disk=SLOW, protocol="B"), ""),
    ],
)
def test_another_protocol_is_advised_where_it_would_help(given: dict[str, Any], words: str) -> None:
    helps = answer(given).cause.helps
    assert words in helps
    assert words or "protocol" not in helps


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ({}, "more `activity_log_extents`"),
        ({"goal_s": 30.0}, "a longer `resync_after_crash`"),
        ({"larger": {"miss_rate": 0.47}}, "closer together"),
        ({"goal_s": 30.0, "larger": {"miss_rate": 0.5}}, "closer together"),
        ({"larger": {"miss_rate": None}}, "more `activity_log_extents`"),
        ({"larger": None}, "more `activity_log_extents`"),
        ({"miss_rate": None}, "more `activity_log_extents`"),
        ({"used": 120}, "written once"),
    ],
)
def test_a_larger_log_is_advised_where_it_would_hold_more(log: dict[str, Any], words: str) -> None:
    found = answer(facts(log=SLOW, activity_log={**LOG, **log}))
    assert found.cause.name == "cold-extents"
    assert words in found.cause.helps


def test_stages_of_those_after_a_slow_one_are_not_those_of_all() -> None:
    quick = {"count": 4000, "p50_us": 80.0, "p99_us": 280.0, "p99_9_us": 5000.0}
    assert answer(facts(log=SLOW, writes=quick)).cause.name == "nothing"
    assert answer(facts(log=SLOW, writes={**quick, "p99_us": 9000.0})).cause.name == "cold-extents"
    # Durable ones are not counted apart.
    assert answer(facts(log=SLOW, kind="durable write", writes=quick)).cause.name == "cold-extents"


def test_busy_neighbours_are_no_slow_link() -> None:
    busy = {"processor": {**IDLE, "idle_percent": 1}}
    assert answer(facts(link=3000.0, **busy)).cause.name == "processor"
    assert answer(facts(own_disk=3000.0, **busy)).cause.name == "processor"
    assert answer(facts(link=SLOW, **busy)).cause.name == "link"
    assert answer(facts(own_disk=12_000.0, kind="flush", **busy)).cause.name == "own-flush"
    assert answer(facts(link=3000.0)).cause.name == "link"


def scarce(began_ago_s: float, ended_ago_s: float, **more: Any) -> dict[str, Any]:
    before = {"began_ago_s": began_ago_s, "ended_ago_s": ended_ago_s, "own_cores": 0.3, "idle_percent": 0, **more}
    return {"processor": {**IDLE, "before": [{"runnable": 6, **before}]}}


def looks(ago_s: float, us: float = 15_000.0, count: int = 4) -> list[dict[str, Any]]:
    return [{"ago_s": ago_s, "total_us": us}] * count


def hundredth(us: float, *slow_looks: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Writes of which one in a hundred waits for the link."""
    given = facts(**more, slow_looks={"write": list(slow_looks)})
    for stage in ("link", TOTAL):
        given["stages"]["write"][stage] = {**figures(80.0), "p99_us": us}
    return given


def test_processors_count_as_they_were_when_it_was_slow() -> None:
    """Who asks mostly asks when it is over."""
    then, since = looks(30.0), looks(5.0)
    busy = scarce(40.0, 20.0)
    assert answer(hundredth(15_000.0, *then, **busy)).cause.name == "processor"
    assert answer(hundredth(15_000.0, *then, *since, **busy)).cause.name == "processor"
    assert answer(hundredth(15_000.0, then[0], *since, **busy)).cause.name == "link"
    assert answer(hundredth(15_000.0, *since, **busy)).cause.name == "link"
    assert answer(hundredth(15_000.0, **busy)).cause.name == "link", "nobody knows when"
    # Others of that time explain nothing, be they ever so many.
    quick = looks(30.0, 2000.0, count=50)
    assert answer(
        hundredth(15_000.0, *quick, *since, slowest=[stall("link", 30.0, 70_000.0)] * 16, **busy)
    ).cause.name == ("link")
    # Six that want two cores: three turns at each wake-up, but no more.
    assert answer(hundredth(29_000.0, *then, **busy)).cause.name == "processor"
    assert answer(hundredth(31_000.0, *looks(30.0, 31_000.0), **busy)).cause.name == "link"
    assert answer(hundredth(15_000.0, *then, **scarce(40.0, 20.0, runnable=2))).cause.name == "link"
    # The server itself took all that the interpreter has.
    own = scarce(40.0, 20.0, own_cores=0.9, idle_percent=40)
    assert answer(hundredth(31_000.0, *looks(30.0, 31_000.0), **own)).cause.name == "processor"
    # No write waits for turns half of the time.
    assert answer(facts(link=13_000.0, slow_looks={"write": then}, **busy)).cause.name == "link"
    assert answer(facts(link=8_000.0, slow_looks={"write": then}, **busy)).cause.name == "processor"
    # A disk, which takes its time asleep.
    assert answer(facts(own_disk=25_000.0, kind="flush", **own)).cause.name == "own-flush"


def test_processors_that_are_busy_now_explain_nothing_of_before() -> None:
    now = {"processor": {**IDLE, "idle_percent": 0, "runnable": 20, "own_cores": 0.9}}
    assert answer(hundredth(15_000.0, *looks(5.0), **now)).cause.name == "link"
    assert answer(hundredth(15_000.0, *looks(0.5), **now)).cause.name == "processor"
    assert answer(facts(slowest=[stall("link", 60.0, 80_000.0)], **now)).cause.name == "link"


def test_single_requests_by_the_processors_of_their_second() -> None:
    many = scarce(40.0, 20.0, runnable=20)
    assert answer(facts(slowest=[stall("link", 30.0, 80_000.0)], **many)).cause.name == "processor"
    assert answer(facts(slowest=[stall("link", 5.0, 80_000.0)], **many)).cause.name == "link"
    assert answer(facts(slowest=[stall("own_disk", 30.0, 80_000.0)], **many)).cause.name == "own-disk"


def test_the_peer_waits_for_its_processors() -> None:
    busy = scarce(40.0, 20.0)["processor"]
    then = looks(30.0)
    assert answer(hundredth(15_000.0, *then, peer_processor=IDLE)).cause.name == "link"
    found = answer(hundredth(15_000.0, *then, peer_processor=busy))
    assert found.cause.name == "peer-processor"
    assert "`top` on the peer's node" in found.sentence
    assert answer(hundredth(15_000.0, *looks(5.0), peer_processor=busy)).cause.name == "link"
    # On one machine it is that of both.
    assert answer(hundredth(15_000.0, *then, peer_processor=busy, processor=busy)).cause.name == "processor"
    own = scarce(40.0, 20.0, own_cores=0.9, idle_percent=40)["processor"]
    slow = {"write": looks(30.0, 31_000.0)}
    assert answer(facts(peer_disk=31_000.0, slow_looks=slow, peer_processor=own)).cause.name == "peer-processor"
    assert answer(facts(own_disk=31_000.0, slow_looks=slow, peer_processor=own)).cause.name == "own-disk"
    assert answer(facts(peer_disk=31_000.0, kind="flush", peer_processor=own)).cause.name == "peer-flush"
    # Applying what a resync brings keeps a core busy.
    resynced = facts(peer_disk=31_000.0, slow_looks=slow, peer_processor=own, resync={"limit": None})
    assert answer(resynced).cause.name == "resync"
    # Its last look is of a second that is over, and among those before if it was scarce.
    assert answer(facts(link=3000.0, peer_processor={**IDLE, "idle_percent": 1})).cause.name == "link"


def test_no_larger_log_is_advised_where_this_one_holds_the_volume() -> None:
    whole = {**LOG, "extents": 64, "used": 64, "larger": None, "holds_all": True}
    found = answer(facts(log=SLOW, activity_log=whole)).cause
    assert found.name == "cold-extents"
    assert "activity_log_extents" not in found.helps


def test_the_figure_is_of_the_requests_that_the_cause_explains() -> None:
    found = answer(facts(slowest=[slow(1.6e6, link=1.6e6), slow(1.6e6, link=1.6e6), slow(60_000, own_disk=60_000)]))
    assert found.blame is not None
    assert (found.blame.stage, found.blame.stage_us, found.blame.total_us) == ("link", 1.6e6, 1.6e6)
    # Each of several causes takes less of its requests than one that is in all of them.
    spread = [slow(90_000, own_disk=50_000, link=40_000), slow(90_000, peer_disk=50_000, link=40_000)]
    assert answer(facts(slowest=spread)).blame == Blame(
        "link", "write", "now and then", 40_000.0, 90_000.0, 0.09 + spread[0]["ago_s"], spread[0]["ago_s"]
    )  # fmt: skip


def test_a_secondary_does_not_blame_clients_that_it_has_not() -> None:
    of_secondary = answer(facts(role="secondary", kind="apply flush", own_disk=SLOW)).cause
    of_primary = answer(facts(own_disk=SLOW, kind="flush")).cause
    assert ("client" in of_secondary.helps, "client" in of_primary.helps) == (False, True)


def test_a_role_is_told_of_what_it_measured_itself() -> None:
    was_primary = facts(role="secondary", link=SLOW, slowest=[stall("link", 5.0)])
    assert answer(was_primary).cause.name == "nothing"
    was_secondary = facts(kind="apply", receive=SLOW)
    assert answer(was_secondary).cause.name == "nothing"


def test_every_stage_has_a_row_that_always_holds() -> None:
    for stage in (*stages.STAGES, stages.RECEIVE, stages.REPLY, *HALVES, "gate"):
        rows = [row for row in CAUSES if stage in row.stages]
        assert any(row.when.__name__ == "_always" for row in rows), stage
    assert set(SLOW_US) == {
        *(stages.WRITE, stages.DURABLE_WRITE, stages.FLUSHES),
        *(stages.APPLY, stages.DURABLE_APPLY, stages.APPLY_FLUSH),
    }


@pytest.mark.parametrize(("us", "text"), [(40, "40 µs"), (999, "999 µs"), (3100, "3.1 ms"), (2e6, "2.0 s")])
def test_times(us: float, text: str) -> None:
    assert time_text(us) == text


# -- for people


@pytest.mark.parametrize("name", RECORDED)
def test_a_page_begins_with_the_sentence_and_shows_every_stage(name: str) -> None:
    found = RECORDED[name]
    text = page(found).plain
    assert text.startswith(f"vol, {found['role']}: {found['says']}")
    assert all(f"{kind} (" in text for kind in found["stages"])
    assert all(WORDS[stage] in text for stages_of_kind in found["stages"].values() for stage in stages_of_kind)


def test_a_page_says_whether_a_resync_is_held_back_and_what_waits() -> None:
    limit = {"share": 0.3, "bytes_per_s_max": None, "p99_us": 900, "target_us": 400, "reason": "held back as far"}
    resync = {"direction": "to the peer", "done_bytes": 1, "total_bytes": 4, "bytes_per_s": 1, "eta_s": None}
    hanging = {"kind": "trim", "offset": 8192, "length": 4096, "age_s": 2.5, "waits_for": "own_disk"}
    found = {**RECORDED["link-primary"], "resync": {**resync, "limit": limit}, "oldest": hanging}
    text = page(found).plain
    assert "held back as far" in text
    assert "25 %" in text
    assert "trim at 8192 waits for: own disk, for 2.5 s" in text
    assert "no request was measured" in page({**found, "stages": {}, "slowest": []}).plain

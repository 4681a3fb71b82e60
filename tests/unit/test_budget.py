"""The waterfall of one request: what lies where, from medians of both sides that need not add up."""

import xml.etree.ElementTree
from typing import Any

import pytest

from bench import budget, report, works
from bench.budget import KINDS, SPANS, Step, waterfall
from bench.figures import Record, Round

HOT = {
    "client_us": 50.0,
    "answered_us": 40.0,
    "total_us": 40.0,
    "write_us": 0.0,
    "range_us": 4.0,
    "log_us": 0.1,
    "interpreter_us": 6.0,
    "own_disk_us": 5.0,
    "link_us": 20.0,
    "peer_disk_us": 4.0,
    "peer_receive_us": 3.0,
    "peer_own_disk_us": 4.0,
    "peer_reply_us": 7.0,
}


def by_name(steps: list[Step]) -> dict[str, tuple[float, float]]:
    return {step.name: (round(step.begin_us, 1), round(step.us, 1)) for step in steps}


def test_steps_follow_each_other_and_the_peer_works_beside_the_own_disk() -> None:
    found = by_name(waterfall(HOT))
    assert found["client, nbdkit: in"] == (0.0, 5.0)
    assert found["lock"] == (5.0, 4.0)
    assert found["interpreter"] == (9.0, 6.0)
    assert found["own disk"] == (15.0, 5.0)
    assert found["send, way there, waking"][0] == 15.0
    assert found["peer: disk"] == (pytest.approx(26.0, abs=0.2), 4.0)
    begin, length = found["client, nbdkit: out"]
    assert begin + length == pytest.approx(50.0, abs=0.2)
    assert "log" not in found, "a tenth of a microsecond is the least that a histogram tells"


@pytest.mark.parametrize(
    "change",
    [
        # Medians of different requests: the parts are more than the whole.
        {"client_us": 30.0},
        {"peer_reply_us": 90.0},
        {"own_disk_us": 400.0},
        # An older peer, or one that applied nothing that was measured.
        {"peer_receive_us": 0.0, "peer_own_disk_us": 0.0, "peer_reply_us": 0.0},
        {"log_us": 500.0, "total_us": 540.0, "answered_us": 540.0, "client_us": 550.0},
        dict.fromkeys(HOT, 0.0),
    ],
)
def test_no_step_is_negative_and_none_begins_before_the_request(change: dict[str, float]) -> None:
    steps = waterfall({**HOT, **change})
    assert min(min(step.begin_us, step.us) for step in steps) >= 0
    assert steps[-1].name == "client, nbdkit: out"
    assert all(step.begin_us <= steps[-1].begin_us for step in steps)


def test_what_is_sent_ahead_goes_beside_the_record() -> None:
    found = by_name(waterfall({**HOT, "ahead": 1.0, "log_us": 100.0, "total_us": 140.0, "answered_us": 140.0}))
    assert found["send"] == (10.0, 20.0)
    assert found["log"] == (30.0, 100.0)
    assert found["peer: receive"] == (30.0, 3.0)
    assert found["own disk"] == (130.0, 5.0)
    assert found["client, nbdkit: out"][0] == 135.0


def test_what_a_look_takes_is_scaled_away() -> None:
    found = by_name(waterfall({**HOT, "total_us": 80.0, "own_disk_us": 10.0}))
    assert found["own disk"][1] == 5.0
    begin, length = found["client, nbdkit: out"]
    assert begin + length == pytest.approx(50.0, abs=0.2)


def record(**more: Any) -> Record:
    made = Record({"cores": 2}, {"rounds": 1})
    for name in KINDS:
        made.add(works.BUDGET, name, [Round({**HOT, **more})])
    made.add(works.BUDGET, SPANS, [Round({"not_looked_at_ns": 90.0, "look_ns": 3700.0})])
    return made


def test_the_page_has_a_table_for_each_kind() -> None:
    text = report.page(f"{report.BEGIN}\n{report.END}", record(), Record(), Record(), Record())
    for name in KINDS:
        assert f"**{name}**: 50 µs for the client" in text
    assert "| own disk | 15.0 | 5.0 |" in text
    assert "3700 ns" in text
    assert not budget.tables(Record(), works.BUDGET)


def test_the_picture_is_well_formed() -> None:
    drawn = budget.picture(record(), works.BUDGET)
    assert drawn is not None
    xml.etree.ElementTree.fromstring(drawn)
    for name in KINDS:
        assert f">{name}: " in drawn
    assert budget.picture(Record(), works.BUDGET) is None

"""The bench's parts that measure nothing: rounds and ratios, goals, what a table needs, the page that it becomes."""

import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

from bench import pictures, report, tried
from bench.figures import Figure, Record, Round, p99_by_time, percentile, ratios
from bench.rows import DRBD_ROWS, NOT_AVAILABLE, ROWS, Goal, Row, at_least, at_most, judge, matching, needed
from bench.works import EXPERIMENTS, FILE, MIRRORED_C, TARGETS, WORKS, WRITE

OURS, MEASURE = Figure(WRITE, MIRRORED_C, "p50_us"), Figure(WRITE, FILE, "p50_us")


def record(ours: list[float], measure: list[float]) -> Record:
    made = Record({"cores": 2}, {"rounds": len(ours)})
    for target, values in ((MIRRORED_C, ours), (FILE, measure)):
        if values:
            made.add(WRITE, target, [Round({"p50_us": value}, {50.0: value, 99.0: 3 * value}) for value in values])
    return made


# -- figures


@pytest.mark.parametrize(
    ("values", "others", "expected"),
    [
        ([10, 20, 30], [10, 10, 10], [1, 2, 3]),
        # A slow minute is in both: round by round it cancels out.
        ([10, 100, 10], [10, 100, 10], [1, 1, 1]),
        # Not the same rounds: medians.
        ([10, 30], [10], [2]),
        ([], [1], []),
        ([1], [], []),
        ([1, 2], [0, 1], [2]),
    ],
)
def test_ratios(values: list[float], others: list[float], expected: list[float]) -> None:
    assert ratios(values, others) == expected


def test_a_value_is_the_median_and_its_range() -> None:
    assert record([10, 40, 20], [10, 10, 10]).value(OURS, MEASURE) == (2, 1, 4)
    assert record([10, 40, 20], []).value(OURS) == (20, 10, 40)
    assert record([], [10]).value(OURS, MEASURE) is None


def test_of_a_bound_the_worst_round_counts() -> None:
    made = Record()
    made.add(WRITE, MIRRORED_C, [Round({"max_ms": value}) for value in (1, 60, 2)])
    assert made.value(Figure(WRITE, MIRRORED_C, "max_ms")) == (60, 1, 60)


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 51), (99, 100), (100, 100)])
def test_percentile(percent: float, expected: float) -> None:
    assert percentile([float(value) for value in range(100, 0, -1)], percent) == expected


def test_p99_by_time_has_a_window_for_all_that_was_answered() -> None:
    writes = [(9.9, 1.0), (10.0, 2.0), (10.4, 3.0), (11.0, 4.0)]
    assert p99_by_time(writes, 10.0, 0.5) == [[-0.5, 1.0], [0.0, 3.0], [1.0, 4.0]]


def test_a_record_survives_json() -> None:
    made = record([10, 40, 20], [10, 10, 10])
    assert Record(**json.loads(json.dumps(made.as_json()))) == made


# -- rows


@pytest.mark.parametrize(
    ("goal", "value", "passed"),
    [
        (at_most(1.2), 1.2, True),
        (at_most(1.2), 1.21, False),
        (at_least(0.7), 0.7, True),
        (at_least(0.7), 0.69, False),
    ],
)
def test_a_goal_holds_at_its_limit(goal: Goal, value: float, passed: bool) -> None:
    assert goal.passed(value) is passed


@pytest.mark.parametrize(
    ("ours", "goal", "verdict"),
    [
        ([11], at_most(1.2), "pass"),
        ([13], at_most(1.2), "falls short"),
        ([], at_most(1.2), NOT_AVAILABLE),
        ([13], None, ""),
    ],
)
def test_verdicts(ours: list[float], goal: Goal | None, verdict: str) -> None:
    [judged] = judge(record(ours, [10]), [Row("", "", OURS, MEASURE, goal)])
    assert judged.verdict == verdict


@pytest.mark.parametrize("row", [*ROWS, *DRBD_ROWS], ids=lambda row: f"{row.section}: {row.name}")
def test_every_row_names_what_can_be_measured_and_shown(row: Row) -> None:
    for figure in (row.figure, row.beside):
        if figure is not None:
            assert figure.work in EXPERIMENTS or (figure.work in WORKS and figure.target in TARGETS)
            assert report.amount(1.0, figure.key)


def test_rows_are_told_apart() -> None:
    names = [(row.section, row.name) for row in (*ROWS, *DRBD_ROWS, *tried.ROWS)]
    assert len(set(names)) == len(names)


def test_every_work_and_target_is_in_a_row() -> None:
    wanted = needed([*ROWS, *DRBD_ROWS])
    assert set(wanted) == {*WORKS, *EXPERIMENTS}
    assert {target for work, targets in wanted.items() if work in WORKS for target in targets} == set(TARGETS)


def test_a_row_needs_its_own_works_alone() -> None:
    [row] = matching("C, write and fsync, p50", [row for row in ROWS if "namespace" not in row.section])
    assert needed([row]) == {row.figure.work: [MIRRORED_C, FILE]}


# -- what people read


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [
        (43.4, "p50_us", "43 µs"),
        (13.71, "max_ms", "13.7 ms"),
        (896e6, "bytes_per_s", "896 MB/s"),
        (19382.2, "operations_per_s", "19382 /s"),
        (2 << 20, "sent_bytes", "2.0 MiB"),
        (1.333, "seconds", "1.33 s"),
        (37.2, "peak_mib", "37 MiB"),
        (0.5, "cores", "0.50 cores"),
    ],
)
def test_amounts(value: float, key: str, expected: str) -> None:
    assert report.amount(value, key) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("volume_bytes", 256 << 20, "volume: 256 MiB"),
        ("idle_before_percent", 97, "idle before: 97 %"),
        ("cores", 2, "cores: 2"),
    ],
)
def test_facts(key: str, value: object, expected: str) -> None:
    assert report.fact((key, value)) == expected


def test_a_row_as_text() -> None:
    made = record([10, 40, 20], [10, 10, 10])
    [judged] = judge(made, [Row("", "a row", OURS, MEASURE, at_most(1.2))])
    assert report.cells(judged, made) == ("a row", "2.00 ×", "1.00–4.00", "20 µs : 10 µs", "≤ 1.2 ×", "falls short")


def test_a_page_is_made_anew_between_its_markers() -> None:
    text = f"before\n{report.BEGIN}\nformerly\n{report.END}\nafter\n"
    made = report.page(text, record([10], [10]), Record(), Record(), Record())
    assert made.startswith("before\n")
    assert made.endswith("\nafter\n")
    assert "formerly" not in made
    assert all(row.name in made for row in ROWS)
    assert "make bench-drbd" in made
    assert "make bench-tried" in made
    assert report.page(made, record([10], [10]), Record(), Record(), Record()) == made
    both = report.page(made, record([10], [10]), Record(), Record(), Record(), [record([70], [10])])
    assert "### On another machine" in both
    assert "7.00 ×" in both


def test_pictures_are_well_formed_and_name_their_curves() -> None:
    made = record([10, 40, 20], [10, 10, 10])
    made.timeline = {"window_s": 0.5, "without": [[0, 50.0]], "beside": [[-0.5, 40.0], [0, 90.0]], "resync_s": 0.4}
    drawn = pictures.all_of(made)
    assert set(drawn) == {"latency", "resync"}
    for picture in drawn.values():
        xml.etree.ElementTree.fromstring(picture)
    assert f">{MIRRORED_C}<" in drawn["latency"]
    assert "nan" not in drawn["resync"]


# -- what is in the repository


def test_the_page_says_what_the_last_full_run_found() -> None:
    text = report.PAGE.read_text()
    others = report.load(report.TRIED), report.load(report.PROFILE), report.elsewhere()
    assert report.page(text, report.load(), report.load(report.BESIDE_DRBD), *others) == text, "make report"


def test_the_pictures_are_of_the_last_full_run() -> None:
    drawn = {report.picture_path(name): picture for name, picture in pictures.all_of(report.load()).items()}
    kept: set[Path] = set(report.RESULTS.glob("latest-*.svg"))
    assert kept == set(drawn)
    for path, picture in drawn.items():
        assert path.read_text() == picture, "make report"


def test_all_that_was_tried_and_can_be_measured_again_was() -> None:
    again = report.load(report.TRIED)
    assert {work: set(ways) for work, ways in again.rounds.items()} == {
        trial.work: set(trial.ways) for trial in tried.TRIALS
    }, "make bench-tried"
    assert all(one.value is not None for one in judge(again, tried.ROWS)), "make bench-tried"


# What the software or the kernel is set to; any other amount would be one that was measured once, by nobody knows what.
SETTINGS = {"10 ms", "100 µs", "400 µs"}


def test_what_was_tried_is_told_without_figures_of_its_own() -> None:
    _, _, told = report.PAGE.read_text().partition("## What was tried\n")
    amounts = re.findall(r"\d[\d.]* (?:ns|µs|ms|s|%|times|×|MB/s)(?!\w)", told.partition("\n## ")[0])
    assert set(amounts) <= SETTINGS

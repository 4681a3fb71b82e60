"""Lives of whole clusters, and proof that the simulator can fail: planted faults that it must find.

Each run is a process of its own (`python -m tests.sim`), because the simulator sets small limits before the product is
imported. A life that fails is shrunk and printed with its timeline; `make sim SEED=n` replays it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def simulate(*arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.sim", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_lives(count: int, first: int, timeout_s: float) -> dict[str, Any]:
    run = simulate("lives", "--count", str(count), "--first", str(first), "--json", timeout_s=timeout_s)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    told: dict[str, Any] = json.loads(run.stdout)
    return told


@pytest.mark.timeout(400)
def test_a_thousand_lives() -> None:
    told = run_lives(1000, first=0, timeout_s=390)
    assert told["lives"] == 1000
    assert told["failures"] == []
    # Not lives in which nothing happens.
    assert told["steps"] > 1000 * told["lives"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("soak", "--hours", "0"), 2),
        (("soak", "--hours", "-1"), 2),
        (("lives", "--count", "0"), 2),
        # Over before the first life begins.
        (("soak", "--hours", "1e-12"), 1),
    ],
)
def test_no_life_is_no_success(words: tuple[str, ...], code: int) -> None:
    run = simulate(*words, timeout_s=50)
    assert run.returncode == code, run
    assert ("Usage" if code == 2 else "no life was run") in run.stderr


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_twenty_thousand_lives() -> None:
    assert run_lives(20_000, first=1000, timeout_s=7100)["failures"] == []


@pytest.mark.timeout(600)
def test_every_planted_fault_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    run = simulate("faults", "--json", timeout_s=590)
    rows = json.loads(run.stdout)
    table = [f"    {row['fault']:62} {row['lives']:4} lives  {row['invariant'] or 'NOT FOUND'}\n" for row in rows]
    with capsys.disabled():
        sys.stdout.write("\n" + "".join(table))
    assert len(rows) >= 20
    assert [row["fault"] for row in rows if not row["invariant"]] == []
    assert run.returncode == 0


def test_a_seed_is_one_life() -> None:
    first, second = (simulate("one", "7", timeout_s=50) for _ in range(2))
    assert first.returncode == 0
    assert "virtual seconds" in first.stdout
    assert first.stdout == second.stdout


def test_a_failing_life_is_shrunk_and_shown() -> None:
    run = simulate("one", "0", "--fault", "no log record before a write", timeout_s=50)
    assert run.returncode == 1
    assert "shrunk from" in run.stdout
    assert "BROKEN: log-before-write" in run.stdout

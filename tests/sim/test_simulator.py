"""Lives of whole clusters, and proof that the simulator can fail: planted faults that it must find.

Each run is a process of its own (`python -m tests.sim`), because the simulator sets small limits before the product is
imported. A life that fails is shrunk and printed with its timeline; `make sim SEED=n` replays it.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbd_server import compiled

ROOT = Path(__file__).resolve().parent.parent.parent


def simulate(*arguments: str, timeout_s: float, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.sim", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_lives(count: int, first: int, timeout_s: float, *options: str) -> dict[str, Any]:
    run = simulate("lives", "--count", str(count), "--first", str(first), "--json", *options, timeout_s=timeout_s)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    told: dict[str, Any] = json.loads(run.stdout)
    return told


@pytest.mark.timeout(400)
def test_seven_hundred_lives() -> None:
    told = run_lives(700, first=300, timeout_s=390)
    assert told["lives"] == 700
    assert told["failures"] == []
    # Not lives in which nothing happens.
    assert told["steps"] > 1000 * told["lives"]


@pytest.mark.timeout(400)
def test_three_hundred_lives_of_the_sources_and_of_what_was_compiled_from_them() -> None:
    of_sources = run_lives(300, 0, 190)
    of_compiled = run_lives(300, 0, 190, "--compiled")
    assert of_sources["compiled"] == []
    libraries = [path.relative_to(compiled.COPY) for path in compiled.COPY.glob("mirror/**/*.so")]
    assert of_compiled["compiled"] == sorted(
        ".".join((*path.parts[:-1], path.name.split(".")[0])) for path in libraries
    )
    assert len(libraries) >= 20
    # Step by step the same.
    for what in ("lives", "steps", "timelines", "failures"):
        assert of_compiled[what] == of_sources[what]
    assert of_compiled["failures"] == []


def test_without_a_compiled_copy_of_the_sources_none_is_run(tmp_path: Path) -> None:
    """A clone that was not set up: its sources, and the virtual environment of another one."""
    for package in ("cli", "mirror", "nbd_server", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "mirror" / "primary.py", "a") as changed:
        changed.write("# changed\n")
    run = simulate("lives", "--count", "1", "--compiled", timeout_s=50, directory=tmp_path)
    assert run.returncode == 2, run
    assert "not of these sources" in run.stderr


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
    # Compiled: the same lives, and one thing more that may fail.
    assert run_lives(20_000, 1000, 7100, "--compiled")["failures"] == []


# It takes seconds where the lives of tests/sim/found.json still find the faults; to search for them takes minutes.
@pytest.mark.timeout(1800)
def test_every_planted_fault_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    run = simulate("faults", "--json", timeout_s=1790)
    rows = json.loads(run.stdout)
    table = [f"    {row['fault']:66} life {row['life']:4}  {row['invariant'] or 'NOT FOUND'}\n" for row in rows]
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


def test_what_a_peer_without_power_may_have_missed_was_answered_alone() -> None:
    """The primary of this life answers a FUA write that waited for its peer when that lost power, after it has recorded
    that it is alone; then the peer is promoted by force, and the oracle must not ask for the write there."""
    run = simulate("one", "1378", "--events", "flip,verify,power", "--protocols", "CCCBA", timeout_s=50)
    assert run.returncode == 0, run.stdout


def test_a_failing_life_is_shrunk_and_shown() -> None:
    run = simulate("one", "0", "--fault", "no log record before a write", timeout_s=50)
    assert run.returncode == 1
    assert "shrunk from" in run.stdout
    assert "BROKEN: log-before-write" in run.stdout

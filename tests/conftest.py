"""What every test gets: a printed seed, the `long` marker, a time limit, and no process left behind.

The seed: random moments and contents come from the `rng` fixture, which mixes the run's seed with the test's name. The
seed is printed at the head of the run and beside each failure; `NBDMIRROR_TEST_SEED=n` plays it again.
"""

import ctypes
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SEED = int(os.environ.get("NBDMIRROR_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
LONG_LIMIT_S = 1200
PR_SET_CHILD_SUBREAPER = 36

# libnbd's Python binding is a Debian package of the system Python only, from which the virtual environment is made.
SYSTEM_PACKAGES = "/usr/lib/python3/dist-packages"
if SYSTEM_PACKAGES not in sys.path:
    sys.path.append(SYSTEM_PACKAGES)


def pytest_configure(config: pytest.Config) -> None:
    # Orphans (an nbdkit whose parent was killed) become children of this process, so that it can wait for their end.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {SEED} (NBDMIRROR_TEST_SEED={SEED} repeats this run)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("long") and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LONG_LIMIT_S))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        report.sections.append(("seed", f"NBDMIRROR_TEST_SEED={SEED}"))
        cluster = getattr(item, "cluster", None)
        for replica in cluster.replicas if cluster else ():
            report.sections.append((f"log of {replica.directory.name}", replica.log()[-6000:]))
    return report


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Randomness of this test in this run: the same for the same seed, whatever other tests run."""
    return random.Random(f"{SEED}:{request.node.nodeid}")


@pytest.fixture(scope="session")
def project_root() -> Path:
    return Path(__file__).resolve().parent.parent

"""The `cluster` fixture: replicas as processes, ended and checked after every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import NBDMIRROR, Cluster


@pytest.fixture(scope="session", autouse=True)
def _product_is_there() -> None:
    assert NBDMIRROR.exists(), f"{NBDMIRROR} is missing: run `make setup`"


@pytest.fixture
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Replicas of this test; afterwards every process must have ended in time and every log be clean."""
    cluster = Cluster(tmp_path)
    request.node.cluster = cluster  # for the report of a failure
    try:
        yield cluster
    finally:
        problems = cluster.close()
    assert not problems, "\n".join(problems)

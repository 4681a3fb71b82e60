"""What every other test here starts is the compiled copy, and of these very sources."""

from tests.integration.cluster import Cluster


def test_a_server_runs_the_compiled_copy(cluster: Cluster) -> None:
    a, b = cluster.pair("64M")
    assert [replica.status()["compiled"] for replica in (a, b)] == [True, True], "run `make setup`: the sources changed"

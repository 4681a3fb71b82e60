"""The kernel tests use the same replicas as the integration tests, and guests on a network of their own."""

import pytest

from tests.integration.cluster import Cluster
from tests.integration.conftest import cluster
from tests.kernel.guest import GuestNetwork

__all__ = ["cluster", "network"]


@pytest.fixture
def network(cluster: Cluster) -> GuestNetwork:
    network = GuestNetwork()
    cluster.at_end(network.close)
    return network

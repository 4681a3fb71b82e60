"""Kill tests: random moments, every victim, every protocol, depth 1 and 16, many writes in flight.

The rounds are in rounds.py; the moments come from the printed seed.
"""

import random
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster
from tests.integration.rounds import PowerRounds, Rounds


@pytest.mark.parametrize("depth", [1, 16])
@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_every_victim_once(cluster: Cluster, rng: random.Random, protocol: str, depth: int) -> None:
    rounds = Rounds(cluster, rng, protocol, depth)
    for victim in rng.sample(rounds.victims(), 4):
        victim()


def test_power_is_lost(cluster: Cluster, rng: random.Random, tmp_path: Path) -> None:
    rounds = PowerRounds(cluster, rng, "C", 16, tmp_path)
    for victim in rng.sample([rounds.peer, rounds.both, rounds.lead, rounds.one_after_the_other], 4):
        victim()
    assert all(disk.counts()["lost_blocks"] > 0 for disk in rounds.disks.values())


@pytest.mark.long
@pytest.mark.parametrize("depth", [1, 16])
@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_many_rounds(cluster: Cluster, rng: random.Random, protocol: str, depth: int) -> None:
    rounds = Rounds(cluster, rng, protocol, depth)
    for _ in range(60):
        rng.choice([*rounds.victims(), *rounds.more_victims()])()


@pytest.mark.long
@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_many_rounds_of_lost_power(cluster: Cluster, rng: random.Random, tmp_path: Path, protocol: str) -> None:
    rounds = PowerRounds(cluster, rng, protocol, 16, tmp_path)
    for _ in range(40):
        rng.choice([*rounds.victims(), *rounds.more_victims()])()

"""The crash matrix: every point, on the side where it lies, with nbdkit alone and with the whole replica killed.

`make test` has each point once, one pair for a group of points; `make test-long` has the product of point, kind of
death and protocol, a fresh pair for each.
"""

import random
from pathlib import Path

import pytest

from tests.crash.deaths import command_and_die
from tests.crash.points import GROUPS
from tests.crash.stage import Scenario, Stage
from tests.integration.cluster import Cluster, nbdmirror

# For each group of points: the scenario that leads to them.
SCENARIOS: dict[str, Scenario] = {
    "write": Stage.primary_while_writing,
    "deferred": Stage.primary_while_writing,
    "apply": Stage.secondary_while_writing,
    "log": Stage.primary_while_writing,
    "alone": Stage.primary_left_alone,
    "source": Stage.source_in_resync,
    "target": Stage.target_in_resync,
    "handshake": Stage.meeting_of_secondary,
    "promote-alone": Stage.promoted_alone,
    "promote-connected": Stage.promoted_beside_its_peer,
    "demote": Stage.demoted,
    "switch": Stage.switched_primary_dies,
    "take-over": Stage.switched_secondary_dies,
    "stop": Stage.stopped,
    "start": Stage.started,
    "disconnect": Stage.disconnected,
    "invalidate": Stage.invalidated,
}
# Points that another scenario leads to than their group's.
OTHERS: dict[str, Scenario] = {
    "write-in-a-later-piece": Stage.primary_while_zeroing,
    "log-full": Stage.primary_while_its_log_is_full,
    "log-room-made": Stage.primary_while_its_log_is_full,
}
WHOM = ("self", "both")
# Groups that turn on the number of extents that are written.
WIDE = ("log", "alone", "start")
# The protocols under which the points of a group are tried, C where it is not named.
PROTOCOLS = {"write": "CAB", "apply": "CAB", "deferred": "AB"}


def play(stage: Stage, group: str, point: str, whom: str) -> None:
    stage.perform(OTHERS.get(point, SCENARIOS[group]), point, whom)


def chains() -> list[tuple[str, str]]:
    return [(group, protocol) for group in SCENARIOS for protocol in ("AB" if group == "deferred" else "C")]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("group", "protocol"), chains())
def test_every_point_once(cluster: Cluster, rng: random.Random, group: str, protocol: str) -> None:
    """One pair dies at each point of a group in turn; the two kinds of death alternate."""
    stage = Stage(cluster, rng, protocol, group in WIDE)
    for number, point in enumerate(GROUPS[group]):
        play(stage, group, point, WHOM[number % 2])
    stage.end()


def rows() -> list[object]:
    return [
        pytest.param(group, point, whom, protocol, id=f"{point}-{whom}-{protocol}")
        for group in SCENARIOS
        for point in GROUPS[group]
        for protocol in PROTOCOLS.get(group, "C")
        for whom in (WHOM if group != "invalidate" else WHOM[:1])
    ]


@pytest.mark.long
@pytest.mark.parametrize(("group", "point", "whom", "protocol"), rows())
def test_a_process_dies_and_comes_back(
    cluster: Cluster, rng: random.Random, group: str, point: str, whom: str, protocol: str
) -> None:
    play(Stage(cluster, rng, protocol, group in WIDE), group, point, whom)


@pytest.mark.long
@pytest.mark.parametrize("whom", WHOM)
@pytest.mark.parametrize("point", GROUPS["handshake"])
def test_the_primary_dies_while_it_meets_its_peer(cluster: Cluster, rng: random.Random, point: str, whom: str) -> None:
    Stage(cluster, rng, "C", wide=False).perform(Stage.meeting_of_primary, point, whom)


@pytest.mark.parametrize("point", GROUPS["create"])
def test_create_is_killed(tmp_path: Path, cluster: Cluster, point: str) -> None:
    """What is left is a whole replica or is refused by all who could take it for one, with the way out."""
    replica = cluster.replica("a")
    options = ("--name", "vol", "--size", "200M")
    command_and_die("create", replica.directory, point, *options)
    left = sorted(path.name for path in replica.directory.iterdir())
    if left == ["data", "meta", "volume.toml"]:
        replica.serve()
        with replica.client() as client:
            client.pwrite(b"x" * 4096, 0)
            client.flush()
        return
    if left:
        for verb, words in (("create", options), ("serve", ())):
            refusal = nbdmirror(verb, replica.directory, *words, check=False)
            assert refusal.returncode == 1, refusal
            assert "nbdmirror destroy" in refusal.stderr, refusal
        nbdmirror("destroy", replica.directory, "--yes")
    replica.create("200M")
    replica.serve()

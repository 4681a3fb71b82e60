"""The crash matrix: every point, on the side where it lies, with nbdkit alone and with the whole replica killed.

One pair goes through all points of a group. `make test` has each point once, `make test-long` has the product of point,
kind of death and protocol.
"""

import contextlib
import functools
import importlib
import os
import random
import signal
from pathlib import Path

import pytest

from nbd_server.config import FILE_NAME, INTERRUPTED_NAME
from tests.crash.deaths import Deaths, command_and_die
from tests.crash.points import GROUPS, POINTS
from tests.crash.stage import Scenario, Stage
from tests.integration.cluster import Cluster, Replica, nbdmirror
from tests.integration.processes import wait_for

# For each group of points: the scenario that leads to them.
SCENARIOS: dict[str, Scenario] = {
    "write": Stage.primary_while_writing,
    "deferred": Stage.primary_while_writing,
    "apply": Stage.secondary_while_writing,
    "log": Stage.primary_while_writing,
    "parked": Stage.secondary_while_writing,
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
    "resize": Stage.resized_primary_dies,
    "resize-peer": Stage.resized_secondary_dies,
    "log-size": Stage.log_size_changed,
    "suspects": Stage.compared,
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
WIDE = ("log", "parked", "alone", "start", "log-size")
# The protocols under which the points of a group are tried, C where it is not named.
PROTOCOLS = {"write": "CAB", "apply": "CAB", "deferred": "AB", "parked": "CB"}


def chains() -> list[object]:
    """(group, protocol, turn): turn 1 kills the other way round; short are turn 0 and the first protocol of a group."""
    found = []
    for group in SCENARIOS:
        protocols = PROTOCOLS.get(group, "C")
        for protocol in protocols:
            for turn in range(len(WHOM) if group != "invalidate" else 1):
                short = turn == 0 and (protocol == protocols[0] or group == "deferred")
                marks = () if short else (pytest.mark.long,)
                found.append(pytest.param(group, protocol, turn, id=f"{group}-{protocol}-{turn}", marks=marks))
    return found


def test_every_point_names_a_function() -> None:
    """Who renames a function finds its crash point here, and not by a process that never dies."""
    for point in POINTS.values():
        for target in filter(None, (point.function, point.inside)):
            module, _, path = target.partition(":")
            assert callable(functools.reduce(getattr, path.split("."), importlib.import_module(module))), target


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("group", "protocol", "turn"), chains())
def test_every_point_of_a_group(cluster: Cluster, rng: random.Random, group: str, protocol: str, turn: int) -> None:
    """One pair dies at each point of a group in turn; the two kinds of death alternate."""
    stage = Stage(cluster, rng, protocol, group in WIDE)
    for number, point in enumerate(GROUPS[group], turn):
        stage.perform(OTHERS.get(point, SCENARIOS[group]), point, WHOM[number % 2])
    stage.end()


@pytest.mark.long
def test_the_primary_dies_while_it_meets_its_peer(cluster: Cluster, rng: random.Random) -> None:
    stage = Stage(cluster, rng, "C", wide=False)
    for whom in WHOM:
        for point in GROUPS["handshake"]:
            stage.perform(Stage.meeting_of_primary, point, whom)
    stage.end()


def test_an_nbdkit_that_died_before_it_was_ready_proves_no_memory(cluster: Cluster) -> None:
    """What was lost before its parent began to look may not have been recorded yet."""
    replica = cluster.replica("a")
    replica.create("64M")
    replica.allow("nbdkit was killed")
    deaths = Deaths(replica)
    for ready_first, words in ((False, ("resume=0", "memory_kept=0")), (True, ("resume=1", "memory_kept=1"))):
        if ready_first:
            replica.wait_ready()
            os.kill(replica.nbdkit_pids()[0], signal.SIGKILL)
        else:
            deaths.arm("start-read", "self")
            replica.launch()
            deaths.wait()
        wait_for(lambda words=words: set(words) <= set(arguments_of(replica)), 10, f"an nbdkit with {words}")  # type: ignore[misc]
    replica.stop()


def arguments_of(replica: Replica) -> list[str]:
    for pid in replica.nbdkit_pids():
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


@pytest.mark.parametrize("point", GROUPS["create"])
def test_create_is_killed(tmp_path: Path, cluster: Cluster, point: str) -> None:
    """What is left is a whole replica or is refused by all who could take it for one, with the way out."""
    replica = cluster.replica("a")
    options = ("--name", "vol", "--size", "200M")
    command_and_die("create", replica.directory, point, *options)
    left = sorted(path.name for path in replica.directory.iterdir())
    if FILE_NAME in left and INTERRUPTED_NAME not in left:
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

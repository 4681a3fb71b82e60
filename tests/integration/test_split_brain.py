"""Two replicas that both moved on: they say so, they refuse each other, and the operator's word resolves it."""

import random

import pytest

from tests.integration.cluster import PEER_LOST, Cluster, Replica, assert_equal_copies, different_blocks, write
from tests.integration.network import Network

MIB = 1 << 20
SPLIT = PEER_LOST + "|split.brain|discard|promot|primary|insecure"


def say_split_brain(*replicas: Replica) -> None:
    """Log and status of each say what happened and how to resolve it."""
    for replica in replicas:
        replica.wait_log("split.brain")
        replica.wait_log(r"connect.*--discard-my-data")
        replica.wait_status(
            connection=lambda state: state not in ("Connected", "SyncSource", "SyncTarget"),
            warnings=lambda said: "split brain" in " ".join(said) and "--discard-my-data" in " ".join(said),
        )


def split(cluster: Cluster, rng: random.Random) -> tuple[Replica, Replica, Network, dict[str, bytes]]:
    """Both primary on the two ends of a cut wire, each with writes of its own; the wire is healed again at the end."""
    network = cluster.network()
    a, b = cluster.pair(network=network)
    for replica in (a, b):
        replica.allow(SPLIT)
    data = {name: rng.randbytes(MIB) for name in ("common", "a", "b", "both a", "both b")}
    write(a, data["common"], 0)
    network.cut(1)
    b.wait_status(connection="Connecting")
    b.promote()
    write(a, data["a"], 10 * MIB)
    write(a, data["both a"], 30 * MIB)
    write(b, data["b"], 20 * MIB)
    write(b, data["both b"], 30 * MIB)
    network.heal(1)
    return a, b, network, data


@pytest.mark.parametrize("loser_name", ["a", "b"])
def test_both_promoted_while_apart(cluster: Cluster, rng: random.Random, loser_name: str) -> None:
    a, b, _, data = split(cluster, rng)
    say_split_brain(a, b)
    winner, loser = (b, a) if loser_name == "a" else (a, b)

    # Both go on serving what they have; nothing was overwritten.
    for replica, own in ((a, "a"), (b, "b")):
        with replica.client() as client:
            assert bytes(client.pread(MIB, 30 * MIB)) == data[f"both {own}"]

    # The operator's word is not taken from a primary: its changes are still in use.
    refused = loser.command("connect", "--discard-my-data", check=False)
    assert refused.returncode == 1
    assert "demote" in refused.stderr
    loser.demote()
    loser.command("connect", "--discard-my-data")
    loser.wait_in_step()
    winner.wait_in_step()
    assert winner.status()["role"] == "primary"
    assert loser.status()["role"] == "secondary"
    assert winner.status()["warnings"] == loser.status()["warnings"] == []
    assert_equal_copies(a, b)
    kept = "b" if loser_name == "a" else "a"
    with winner.client() as client:
        assert bytes(client.pread(MIB, 0)) == data["common"]
        assert bytes(client.pread(MIB, 10 * MIB)) == (data["a"] if kept == "a" else bytes(MIB))
        assert bytes(client.pread(MIB, 20 * MIB)) == (data["b"] if kept == "b" else bytes(MIB))
        assert bytes(client.pread(MIB, 30 * MIB)) == data[f"both {kept}"]
    resync = winner.status()["last_resync"]
    assert resync["dirty_bytes"] == 3 * MIB, "what either changed since they parted, and nothing else"


def test_found_at_a_start(cluster: Cluster, rng: random.Random) -> None:
    """One after the other alone: they never meet while both run, the start of the second finds it."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(SPLIT, "no answer|alone|crash")
        replica.configure(wait_for_peer_s=0.3)
    b.stop()
    write(a, rng.randbytes(MIB), 0)
    a.stop()
    b.serve()
    b.promote("--force")  # it left while the other one was primary, so it knows that it is Outdated
    write(b, rng.randbytes(MIB), 2 * MIB)
    a.serve_fails("--primary")
    a.serve()
    say_split_brain(a, b)
    assert a.status()["role"] == "secondary"
    assert different_blocks(a.data_path, b.data_path), "nothing was overwritten"

    # It is still a split brain after both restart.
    a.stop()
    b.stop()
    b.serve()
    a.serve()
    a.wait_status(warnings=lambda sentences: "--discard-my-data" in " ".join(sentences))
    a.command("connect", "--discard-my-data")
    a.wait_in_step()
    b.wait_in_step()
    assert_equal_copies(a, b)


def test_discard_on_both_is_refused(cluster: Cluster, rng: random.Random) -> None:
    a, b, _, _ = split(cluster, rng)
    say_split_brain(a, b)
    a.demote()
    b.demote()
    a_bytes, b_bytes = a.data_path.read_bytes(), b.data_path.read_bytes()
    a.command("disconnect")
    b.command("disconnect")
    for replica in (a, b):
        replica.command("connect", "--discard-my-data", check=False)
    a.wait_status(connection=lambda state: state != "Connected")
    assert a.data_path.read_bytes() == a_bytes or b.data_path.read_bytes() == b_bytes, "never are both discarded"


def test_no_split_brain_when_only_one_moved_on(cluster: Cluster, rng: random.Random) -> None:
    """Promoted while apart, but the old primary acknowledged nothing alone: it just follows."""
    network = cluster.network()
    a, b = cluster.pair(network=network)
    for replica in (a, b):
        replica.allow(SPLIT)
    write(a, rng.randbytes(MIB), 0)
    network.cut(1)
    a.wait_status(connection="Connecting")
    a.demote()
    b.wait_status(connection="Connecting")
    b.promote()
    write(b, rng.randbytes(MIB), 4 * MIB)
    network.heal(1)
    a.wait_in_step()
    b.wait_in_step()
    assert a.status()["role"] == "secondary"
    assert_equal_copies(a, b)

"""UpToDate, Consistent, Outdated: what a replica that lags behind knows of itself, and who may promote it."""

import random

from tests.integration.cluster import PEER_LOST, Cluster, Replica, assert_equal_copies, write
from tests.integration.network import Network

MIB = 1 << 20
ALLOWED = PEER_LOST + r"|promot|old primary|outdated|split.brain|discard|insecure|alone|not loopback"


def pair(cluster: Cluster, network: Network | None = None, **configuration: object) -> tuple[Replica, Replica]:
    a, b = cluster.pair(network=network, **configuration)
    for replica in (a, b):
        replica.allow(ALLOWED)
    return a, b


def test_a_secondary_whose_primary_was_stopped_in_order_is_promoted_with_a_milder_word(
    cluster: Cluster, rng: random.Random
) -> None:
    a, b = pair(cluster)
    write(a, rng.randbytes(MIB))
    a.stop()
    assert b.wait_status(connection="Connecting")["disk"] == "Consistent"
    before = b.status()["generation"]
    done = b.promote()
    assert "stopped in order" in done.stderr
    assert "must not be running" not in done.stderr
    assert b.status()["generation"] != before, "each promotion begins a history of its own"
    a.serve()
    a.wait_in_step()
    assert_equal_copies(a, b)


def test_a_secondary_that_was_cut_off_is_warned_of_what_it_can_not_know(cluster: Cluster, rng: random.Random) -> None:
    a, b = pair(cluster)
    write(a, rng.randbytes(MIB))
    a.kill()
    assert b.wait_status(connection="Connecting")["disk"] == "Consistent"
    assert "must not be running" in b.promote().stderr


def test_a_milder_word_is_not_given_over_a_restart(cluster: Cluster) -> None:
    a, b = pair(cluster)
    a.stop()
    b.stop()
    b.serve()
    assert b.status()["disk"] == "Consistent"
    assert "must not be running" in b.promote().stderr


def test_a_secondary_that_leaves_in_order_is_outdated_and_its_primary_the_newest(cluster: Cluster) -> None:
    """Nothing was written since: both know all the same, also after both were stopped."""
    a, b = pair(cluster)
    b.stop()
    assert b.status()["disk"] == "Outdated"
    a.wait_status(peer__disk="Outdated")
    a.stop()
    assert a.status()["disk"] == "UpToDate", "its peer said that it stays behind"
    b.serve()
    refused = b.promote(check=False)
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    a.serve("--primary")
    a.wait_in_step()
    b.wait_in_step()


def test_a_secondary_told_that_its_peer_moved_on_is_outdated_though_no_session_comes_of_it(
    cluster: Cluster, rng: random.Random
) -> None:
    """Cut off in step, it may be promoted. Then it meets a primary that moved on, but refuses to connect."""
    network = cluster.network()
    a, b = pair(cluster, network=network)
    network.cut(1)
    assert b.wait_status(connection="Connecting")["disk"] == "Consistent"
    a.wait_status(connection="Connecting")
    write(a, rng.randbytes(MIB))
    a.command("disconnect")
    network.heal(1)
    b.wait_status(disk="Outdated")
    refused = b.promote(check=False)
    assert refused.returncode == 1
    assert "--force" in refused.stderr

    # It stays so over a restart, and while the other one is gone.
    a.stop()
    b.stop()
    assert b.status()["disk"] == "Outdated"
    b.serve()
    generation = b.status()["generation"]
    assert "acknowledged writes are missing" in b.promote("--force").stderr
    assert b.status()["generation"] != generation, "a history of its own"
    a.serve()
    a.wait_log("split.brain")
    b.wait_log("split.brain")


def test_a_disconnected_secondary_hears_that_its_peer_moved_on(cluster: Cluster, rng: random.Random) -> None:
    """It is the one that refuses: what the dialling peer says of itself counts all the same."""
    network = cluster.network()
    a, b = pair(cluster, network=network)
    network.cut(1)
    b.wait_status(connection="Connecting")
    a.wait_status(connection="Connecting")
    b.command("disconnect")
    assert b.status()["disk"] == "Consistent", "it can't know"
    write(a, rng.randbytes(MIB))
    network.heal(1)
    b.wait_status(disk="Outdated")
    b.command("connect")
    b.wait_in_step()
    assert_equal_copies(a, b)


def test_a_replica_that_learnt_it_is_older_is_no_source_without_a_word(cluster: Cluster, rng: random.Random) -> None:
    """The newer copy is lost for good and replaced: the older one waits until somebody takes it for good enough."""
    network = cluster.network()
    a, b = pair(cluster, network=network)
    network.cut(1)
    b.wait_status(connection="Connecting")
    a.wait_status(connection="Connecting")
    write(a, rng.randbytes(MIB))
    a.command("disconnect")
    network.heal(1)
    b.wait_status(disk="Outdated")
    a.stop()
    a.command("destroy", "--yes")
    a.create("64M", "--listen", a.listen, "--peer", b.listen, "--join")
    a.serve()
    for replica in (a, b):
        replica.wait_status(plan=lambda plan: plan is not None and plan["rule"] == "outdated-source")
    b.promote("--force")
    a.wait_in_step()
    assert_equal_copies(a, b)


def test_outdate_does_not_make_an_inconsistent_copy_better(cluster: Cluster, rng: random.Random) -> None:
    a, b = pair(cluster)
    b.stop()
    b.command("invalidate")
    a.command("disconnect")
    b.serve()
    assert b.status()["disk"] == "Inconsistent"
    b.command("disconnect")
    assert b.status()["disk"] == "Inconsistent"
    assert b.promote("--force", check=False).returncode == 1


def test_a_promotion_by_force_where_the_peer_wrote_nothing_is_no_split_brain(
    cluster: Cluster, rng: random.Random
) -> None:
    a, b = pair(cluster)
    a.command("disconnect")
    b.wait_status(disk="Outdated")
    a.demote()
    b.promote("--force")
    write(b, rng.randbytes(MIB))
    a.command("connect")
    a.wait_in_step()
    b.wait_in_step()
    assert b.status()["role"] == "primary"
    assert_equal_copies(a, b)


def test_a_secondary_that_has_lost_its_peer_from_volume_toml_does_not_serve_by_itself(
    cluster: Cluster, rng: random.Random
) -> None:
    a, b = cluster.pair()
    with a.client() as client:
        client.pwrite(rng.randbytes(MIB), 0)
        client.flush()
    for replica in (a, b):
        replica.allow(ALLOWED)
        # The second one can't know that it is the newest; the one that leaves a primary knows that it is not.
        replica.stop()
    path = b.directory / "volume.toml"
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(True) if not line.startswith(("listen", "peer ="))))
    assert "names no peer" in b.serve_fails().stderr
    b.serve("--primary")
    b.stop()
    # From then on it is known to be alone.
    b.serve()
    b.stop()

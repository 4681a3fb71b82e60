"""The primary dies in the middle of writes, the secondary takes over, the old primary comes back."""

import random
import time

import pytest

from tests.integration.clients import Writer, fio, new_history
from tests.integration.cluster import CLIENT_GONE, PEER_LOST, Cluster, assert_equal_copies

MIB = 1 << 20
PROMOTED = PEER_LOST + r"|promot|old primary|must not be running"


@pytest.mark.parametrize("depth", [1, 16])
def test_acknowledged_writes_survive_the_primary(cluster: Cluster, rng: random.Random, depth: int) -> None:
    a, b = cluster.pair(size="256M")
    for replica in (a, b):
        replica.allow(PROMOTED)
    history = new_history(rng)
    writer = Writer(a, history, depth=depth, blocks=6000, blocks_max=2, zeroes=0.05, flush_every=300)
    cluster.at_end(writer.close)
    writer.wait_answers(rng.randint(300, 1500))
    a.kill()
    writer.ended_by_loss()

    begin = time.monotonic()
    done = b.promote()
    seconds = time.monotonic() - begin
    assert seconds < 1.0, f"promote took {seconds:.2f} s"
    assert "must not be running" in done.stderr, "it warns that the old primary must not be running"
    assert b.status()["role"] == "primary"
    with b.client() as client:
        history.assert_on(client)

    # Life goes on, elsewhere too, before the old primary is back.
    with b.client(timeout_s=2) as client:
        client.pwrite(rng.randbytes(MIB), 100 * MIB)
        client.flush()
    a.serve()
    assert a.status()["role"] == "secondary"
    a.wait_in_step()
    b.wait_in_step()
    resync = b.status()["last_resync"]
    extents_touched = 6000 * 4096 // (4 * MIB) + 1
    # Neighbours that are written in turn may look like a sequential writer, of whom 32 MiB are logged ahead.
    in_the_log = (extents_touched + 8) * 4 * MIB
    assert MIB <= resync["dirty_bytes"] <= in_the_log + 4 * MIB, "only the log's extents and what changed"
    assert resync["sent_bytes"] + resync["skipped_bytes"] <= resync["dirty_bytes"]
    assert_equal_copies(a, b)
    with b.client(timeout_s=2) as client:
        history.assert_on(client)


def test_fio_verifies_after_the_failover(cluster: Cluster) -> None:
    """A second witness beside our own log: what fio wrote on the old primary, fio verifies on the new one."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(PROMOTED)
    job = ("--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=16m", "--verify=crc32c", "--randseed=7")
    fio(a.uri, *job, "--do_verify=0")
    a.kill()
    b.promote()
    fio(b.uri, *job, "--verify_only=1")


def test_failback(cluster: Cluster, rng: random.Random) -> None:
    """Over and back again: each promotion continues one history."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(PROMOTED)
    history = new_history(rng)
    primary, secondary = a, b
    generations = {a.status()["generation"]}
    for run in range(1, 4):
        writer = Writer(primary, history, run, depth=8, blocks=1000, flush_every=100)
        cluster.at_end(writer.close)
        writer.wait_answers(rng.randint(100, 500))
        primary.kill()
        writer.ended_by_loss()
        secondary.promote()
        with secondary.client() as client:
            history.assert_on(client)
            client.pwrite(rng.randbytes(4096), 8000 * 4096)
        generations.add(secondary.status()["generation"])
        primary.serve()
        primary.wait_in_step()
        primary, secondary = secondary, primary
    assert len(generations) == 4, "each promotion begins a new generation"
    assert_equal_copies(a, b)


def test_promote_of_the_primary_of_a_living_peer_is_refused(cluster: Cluster) -> None:
    _, b = cluster.pair()
    refused = b.promote(check=False)
    assert refused.returncode == 1
    assert "primary" in refused.stderr
    assert b.status()["role"] == "secondary"


def test_promote_of_an_inconsistent_replica_is_refused_even_by_force(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    a.allow(PEER_LOST)
    b.allow("inconsistent|" + PROMOTED)
    b.stop()
    b.command("invalidate")
    assert b.status()["disk"] == "Inconsistent"
    a.stop()
    b.serve()
    for options in ((), ("--force",)):
        refused = b.promote(*options, check=False)
        assert refused.returncode == 1
        assert "Inconsistent" in refused.stderr
    assert b.status()["role"] == "secondary"


def test_promote_of_an_outdated_replica_needs_force(cluster: Cluster, rng: random.Random) -> None:
    """Told by the primary that it missed something, cut off again before it could catch up."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(PROMOTED, "outdated")
    a.command("disconnect")
    b.wait_status(disk="Outdated")
    refused = b.promote(check=False)
    assert refused.returncode == 1
    assert "Outdated" in refused.stderr
    assert "--force" in refused.stderr
    a.stop()
    b.promote("--force")
    assert b.wait_status(role="primary")["warnings"]


def test_promote_says_when_nothing_serves(cluster: Cluster) -> None:
    a, _ = cluster.created_pair()
    refused = a.promote(check=False)
    assert refused.returncode == 1
    assert "serve" in refused.stderr


def test_a_frozen_primary_that_wakes_up_is_not_believed(cluster: Cluster, rng: random.Random) -> None:
    """SIGSTOP, promotion of the other one, SIGCONT: the copies never differ silently."""
    a, b = cluster.pair(peer_timeout_s=1.0)
    for replica in (a, b):
        replica.allow(PROMOTED, CLIENT_GONE, "split.brain|discard|primary")
    history = new_history(rng)
    writer = Writer(a, history, depth=4, blocks=1000)
    cluster.at_end(writer.close)
    writer.wait_answers(200)
    a.freeze()
    b.wait_status(connection="Connecting")
    b.promote()
    with b.client() as client:
        client.pwrite(rng.randbytes(4096), 5000 * 4096)
    writer.kill()
    a.thaw()
    a.wait_log("split.brain")
    b.wait_log("split.brain")
    assert a.status()["connection"] not in ("Connected", "SyncSource", "SyncTarget")

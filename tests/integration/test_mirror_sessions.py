"""Many sessions one after the other, and ends in awkward moments: nothing is left behind, nothing hangs."""

import os
import random
import signal
import time

from tests.integration.clients import Writer, new_history
from tests.integration.cluster import CLIENT_GONE, PEER_LOST, UNANSWERED, Cluster, Replica, assert_equal_copies
from tests.integration.processes import signal_quietly, wait_for, wait_gone

MIB = 1 << 20


def descriptors_and_threads(replica: Replica) -> tuple[int, int]:
    process = f"/proc/{replica.nbdkit_pid}"
    return len(os.listdir(f"{process}/fd")), len(os.listdir(f"{process}/task"))


def test_many_sessions_leave_nothing_behind(cluster: Cluster) -> None:
    a, b = cluster.pair()
    before = None
    for _ in range(6):
        a.command("disconnect")
        a.command("connect")
        a.wait_in_step()
        b.wait_in_step()
        before = before or [descriptors_and_threads(replica) for replica in (a, b)]

    def as_before() -> bool:
        now = [descriptors_and_threads(replica) for replica in (a, b)]
        return all(
            one <= other + 2
            for was, is_ in zip(before or [], now, strict=True)
            for other, one in zip(was, is_, strict=True)
        )

    wait_for(as_before, 5.0, "descriptors and threads of former sessions to be gone")


def test_a_stop_does_not_wait_for_a_peer_that_is_not_there(cluster: Cluster) -> None:
    """Its packets vanish: nobody refuses, nobody answers. A stop is in order all the same."""
    network = cluster.network()
    a, _ = cluster.created_pair(network=network, peer_timeout_s=30.0, wait_for_peer_s=0.5)
    network.swallow(0, 1)
    a.allow("did not answer|alone")
    a.serve("--primary")
    with a.client() as client:
        client.pwrite(b"x" * 4096, 0)
    assert a.stop() <= 5.0
    assert "stopped, clean" in a.log()


def test_promotion_does_not_wait_for_a_peer_that_is_not_there(cluster: Cluster, rng: random.Random) -> None:
    """The primary's host is gone with its packets: once the loss is seen, a promotion takes less than a second."""
    network = cluster.network()
    a, b = cluster.pair(network=network)
    for replica in (a, b):
        replica.allow(PEER_LOST, "promot|split brain")
    network.cut(0)
    b.wait_status(connection="Connecting")
    a.kill()
    begin = time.monotonic()
    b.promote()
    assert time.monotonic() - begin < 1.0
    with b.client() as client:
        client.pwrite(rng.randbytes(4096), 0)
    network.heal(0)
    a.serve()
    assert a.wait_in_step()["role"] == "secondary"
    assert_equal_copies(a, b)


def test_the_parent_of_the_primary_dies_alone(cluster: Cluster, rng: random.Random) -> None:
    """kill -9 of `serve` only: its nbdkit ends too, by itself and in order, and the peer can be promoted at once."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(PEER_LOST, UNANSWERED, CLIENT_GONE, "promot|not clean")
    history = new_history(rng)
    writer = Writer(a, history, depth=8, blocks=2000, flush_every=100)
    cluster.at_end(writer.close)
    writer.wait_answers(200)
    nbdkit = a.nbdkit_pid
    signal_quietly(a.pid, signal.SIGKILL)
    b.promote()
    writer.ended_by_loss()
    assert not history.errors
    with b.client() as client:
        history.assert_on(client)
    assert a.process is not None
    a.process.wait(5)
    wait_gone(nbdkit, 5.0)
    a.serve()
    assert a.wait_in_step()["role"] == "secondary"
    b.wait_in_step()
    assert_equal_copies(a, b)


def test_a_stop_in_the_middle_of_a_resync(cluster: Cluster, rng: random.Random) -> None:
    """On either side; the resync goes on afterwards."""
    a, b = cluster.pair(size="256M")
    for replica in (a, b):
        replica.allow(PEER_LOST)
    b.kill()
    with a.client() as client:
        for offset in range(0, 192, 16):
            client.pwrite(rng.randbytes(16 * MIB), offset * MIB)
    for victim in (b, a):
        if not b.running:
            b.serve()
        a.wait_status(resync=lambda resync: resync and resync["done_bytes"] > 0)
        victim.stop()
        assert "stopped, clean" in victim.log()
    a.serve()
    b.wait_in_step(30)
    a.wait_in_step(30)
    assert_equal_copies(a, b)

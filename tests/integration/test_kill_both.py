"""Both replicas killed at once, both back: they agree without the operator."""

import random

import pytest

from tests.integration.clients import Writer, new_history
from tests.integration.cluster import PEER_LOST, Cluster, assert_equal_copies


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
@pytest.mark.parametrize("promoted", ["old primary", "old secondary"])
def test_both_killed_then_both_back(cluster: Cluster, rng: random.Random, protocol: str, promoted: str) -> None:
    a, b = cluster.pair(size="128M", protocol=protocol)
    for replica in (a, b):
        replica.allow(PEER_LOST, "crash|promot|log")
    history = new_history(rng)
    writer = Writer(a, history, depth=16, blocks=3000, blocks_max=2, zeroes=0.05, flush_every=80)
    cluster.at_end(writer.close)
    writer.wait_answers(rng.randint(500, 1500))
    cluster.kill_together(a, b)
    writer.ended_by_loss()

    first, second = (a, b) if rng.random() < 0.5 else (b, a)
    first.serve()
    second.serve()
    for replica in (a, b):
        assert replica.wait_in_step()["role"] == "secondary"
    assert_equal_copies(a, b)
    chosen = a if promoted == "old primary" else b
    chosen.promote()
    # Every process died, no page cache did: under C both had written what was acknowledged.
    if protocol != "C":
        history.forget_unflushed()
    with chosen.client() as client:
        history.assert_on(client)
    a.wait_in_step()
    assert_equal_copies(a, b)


def test_both_killed_again_before_they_agreed(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair(size="128M")
    for replica in (a, b):
        replica.allow(PEER_LOST, "crash|promot|log")
    history = new_history(rng)
    writer = Writer(a, history, depth=16, blocks=20000, flush_every=80)
    cluster.at_end(writer.close)
    writer.wait_answers(1000)
    cluster.kill_together(a, b)
    writer.ended_by_loss()
    for _ in range(3):
        a.launch()
        b.launch()
        a.wait_ready()
        b.wait_ready()
        cluster.kill_together(a, b)
    a.serve()
    b.serve()
    a.wait_in_step()
    b.wait_in_step()
    assert_equal_copies(a, b)
    b.promote()
    with b.client() as client:
        history.assert_on(client)


def test_both_killed_and_one_is_started_as_primary(cluster: Cluster, rng: random.Random) -> None:
    """Whichever it is and whoever is first: it has or gets what the newer one has."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(PEER_LOST, "crash|promot|log")
    history = new_history(rng)
    for run in (1, 2):
        writer = Writer(a, history, run, depth=16, blocks=8000, flush_every=50)
        cluster.at_end(writer.close)
        writer.wait_answers(rng.randint(50, 400))
        cluster.kill_together(a, b)
        writer.ended_by_loss()
        primary, secondary = rng.sample([a, b], 2)
        for replica in rng.sample([a, b], 2):
            replica.launch(*(("--primary",) if replica is primary else ()))
        primary.wait_ready()
        secondary.wait_ready()
        primary.wait_in_step()
        secondary.wait_in_step()
        with primary.client(timeout_s=5) as client:
            history.assert_on(client)
        assert_equal_copies(a, b)
        a, b = primary, secondary


def test_one_comes_back_alone_and_is_promoted(cluster: Cluster, rng: random.Random) -> None:
    """Both dead, the old secondary is the only one that returns: the operator may take it, and the other follows."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(PEER_LOST, "crash|promot|log|primary")
    history = new_history(rng)
    writer = Writer(a, history, depth=8, blocks=2000, flush_every=50)
    cluster.at_end(writer.close)
    writer.wait_answers(500)
    cluster.kill_together(a, b)
    writer.ended_by_loss()
    b.serve()
    b.promote()
    with b.client() as client:
        history.assert_on(client)
        client.pwrite(rng.randbytes(4096), 9000 * 4096)
    a.serve()
    assert a.wait_in_step(30)["role"] == "secondary"
    assert b.status()["role"] == "primary"
    assert_equal_copies(a, b)


def test_the_secondary_alone_has_cold_writes_that_were_answered_just_before(
    cluster: Cluster, rng: random.Random
) -> None:
    """The last ones were parked: each is of another extent, and nothing came after them."""
    a, b = cluster.pair(size="256M")
    for replica in (a, b):
        replica.allow(PEER_LOST, "crash|promot|log|parked")
    extents = rng.sample(range(64), 12)
    written = {extent * (4 << 20) + rng.randrange(1024) * 4096: rng.randbytes(4096) for extent in extents}
    with a.client() as client:
        for offset, content in written.items():
            client.pwrite(content, offset)
        cluster.kill_together(a, b)
    b.serve()
    b.promote()
    with b.client() as client:
        assert [offset for offset, content in written.items() if bytes(client.pread(4096, offset)) != content] == []

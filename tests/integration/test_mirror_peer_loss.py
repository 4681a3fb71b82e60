"""The peer goes away in three ways, writes go on, and it comes back with only what it missed."""

import random

import pytest

from tests.integration.clients import Writer, new_history
from tests.integration.cluster import PEER_LOST, Cluster, Replica, assert_equal_copies
from tests.integration.network import Network

MIB = 1 << 20
PEER_TIMEOUT_S = 2.0
# What two busy cores may add to the time that the product answers for.
SCHEDULING_S = 0.6


def lose(replica: Replica, how: str, network: Network | None) -> None:
    if how == "kill":
        replica.kill()
    elif how == "freeze":
        replica.freeze()
    else:
        assert network is not None
        network.cut(1)


def bring_back(replica: Replica, how: str, network: Network | None) -> None:
    if how == "kill":
        replica.serve()
    elif how == "freeze":
        replica.thaw()
    else:
        assert network is not None
        network.heal(1)


@pytest.mark.parametrize(
    ("how", "protocol"),
    [
        *(("kill", "A"), ("kill", "B"), ("kill", "C"), ("freeze", "C"), ("cut", "C")),
        *(pytest.param(how, protocol, marks=pytest.mark.long) for how in ("freeze", "cut") for protocol in "AB"),
    ],
)
def test_no_write_fails_and_the_stall_is_bounded(
    cluster: Cluster, rng: random.Random, how: str, protocol: str, request: pytest.FixtureRequest
) -> None:
    network = cluster.network() if how == "cut" else None
    a, b = cluster.pair(network=network, protocol=protocol)
    a.allow(PEER_LOST)
    b.allow(PEER_LOST)
    history = new_history(rng)
    writer = Writer(a, history, depth=rng.choice([1, 16]), blocks=4096, blocks_max=4, flush_every=200, zeroes=0.05)
    cluster.at_end(writer.close)
    writer.wait_answers(rng.randint(200, 600))
    lose(b, how, network)
    writer.wait_answers(1500)
    status = a.status()
    writer.stop()

    assert not history.errors, f"writes failed: {history.errors[:3]}"
    assert history.longest_s() <= PEER_TIMEOUT_S + SCHEDULING_S
    assert status["connection"] not in ("Connected", "SyncSource")
    assert status["dirty_bytes"] > 0
    assert any("redundan" in sentence.lower() for sentence in status["warnings"]), status["warnings"]

    bring_back(b, how, network)
    a.wait_in_step()
    b.wait_in_step()
    resync = a.status()["last_resync"]
    assert 0 < resync["dirty_bytes"] <= len(history.touched_blocks()) * 4096
    assert resync["seconds"] >= 0
    assert a.status()["warnings"] == []
    assert_equal_copies(a, b)
    history.assert_in_file(b.data_path)


def test_writes_go_on_during_the_resync(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair(size="128M")
    a.allow(PEER_LOST)
    history = new_history(rng)
    b.kill()
    with a.client() as client:
        for offset in range(64, 128, 4):
            client.pwrite(rng.randbytes(4 * MIB), offset * MIB)
    writer = Writer(a, history, depth=4, blocks=2048, zeroes=0.05, reads=0.2)
    cluster.at_end(writer.close)
    writer.wait_answers(500)
    b.serve()
    b.wait_in_step()
    writer.wait_answers(200)
    writer.stop()
    assert not history.errors
    assert a.status()["last_resync"]["dirty_bytes"] >= 64 * MIB
    assert_equal_copies(a, b)
    history.assert_in_file(b.data_path)


def test_a_capped_resync_keeps_to_it_says_so_and_ends_with_its_session(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair(size="96M", resync_rate="8M")
    a.allow(PEER_LOST)
    b.kill()
    with a.client() as client:
        for offset in range(0, 64, 8):
            client.pwrite(rng.randbytes(8 * MIB), offset * MIB)
    b.serve()
    status = a.wait_status(connection="SyncSource", resync=lambda resync: resync and resync["done_bytes"] > 4 * MIB)
    limit = status["resync"]["limit"]
    assert limit["bytes_per_s_max"] == 8 * MIB
    assert "at most 8 MiB/s" in a.command("status").stdout
    assert b.status()["resync"]["limit"] is None
    # 64 MiB take 8 s: nobody waits for that.
    a.command("disconnect", timeout_s=4)
    assert a.status()["dirty_bytes"] > 8 * MIB


def test_resync_sends_only_what_is_missing(cluster: Cluster, rng: random.Random) -> None:
    """Three new blocks, a zeroed MiB and a MiB written again with what it held: only the three blocks travel."""
    a, b = cluster.pair()
    a.allow(PEER_LOST)
    whole = rng.randbytes(16 * MIB)
    with a.client() as client:
        client.pwrite(whole, 0)
        client.flush()
        b.kill()
        for block in (5, 700, 2000):
            client.pwrite(rng.randbytes(4096), block * 4096)
        client.zero(MIB, 12 * MIB)
        client.pwrite(whole[14 * MIB : 15 * MIB], 14 * MIB)
        client.flush()
        blocks = 3 + 256 + 256
        assert a.wait_status(dirty_bytes=blocks * 4096)["connection"] == "Connecting"
        b.serve()
        a.wait_in_step()
        b.wait_in_step()
    resync = a.status()["last_resync"]
    assert resync["dirty_bytes"] == blocks * 4096
    assert resync["skipped_bytes"] == (256 + 256) * 4096
    assert 0 < resync["sent_bytes"] < 64 * 1024
    assert resync["started"].startswith("20")
    assert_equal_copies(a, b)


def test_blocks_that_the_peer_may_have_forgotten_are_dirty(cluster: Cluster, rng: random.Random) -> None:
    """Written on both, never flushed, then the peer crashes: it may have lost them (invariant unstable-is-dirty)."""
    a, b = cluster.pair()
    a.allow(PEER_LOST)
    with a.client() as client:
        client.pwrite(rng.randbytes(8 * 4096), 0)
        client.flush()
        client.pwrite(rng.randbytes(8 * 4096), MIB)
        b.kill()
        status = a.wait_status(connection="Connecting")
        assert status["dirty_bytes"] == 8 * 4096


def test_resync_starts_again_after_an_interruption(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair(size="256M")
    a.allow(PEER_LOST)
    b.allow(PEER_LOST)
    b.kill()
    with a.client() as client:
        for offset in range(0, 192, 16):
            client.pwrite(rng.randbytes(16 * MIB), offset * MIB)
        for _ in range(2):
            b.serve()
            a.wait_status(resync=lambda resync: resync and resync["done_bytes"] > 0)
            b.kill()
            assert b.status()["disk"] == "Inconsistent"
        refused = b.serve().promote(check=False)
        if refused.returncode:
            assert "Inconsistent" in refused.stderr
        a.wait_in_step(30)
    b.wait_in_step()
    assert_equal_copies(a, b)


def test_a_peer_that_flaps_leaves_equal_copies(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    a.allow(PEER_LOST)
    b.allow(PEER_LOST)
    history = new_history(rng)
    writer = Writer(a, history, depth=8, blocks=2048, blocks_max=4, zeroes=0.1)
    cluster.at_end(writer.close)
    for _ in range(3):
        writer.wait_answers(rng.randint(50, 400))
        b.kill()
        writer.wait_answers(rng.randint(50, 400))
        b.serve()
    b.wait_in_step()
    writer.stop()
    a.wait_in_step()
    assert not history.errors
    assert_equal_copies(a, b)
    history.assert_in_file(b.data_path)


PROTOCOLS = ["C", pytest.param("A", marks=pytest.mark.long), pytest.param("B", marks=pytest.mark.long)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_link_that_flaps(cluster: Cluster, rng: random.Random, protocol: str) -> None:
    """Cut on either side for a while that is shorter or longer than the timeout, again and again."""
    network = cluster.network()
    a, b = cluster.pair(network=network, protocol=protocol, peer_timeout_s=0.6)
    for replica in (a, b):
        replica.allow(PEER_LOST)
    history = new_history(rng)
    writer = Writer(a, history, depth=16, blocks=2000, flush_every=50, zeroes=0.1, reads=0.1)
    cluster.at_end(writer.close)
    for _ in range(4):
        writer.wait_answers(rng.randint(50, 400))
        node = rng.choice([0, 1])
        network.cut(node)
        if rng.random() < 0.5:
            writer.wait_answers(16 + rng.randint(1, 400))
        network.heal(node)
        writer.wait_answers(rng.randint(16, 800))
    writer.stop()
    assert not history.errors
    a.wait_in_step()
    b.wait_in_step()
    assert_equal_copies(a, b)
    history.assert_in_file(b.data_path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_primary_stands_still_and_wakes_up(cluster: Cluster, rng: random.Random, protocol: str) -> None:
    """Nobody was promoted meanwhile: it goes on, and no client sees more than a pause."""
    a, b = cluster.pair(protocol=protocol, peer_timeout_s=1.0)
    for replica in (a, b):
        replica.allow(PEER_LOST)
    history = new_history(rng)
    writer = Writer(a, history, depth=16, blocks=2000, flush_every=50, zeroes=0.1, reads=0.1)
    cluster.at_end(writer.close)
    for _ in range(2):
        writer.wait_answers(rng.randint(50, 400))
        a.freeze()
        b.wait_status(connection="Connecting")
        a.thaw()
        writer.wait_answers(100)
    writer.stop()
    assert not history.errors
    a.wait_in_step()
    b.wait_in_step()
    assert_equal_copies(a, b)
    history.assert_in_file(b.data_path)


def test_disconnect_and_connect(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    a.allow(PEER_LOST)
    b.allow(PEER_LOST)
    a.command("disconnect")
    assert a.wait_status(connection="Standalone")["role"] == "primary"
    with a.client() as client:
        client.pwrite(rng.randbytes(MIB), MIB)
    assert a.status()["dirty_bytes"] == MIB
    a.command("connect")
    a.wait_in_step()
    b.wait_in_step()
    assert a.status()["last_resync"]["dirty_bytes"] == MIB
    assert_equal_copies(a, b)

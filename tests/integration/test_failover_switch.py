"""Planned changes of role: switch with data under way, demote, and a stop that doesn't wait for a silent peer."""

import random

import pytest

from tests.integration.clients import Writer, new_history
from tests.integration.cluster import CLIENT_GONE, PEER_LOST, UNANSWERED, Cluster, assert_equal_copies


@pytest.mark.parametrize("protocol", ["C", pytest.param("A", marks=pytest.mark.long)])
def test_switch_with_data_under_way(cluster: Cluster, rng: random.Random, protocol: str) -> None:
    a, b = cluster.pair(protocol=protocol)
    for replica in (a, b):
        replica.allow(UNANSWERED, CLIENT_GONE)
    history = new_history(rng)
    primary, secondary = a, b
    for run in range(1, 4):
        writer = Writer(primary, history, run, depth=16, blocks=2000, flush_every=100, zeroes=0.1)
        cluster.at_end(writer.close)
        writer.wait_answers(rng.randint(100, 500))
        primary.command("switch")
        assert primary.status()["role"] == "secondary"
        assert secondary.status()["role"] == "primary"
        # Held requests get no answer, their connections are cut: no client ever sees an error.
        writer.ended_by_loss()
        assert not history.errors
        with secondary.client() as client:
            history.assert_on(client)
        primary, secondary = secondary, primary
    a.wait_in_step()
    b.wait_in_step()
    assert a.status()["last_resync"] is None, "a planned switch needs no resync"
    assert_equal_copies(a, b)


def test_switch_after_both_were_killed(cluster: Cluster) -> None:
    """Nobody was primary when they met again; the one that was brought up is promoted, and hands over at once."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(PEER_LOST, "crash")
    with a.client() as client:
        client.pwrite(b"x" * 4096, 0)
    cluster.kill_together(a, b)
    a.serve()
    b.serve()
    a.wait_in_step()
    b.wait_in_step()
    b.promote()
    b.command("switch")
    assert a.wait_status(role="primary")["peer"]["role"] == "secondary"


def test_switch_needs_the_peer(cluster: Cluster) -> None:
    a, b = cluster.pair()
    a.allow(PEER_LOST)
    b.stop()
    refused = a.command("switch", check=False)
    assert refused.returncode == 1
    assert "not connected" in refused.stderr
    assert a.status()["role"] == "primary"


def test_demote_is_refused_while_a_client_is_connected(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    a.allow(UNANSWERED, CLIENT_GONE)
    b.allow("promot")
    history = new_history(rng)
    writer = Writer(a, history, depth=4, blocks=1000)
    cluster.at_end(writer.close)
    writer.wait_answers(50)
    refused = a.demote(check=False)
    assert refused.returncode == 1
    assert "client" in refused.stderr
    assert "--force" in refused.stderr
    writer.wait_answers(50)

    a.demote("--force")
    writer.ended_by_loss()
    assert not history.errors, "the connection is cut, no request gets an error"
    assert a.status()["role"] == b.status()["role"] == "secondary"
    assert a.wait_in_step()
    b.promote()
    with b.client() as client:
        history.assert_on(client)
    assert_equal_copies(a, b)


def test_demote_and_promote_the_same_replica(cluster: Cluster) -> None:
    a, b = cluster.pair()
    a.demote()
    a.promote()
    assert a.wait_in_step()["role"] == "primary"
    assert b.wait_in_step()["last_resync"] is None


def test_sigterm_ends_within_five_seconds_while_writes_wait(cluster: Cluster, rng: random.Random) -> None:
    """The peer hangs and its timeout is far away: the waiting writes stay unanswered, the connections are cut."""
    a, b = cluster.pair(peer_timeout_s=60.0)
    for replica in (a, b):
        replica.allow(PEER_LOST, UNANSWERED, CLIENT_GONE, "not clean")
    history = new_history(rng)
    writer = Writer(a, history, depth=16, blocks=1000, flush_every=100)
    cluster.at_end(writer.close)
    writer.wait_answers(300)
    b.freeze()
    writer.wait_stalled(depth=16)
    assert a.stop(timeout_s=5.0) <= 5.0
    a.wait_log("stopped, not clean")
    writer.ended_by_loss()
    assert not history.errors, "nothing was answered with an error"

    b.thaw()
    a.serve()
    a.wait_in_step(30)
    b.wait_in_step(30)
    a.promote()
    with a.client() as client:
        history.assert_on(client)
    assert_equal_copies(a, b)


def test_sigterm_to_both_at_once_under_load(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(PEER_LOST, UNANSWERED, CLIENT_GONE)
    history = new_history(rng)
    writer = Writer(a, history, depth=16, blocks=1000, flush_every=100)
    cluster.at_end(writer.close)
    writer.wait_answers(300)
    b.terminate()
    a.stop()
    b.stop()
    writer.ended_by_loss()
    assert not history.errors
    a.serve()
    b.serve()
    a.wait_in_step()
    b.wait_in_step()
    assert_equal_copies(a, b)
    b.promote()
    with b.client() as client:
        history.assert_on(client)


def test_sigterm_ends_cleanly_under_load(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    b.allow(PEER_LOST)
    a.allow(UNANSWERED, CLIENT_GONE)
    history = new_history(rng)
    writer = Writer(a, history, depth=16, blocks=1000, flush_every=100)
    cluster.at_end(writer.close)
    writer.wait_answers(300)
    assert a.stop() <= 5.0
    writer.ended_by_loss()
    assert not history.errors
    a.serve()
    a.wait_in_step()
    b.wait_in_step()
    assert_equal_copies(a, b)
    b.promote()
    with b.client() as client:
        history.assert_on(client)

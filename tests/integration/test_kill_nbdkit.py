"""nbdkit alone dies: its parent starts it again within half a second, in its old role where nothing moved on."""

import random
import re
import signal
import time
from typing import Any

import pytest

from tests.integration.clients import Writer, new_history
from tests.integration.cluster import PEER_LOST, Cluster, Replica, assert_equal_copies
from tests.integration.processes import free_port, signal_quietly, wait_for, wait_gone

NBDKIT_DIED = PEER_LOST + "|nbdkit|died|restart|started again|crash|signal"
SCHEDULING_S = 0.25


def wait_new_nbdkit(replica: Replica, old: int) -> float:
    """Seconds until another nbdkit runs."""
    begin = time.monotonic()
    wait_for(lambda: [pid for pid in replica.nbdkit_pids() if pid != old], 5.0, "another nbdkit")
    return time.monotonic() - begin


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_standalone_volume_comes_back_as_primary(
    cluster: Cluster, rng: random.Random, number: signal.Signals
) -> None:
    a = cluster.standalone().serve()
    a.allow(NBDKIT_DIED, "Fatal Python error: Segmentation fault")
    history = new_history(rng)
    writer = Writer(a, history, depth=16, blocks=2000, flush_every=100)
    cluster.at_end(writer.close)
    writer.wait_answers(rng.randint(100, 500))
    old = a.nbdkit_pid
    signal_quietly(old, number)
    assert wait_new_nbdkit(a, old) < 0.5 + SCHEDULING_S
    writer.ended_by_loss()
    assert a.wait_status(role="primary")["disk"] == "UpToDate"
    with a.client(timeout_s=5) as client:
        history.assert_on(client)


@pytest.mark.parametrize("protocol", ["A", "C"])
def test_the_primary_takes_up_its_role_again(cluster: Cluster, rng: random.Random, protocol: str) -> None:
    a, b = cluster.pair(protocol=protocol)
    for replica in (a, b):
        replica.allow(NBDKIT_DIED)
    history = new_history(rng)
    for run in (1, 2):
        writer = Writer(a, history, run, depth=16, blocks=2000, flush_every=100)
        cluster.at_end(writer.close)
        writer.wait_answers(rng.randint(100, 500))
        old = a.kill_nbdkit()
        assert wait_new_nbdkit(a, old) < 0.5 + SCHEDULING_S
        writer.ended_by_loss()
        a.wait_status(role="primary")
        with a.client(timeout_s=5) as client:
            history.assert_on(client)
    a.wait_in_step()
    b.wait_in_step()
    assert_equal_copies(a, b)


def test_the_secondary_comes_back_and_catches_up(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(NBDKIT_DIED)
    history = new_history(rng)
    writer = Writer(a, history, depth=8, blocks=2000, flush_every=100)
    cluster.at_end(writer.close)
    writer.wait_answers(200)
    old = b.kill_nbdkit()
    wait_new_nbdkit(b, old)
    b.wait_in_step()
    writer.wait_answers(200)
    writer.stop()
    assert not history.errors
    a.wait_in_step()
    assert b.status()["role"] == "secondary"
    assert_equal_copies(a, b)
    history.assert_in_file(b.data_path)


def test_both_nbdkits_die_at_once(cluster: Cluster, rng: random.Random) -> None:
    """Both parents are left, and each has proof that nothing was forgotten."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(NBDKIT_DIED)
    history = new_history(rng)
    writer = Writer(a, history, depth=16, blocks=2000, flush_every=50)
    cluster.at_end(writer.close)
    writer.wait_answers(rng.randint(50, 400))
    for pid in (a.nbdkit_pid, b.nbdkit_pid):
        signal_quietly(pid, signal.SIGKILL)
    writer.ended_by_loss()
    a.wait_status(role="primary")
    with a.client(timeout_s=5) as client:
        history.assert_on(client)
    a.wait_in_step()
    b.wait_in_step()
    assert_equal_copies(a, b)


def test_the_primary_does_not_take_up_its_role_when_the_peer_was_promoted(cluster: Cluster, rng: random.Random) -> None:
    """The parent is held while nbdkit dies; meanwhile the peer moves on: the old one must come back as secondary."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(NBDKIT_DIED, "promot|primary")
    with a.client() as client:
        client.pwrite(rng.randbytes(4096), 0)
        old = a.nbdkit_pid
        signal_quietly(a.pid, signal.SIGSTOP)
        signal_quietly(old, signal.SIGKILL)
        b.wait_status(connection="Connecting")
        b.promote()
    with b.client() as client:
        client.pwrite(rng.randbytes(4096), 4096)
    signal_quietly(a.pid, signal.SIGCONT)
    wait_new_nbdkit(a, old)
    a.wait_in_step()
    assert a.status()["role"] == "secondary"
    assert b.status()["role"] == "primary"
    assert_equal_copies(a, b)


def test_the_parent_dies_alone(cluster: Cluster) -> None:
    """nbdkit must not go on without its parent: it stops in order, and another serve can start."""
    a = cluster.standalone().serve()
    with a.client() as client:
        client.pwrite(b"kept" + bytes(508), 0)
    nbdkit = a.nbdkit_pid
    signal_quietly(a.pid, signal.SIGKILL)
    assert a.process is not None
    a.process.wait(5)
    wait_gone(nbdkit, 5.0)
    a.serve()
    with a.client(timeout_s=2) as client:
        assert bytes(client.pread(4, 0)) == b"kept"


def wait_started_again(replica: Replica) -> dict[str, Any]:
    """Kill nbdkit, and wait until another one has decided what it is."""

    def starts() -> int:
        return len(re.findall("primary, serving NBD clients|secondary, ready", replica.log()))

    before = starts()
    wait_new_nbdkit(replica, replica.kill_nbdkit())
    wait_for(lambda: starts() > before, 15.0, "its start")
    return replica.status()


def test_a_role_that_was_given_up_does_not_come_back(cluster: Cluster, rng: random.Random) -> None:
    """It crashed as primary and resumed while its peer was away: that is remembered until they meet, also demoted."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(NBDKIT_DIED, "promot|primary")
    b.stop()
    with a.client() as client:
        client.pwrite(rng.randbytes(4096), 0)
    assert wait_started_again(a)["role"] == "primary"
    a.demote("--force")
    assert wait_started_again(a)["role"] == "secondary"
    # Not for good either: what it became since is what it is again.
    a.promote()
    assert wait_started_again(a)["role"] == "primary"


def test_a_start_as_secondary_is_not_undone_by_a_death(cluster: Cluster, rng: random.Random) -> None:
    """The peer was promoted after a crash of the primary's node, and can't be reached: there must be no second one."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(NBDKIT_DIED, "promot|primary")
    b.kill()
    with a.client() as client:
        client.pwrite(rng.randbytes(4096), 0)
    a.kill()
    for replica in (a, b):
        replica.configure(peer=f"tcp://127.0.0.1:{free_port()}")
    b.serve()
    b.promote()
    a.serve()
    assert a.status()["role"] == "secondary"
    assert wait_started_again(a)["role"] == "secondary"
    assert b.status()["role"] == "primary"

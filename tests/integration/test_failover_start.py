"""What role a replica takes when it starts, and what it refuses."""

import random
import socket
import time
from pathlib import Path

import nbd
import pytest

from tests.integration.cluster import PEER_LOST, Cluster, assert_equal_copies
from tests.integration.processes import free_port, run

ALONE = PEER_LOST + "|no answer|alone"


def test_a_standalone_volume_comes_up_as_primary(cluster: Cluster) -> None:
    status = cluster.standalone().serve().status()
    assert status["role"] == "primary"
    assert status["connection"] == "Standalone"
    assert status["peer"] == {"address": None, "role": None, "disk": None}


def test_a_replica_with_a_peer_comes_up_as_secondary(cluster: Cluster) -> None:
    a, b = cluster.created_pair()
    a.serve()
    b.serve()
    assert a.wait_in_step()["role"] == b.wait_in_step()["role"] == "secondary"
    b.promote()
    assert a.wait_status(peer__role="primary")["role"] == "secondary"


def test_primary_is_refused_when_the_peer_is_primary(cluster: Cluster) -> None:
    a, b = cluster.pair()
    a.allow(PEER_LOST)
    b.stop()
    said = b.serve_fails("--primary").stderr
    assert "primary" in said
    assert a.listen.removeprefix("tcp://") in said, "it names the one that is primary"
    b.serve()
    a.wait_in_step()


def test_primary_is_refused_when_the_peer_is_newer(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    a.allow(PEER_LOST)
    b.stop()
    with a.client() as client:
        client.pwrite(rng.randbytes(4096), 0)
    a.demote()
    said = b.serve_fails("--primary").stderr
    assert "newer" in said
    b.serve()
    b.wait_in_step()
    assert_equal_copies(a, b)


def test_primary_is_refused_when_inconsistent(cluster: Cluster) -> None:
    a, b = cluster.pair()
    a.allow(PEER_LOST)
    b.stop()
    b.command("invalidate")
    a.stop()
    b.configure(wait_for_peer_s=0.3)
    assert "Inconsistent" in b.serve_fails("--primary").stderr


def test_primary_waits_for_the_peer_and_then_goes_on_with_a_warning(cluster: Cluster) -> None:
    a, b = cluster.pair()
    a.stop()
    b.stop()
    a.configure(wait_for_peer_s=1.5)
    a.allow(ALONE)
    begin = time.monotonic()
    a.serve("--primary")
    assert time.monotonic() - begin >= 1.5
    assert a.status()["role"] == "primary"
    assert a.status()["warnings"]
    assert a.unexpected_lines() == []
    assert "WARNING" in a.log()


def test_primary_of_a_volume_whose_peer_was_never_there(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.created_pair(wait_for_peer_s=0.3)
    a.allow(ALONE)
    a.serve("--primary")
    with a.client() as client:
        client.pwrite(rng.randbytes(1 << 20), 1 << 20)
        b.serve()
        a.wait_in_step()
    b.wait_in_step()
    assert b.status()["role"] == "secondary"
    assert_equal_copies(a, b)


def test_a_second_serve_on_one_directory_names_the_holder(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    begin = time.monotonic()
    said = a.serve_fails().stderr
    assert time.monotonic() - begin < 2.0, "it fails at once"
    assert str(a.pid) in said
    assert a.running
    with a.client() as client:
        client.pwrite(b"x" * 512, 0)


def test_a_second_serve_on_one_backing_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    backing = tmp_path / "disk"
    with backing.open("wb") as file:
        file.truncate(64 << 20)
    a = cluster.standalone("64M", "--backing", backing, directory_name="a").serve()
    b = cluster.standalone("64M", "--backing", backing, directory_name="b")
    said = b.serve_fails().stderr
    assert str(backing) in said
    assert str(a.pid) in said or str(a.nbdkit_pid) in said


@pytest.mark.parametrize("which", ["nbd", "mirror"])
def test_port_in_use(cluster: Cluster, which: str) -> None:
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", free_port()))
        occupant.listen()
        port = occupant.getsockname()[1]
        if which == "nbd":
            said = cluster.standalone().serve_fails("--nbd", f"tcp:127.0.0.1:{port}").stderr
        else:
            replica = cluster.replica("a")
            addresses = ("--listen", f"tcp://127.0.0.1:{port}", "--peer", f"tcp://127.0.0.1:{free_port()}")
            replica.create("64M", *addresses)
            said = replica.serve_fails().stderr
    assert str(port) in said
    assert "in use" in said


def test_addresses_that_are_not_loopback_need_insecure(cluster: Cluster) -> None:
    network = cluster.network()
    a, _ = cluster.created_pair(network=network)
    a.serve_options = ()
    said = a.serve_fails().stderr
    assert "--insecure" in said
    a.serve("--insecure")
    assert a.log().count("WARNING") >= 1
    a.stop()
    a.serve("--insecure")
    assert a.log().count("WARNING") >= 2, "each start says so"


def test_one_client_at_a_time(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    a.allow("refuse|client|exclusive")
    with a.client() as first:
        with a.client() as second:  # the same process may have as many connections as it likes
            second.pwrite(b"2" * 4096, 4096)
        refused = run(["nbdinfo", a.uri], check=False)
        assert refused.returncode != 0, "another process is refused"
        first.pwrite(b"1" * 4096, 0)
        assert bytes(first.pread(4096, 4096)) == b"2" * 4096
    run(["nbdinfo", a.uri])


def test_a_client_that_is_just_leaving_is_waited_for(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    for _ in range(10):
        with a.client() as client:
            client.pwrite(b"x" * 4096, 0)
        run(["nbdinfo", a.uri])


def test_shared_lifts_the_rule(cluster: Cluster) -> None:
    a = cluster.standalone().serve("--shared")
    with a.client() as client:
        client.pwrite(b"x" * 4096, 0)
        run(["nbdinfo", a.uri])


def test_the_volume_over_tcp(cluster: Cluster) -> None:
    port = free_port()
    a = cluster.standalone().serve("--nbd", f"tcp:127.0.0.1:{port}")
    handle = nbd.NBD()
    handle.connect_uri(f"nbd://127.0.0.1:{port}/{a.name}")
    handle.pwrite(b"tcp" + bytes(509), 512)
    assert bytes(handle.pread(3, 512)) == b"tcp"
    handle.shutdown()

"""Strangers on the mirror port, and peers that are not the right ones."""

import contextlib
import os
import random
import socket
from collections.abc import Callable

import pytest

from tests.integration.clients import Writer, new_history
from tests.integration.cluster import PEER_LOST, Cluster, Replica, assert_equal_copies
from tests.integration.processes import free_port, wait_for

MIB = 1 << 20
STRANGER = PEER_LOST + "|turned away"
ZMTP_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)


def address_of(replica: Replica) -> tuple[str, int]:
    host, _, port = replica.listen.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def say(replica: Replica, data: bytes, *, read: bool = True) -> None:
    """Connect to the mirror port, say something, and wait until the other side hangs up or a second is over."""
    with socket.create_connection(address_of(replica), timeout=5) as stranger, contextlib.suppress(OSError):
        stranger.sendall(data)
        stranger.settimeout(1.0)
        while read and stranger.recv(65536):
            pass


GARBAGE: dict[str, Callable[[random.Random], bytes]] = {
    "nothing": lambda rng: b"",
    "one byte": lambda rng: b"\xff",
    "an HTTP request": lambda rng: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20,
    "random bytes": lambda rng: rng.randbytes(100_000),
    "zeroes": lambda rng: bytes(100_000),
    "half a greeting": lambda rng: ZMTP_GREETING[:20],
    "a greeting, then random bytes": lambda rng: ZMTP_GREETING + rng.randbytes(100_000),
    "a greeting, then a huge frame": lambda rng: ZMTP_GREETING + b"\x02" + (1 << 62).to_bytes(8, "big") + bytes(1000),
    "a greeting, then a READY of garbage": lambda rng: ZMTP_GREETING + b"\x04\x20\x05READY" + rng.randbytes(26),
    "a TLS hello": lambda rng: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(508),
}


@pytest.mark.parametrize("who", ["primary", pytest.param("secondary", marks=pytest.mark.long)])
def test_a_strangers_bytes_while_writes_go_on(cluster: Cluster, rng: random.Random, who: str) -> None:
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(STRANGER)
    history = new_history(rng)
    writer = Writer(a, history, depth=4, blocks=1000)
    cluster.at_end(writer.close)
    writer.wait_answers(20)
    victim = a if who == "primary" else b
    for what, make in GARBAGE.items():
        say(victim, make(rng), read=what not in ("nothing", "one byte", "half a greeting"))
        assert victim.running, what
    writer.wait_answers(50)
    writer.stop()
    assert not history.errors
    assert history.longest_s() < 1.0, "no stranger stops the writes"
    a.wait_in_step()
    assert a.status()["last_resync"] is None, "the peers stayed connected all the time"
    assert_equal_copies(a, b)


def test_a_strangers_bytes_before_the_peer_comes(cluster: Cluster, rng: random.Random) -> None:
    """The connections that a stranger opened and keeps open must not keep the right peer out."""
    a, b = cluster.created_pair()
    for replica in (a, b):
        replica.allow(STRANGER)
    a.serve()
    for make in GARBAGE.values():
        say(a, make(rng), read=False)
    with contextlib.ExitStack() as held:
        for _ in range(100):
            held.enter_context(socket.create_connection(address_of(a), timeout=5))
        b.serve()
        a.wait_in_step()
        b.wait_in_step()


@pytest.mark.parametrize("strangers", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_many_strangers_leave_nothing_behind(cluster: Cluster, strangers: int) -> None:
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(STRANGER)

    nbdkit = a.nbdkit_pid

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{nbdkit}/fd"))

    say(a, b"warm up" * 100)
    before = descriptors()
    for _ in range(strangers):
        with socket.create_connection(address_of(a), timeout=5) as stranger:
            stranger.sendall(b"knock")
    wait_for(lambda: descriptors() <= before + 5, 10.0, "descriptors to be closed")
    a.wait_in_step()


def refuse_each_other(a: Replica, b: Replica, *words: str) -> None:
    for replica in (a, b):
        replica.allow(STRANGER, "differ|other volume|another|unrelated|size|name|split")
    b.serve()
    a.serve()
    for word in words:
        a.wait_log(word)
        b.wait_log(word)
    for replica in (a, b):
        status = replica.status()
        assert status["connection"] not in ("Connected", "SyncSource", "SyncTarget")
        assert status["warnings"], "status says why there is no peer"
        assert replica.running


def create_towards_each_other(a: Replica, b: Replica, size_a: str, size_b: str) -> None:
    a.listen, b.listen = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    a.create(size_a, "--listen", a.listen, "--peer", b.listen)
    b.create(size_b, "--listen", b.listen, "--peer", a.listen)


def test_peers_of_different_size(cluster: Cluster) -> None:
    a, b = cluster.replica("a"), cluster.replica("b")
    create_towards_each_other(a, b, "64M", "68M")
    refuse_each_other(a, b, "size")
    for replica in (a, b):
        assert str(64 * MIB) in replica.log() or "64 MiB" in replica.log(), "both sizes are named"
        assert str(68 * MIB) in replica.log() or "68 MiB" in replica.log()


def test_peers_of_different_protocol(cluster: Cluster) -> None:
    a, b = cluster.created_pair()
    b.configure(protocol="A")
    refuse_each_other(a, b, "protocol")
    for replica in (a, b):
        assert "set to protocol" in replica.log()


def test_peers_of_different_name(cluster: Cluster) -> None:
    a, b = cluster.replica("a", "alpha"), cluster.replica("b", "beta")
    create_towards_each_other(a, b, "64M", "64M")
    refuse_each_other(a, b, "alpha", "beta")


def test_replicas_of_different_volumes(cluster: Cluster, rng: random.Random) -> None:
    """Same name and size, but each has met another peer already: the volume's identifier tells."""
    a, _ = cluster.pair()
    with a.client() as client:
        client.pwrite(rng.randbytes(MIB), 0)
    other = Cluster(cluster.directory / "other")
    other.directory.mkdir()
    try:
        c, _ = other.pair()
        with c.client() as client:
            client.pwrite(rng.randbytes(MIB), 0)
        before = c.data_path.read_bytes()
        for owner in (cluster, other):
            for replica in owner.replicas:
                replica.stop()
        a.configure(peer=c.listen)
        c.configure(peer=a.listen)
        refuse_each_other(a, c)
        a.wait_log("volume")
        assert c.data_path.read_bytes() == before
    finally:
        problems = other.close()
    assert not problems


def test_a_replica_that_is_its_own_peer(cluster: Cluster) -> None:
    """Its peer address is its own: it meets itself, or a copy of its directory."""
    a = cluster.replica("a")
    a.allow(STRANGER, "itself|same|own|copy|peer")
    address = f"tcp://127.0.0.1:{free_port()}"
    done = a.create("64M", "--listen", address, "--peer", f"tcp://127.0.0.1:{free_port()}")
    assert done.returncode == 0
    a.configure(listen=address, peer=address)
    a.launch()
    wait_for(lambda: not a.running or "WARNING" in a.log() or "ERROR" in a.log(), 10.0, "it to say so")
    assert "Traceback" not in a.log()
    if a.running:
        a.wait_ready()
        assert a.status()["connection"] != "Connected"
    else:
        assert a.process is not None
        assert a.process.returncode == 1
        a.process = None

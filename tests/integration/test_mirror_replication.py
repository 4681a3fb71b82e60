"""Two fresh replicas adopt each other, and every kind of request reaches both."""

import random
from pathlib import Path

import nbd
import pytest

from tests.integration.clients import Writer, fio, new_history
from tests.integration.cluster import Cluster, Replica, assert_equal_copies

MIB = 1 << 20


def allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_fresh_replicas_adopt_each_other_without_a_sync(cluster: Cluster) -> None:
    a, b = cluster.pair()
    for replica, role in ((a, "primary"), (b, "secondary")):
        status = replica.status()
        assert status["serving"] is True
        assert status["role"] == role
        assert status["size"] == 64 * MIB
        assert status["last_resync"] is None
        assert status["resync"] is None
        assert status["warnings"] == []
        assert allocated_bytes(replica.data_path) == 0
    assert a.status()["generation"] == b.status()["generation"]
    assert a.status()["peer"]["role"] == "secondary"
    assert a.status()["peer"]["address"] == b.listen


def test_adopted_replicas_know_each_other_after_a_restart(cluster: Cluster) -> None:
    a, b = cluster.pair()
    with a.client() as client:
        client.pwrite(b"x" * 4096, 0)
    a.stop()
    b.stop()
    assert "stopped, clean" in a.log()
    a.serve()
    b.serve()
    assert a.wait_in_step()["role"] == "secondary", "a replica with a peer comes up as secondary"
    assert b.wait_in_step()["last_resync"] is None, "a clean stop of both leaves nothing to sync"


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_every_kind_of_write_stands_on_both(cluster: Cluster, rng: random.Random, protocol: str) -> None:
    a, b = cluster.pair(protocol=protocol)
    assert a.status()["protocol"] == protocol
    image = bytearray(16 * MIB)
    with a.client() as client:
        for offset, length in (
            (0, MIB),
            (MIB + 512, 1024),
            (2 * MIB + 4096, 4096),
            (4 * MIB - 4096, 8192),
            (8 * MIB, 4 * MIB),
        ):
            data = rng.randbytes(length)
            client.pwrite(data, offset)
            image[offset : offset + length] = data
        client.zero(300 * 1024, 8 * MIB)
        image[8 * MIB : 8 * MIB + 300 * 1024] = bytes(300 * 1024)
        client.trim(1 * MIB, 9 * MIB)
        image[9 * MIB : 10 * MIB] = bytes(MIB)
        client.zero(1000, 8 * MIB + 512 * 1024 + 500)
        image[8 * MIB + 512 * 1024 + 500 : 8 * MIB + 512 * 1024 + 1500] = bytes(1000)
        client.flush()
        for replica in (a, b):
            assert replica.data_path.read_bytes()[: len(image)] == image, f"{replica.directory.name} after the flush"
        assert bytes(client.pread(len(image), 0)) == bytes(image)
    assert_equal_copies(a, b)
    assert allocated_bytes(b.data_path) < 8 * MIB, "what was trimmed on the primary takes no room on the secondary"


def test_trim_of_the_whole_volume_reaches_the_peer(cluster: Cluster, rng: random.Random) -> None:
    """More extents than the activity log holds: it goes in pieces."""
    a, b = cluster.pair(size="512M", activity_log_extents=64)
    with a.client() as client:
        client.pwrite(rng.randbytes(MIB), 5 * MIB)
        client.pwrite(rng.randbytes(MIB), 400 * MIB)
        client.trim(512 * MIB, 0)
        client.flush()
        assert bytes(client.pread(MIB, 400 * MIB)) == bytes(MIB)
    for replica in (a, b):
        assert allocated_bytes(replica.data_path) == 0
    a.wait_in_step()


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_overlapping_writes_end_equal(cluster: Cluster, rng: random.Random, protocol: str) -> None:
    """Many requests in flight to few blocks, over several connections: the same one must win on both."""
    a, b = cluster.pair(protocol=protocol)
    history = new_history(rng)
    options = {"blocks": 12, "blocks_max": 4, "depth": 8, "connections": 4, "zeroes": 0.1, "overlap": True}
    writer = Writer(a, history, count=3000, **options)
    cluster.at_end(writer.close)
    writer.finish(0, 40)
    assert not history.errors
    history.assert_in_file(a.data_path)
    assert_equal_copies(a, b)


def test_a_client_reads_what_it_wrote(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    history = new_history(rng)
    options = {"blocks": 500, "blocks_max": 8, "depth": 8, "connections": 2, "zeroes": 0.2, "reads": 0.4, "fua": 0.1}
    writer = Writer(a, history, count=4000, flush_every=100, **options)
    cluster.at_end(writer.close)
    writer.finish(0, 40)
    assert not history.errors
    with a.client() as client:
        history.assert_on(client)
    history.assert_in_file(b.data_path)
    assert_equal_copies(a, b)


def test_fio_verifies(cluster: Cluster) -> None:
    a, b = cluster.pair()
    size = ("--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=8m", "--verify=crc32c", "--do_verify=1")
    fio(a.uri, *size, "--verify_fatal=1", "--end_fsync=1")
    assert_equal_copies(a, b)


def test_secondary_refuses_clients_and_says_who_is_primary(cluster: Cluster) -> None:
    a, b = cluster.pair()
    b.allow("secondary|primary")
    with pytest.raises(nbd.Error):
        b.connect_client()
    b.wait_log("secondary")
    said = [line for line in b.log().splitlines() if "refuse" in line.lower()]
    assert any(a.listen.removeprefix("tcp://") in line for line in said), f"who is primary: {said}"


@pytest.mark.parametrize("which", ["primary", "secondary"])
def test_status_on_disk_when_nothing_serves(cluster: Cluster, which: str) -> None:
    a, b = cluster.pair()
    replica: Replica = a if which == "primary" else b
    generation = replica.status()["generation"]
    a.stop()
    b.stop()
    status = replica.status()
    assert status["serving"] is False
    assert status["role"] is None
    assert status["connection"] is None
    assert status["disk"] in ("UpToDate", "Consistent")
    assert status["generation"] == generation
    assert status["size"] == 64 * MIB

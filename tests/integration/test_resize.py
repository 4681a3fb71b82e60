"""`nbdmirror resize`: both replicas grow under I/O, or neither does, whoever dies when."""

import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.integration.clients import Writer, new_history
from tests.integration.cluster import CLIENT_GONE, PEER_LOST, UNANSWERED, Cluster, Replica, different_blocks
from tests.integration.disks import LoopDisk, SmallFilesystem
from tests.integration.processes import free_port, run

MIB = 1 << 20
OLD, NEW = 64 * MIB, 320 * MIB
PATTERN = bytes(range(256)) * 16


def wait_same_size(*replicas: Replica) -> int:
    """Until both are in step with no resize open; the size that they agree on."""
    sizes = {replica.wait_status(30, connection="Connected", resize=None)["size"] for replica in replicas}
    assert len(sizes) == 1, sizes
    size: int = sizes.pop()
    for replica in replicas:
        assert replica.data_path.stat().st_size >= size or replica.data_path.is_block_device()
    return size


def assert_equal_copies(a: Replica, b: Replica) -> None:
    """As far as the volume goes: a file that was made longer before a crash stays so, until somebody resizes again."""
    blocks = different_blocks(a.data_path, b.data_path, a.status()["size"])
    assert not blocks, f"copies differ in blocks at {blocks}"


def check_new_range(client: Any, start: int, end: int) -> None:
    """What is new reads as zeroes, and takes writes up to its last block."""
    step = 16 * MIB
    for offset in range(start, end, step):
        assert not any(client.pread(min(step, end - offset), offset))
    for offset in (start, end - 4096):
        client.pwrite(PATTERN, offset)
        assert client.pread(4096, offset) == PATTERN
    client.flush()


@pytest.mark.parametrize("protocol", ["C", "A"])
def test_both_replicas_grow_while_a_client_writes(cluster: Cluster, rng: random.Random, protocol: str) -> None:
    a, b = cluster.pair("64M", protocol)
    a.allow(CLIENT_GONE)
    history = new_history(rng)
    writer = Writer(a, history, depth=8, blocks=2500, flush_every=50, zeroes=0.1)
    cluster.at_end(writer.close)
    writer.wait_answers(200)
    said = a.command("resize", "320M").stdout
    assert f"the volume has 320 MiB ({NEW} bytes) now" in said
    assert f"320 MiB ({NEW} bytes) already" in a.command("resize", "320M").stdout
    writer.wait_answers(200)
    writer.stop()
    assert not history.errors
    assert wait_same_size(a, b) == NEW
    with a.client() as client:
        assert client.get_size() == NEW
        history.assert_on(client)
        check_new_range(client, OLD, NEW)
    # What the last step left is there after a start, and after a change of roles.
    a.stop()
    a.serve()
    a.wait_in_step()
    b.promote()
    with b.client() as client:
        assert client.get_size() == NEW
        history.assert_on(client)
        assert client.pread(4096, NEW - 4096) == PATTERN
    assert_equal_copies(a, b)
    assert a.command("inspect", check=False).stdout


def test_an_open_connection_keeps_its_size(cluster: Cluster) -> None:
    a, b = cluster.pair("64M")
    with a.client() as client:
        a.command("resize", "320M")
        assert client.get_size() == OLD
        client.pwrite(PATTERN, OLD - 4096)
        client.flush()
        assert client.pread(4096, OLD - 4096) == PATTERN
    with a.client(timeout_s=5) as client:
        assert client.get_size() == NEW
        assert client.pread(4096, OLD - 4096) == PATTERN
    assert wait_same_size(a, b) == NEW


def test_it_grows_again_and_catches_up_a_peer_that_was_away(cluster: Cluster) -> None:
    a, b = cluster.pair("64M")
    for replica in (a, b):
        replica.allow(PEER_LOST)
    for size in ("64M", "65M", "200M", "320M"):
        a.command("resize", size)
    b.stop()
    with a.client() as client:
        check_new_range(client, OLD, NEW)
    refused = a.command("resize", "1G", check=False)
    assert refused.returncode == 1
    assert "not connected" in refused.stderr
    b.serve()
    assert wait_same_size(a, b) == NEW
    a.wait_in_step()
    assert_equal_copies(a, b)


def test_a_volume_that_stands_alone_grows(cluster: Cluster) -> None:
    a = cluster.standalone("64M")
    refused = a.command("resize", "320M", check=False)
    assert refused.returncode == 1
    assert "serve" in refused.stderr
    a.serve()
    a.command("resize", "320M")
    with a.client() as client:
        check_new_range(client, OLD, NEW)
    a.stop()
    assert a.status()["size"] == NEW
    a.serve()
    with a.client() as client:
        assert client.pread(4096, NEW - 4096) == PATTERN


def test_wishes_that_are_refused(cluster: Cluster) -> None:
    a, b = cluster.pair("64M")
    for replica, size, reason in ((a, "32M", "can only grow"), (b, "320M", "secondary")):
        refused = replica.command("resize", size, check=False)
        assert refused.returncode == 1
        assert reason in refused.stderr
    assert a.command("resize", "many", check=False).returncode == 2
    assert "already" in a.command("resize", "64M").stdout
    assert "rounded up" in a.command("resize", str(OLD + 1)).stderr
    assert wait_same_size(a, b) == OLD + 4096


@pytest.mark.parametrize("full", ["a", "b"])
def test_a_full_disk_on_either_side_changes_nothing(cluster: Cluster, full: str) -> None:
    """The map of the larger volume finds no room."""
    small = SmallFilesystem(cluster.directory / "small", 2 * MIB)
    cluster.at_end(small.close)
    a, b = (cluster.replica(f"small/{name}" if name == full else name) for name in "ab")
    a.listen, b.listen = (f"tcp://127.0.0.1:{free_port()}" for _ in "ab")
    for replica, peer in ((a, b), (b, a)):
        replica.create("64M", "--listen", replica.listen, "--peer", peer.listen)
        replica.allow("no room")
    b.launch()
    a.launch("--primary")
    a.wait_in_step()
    b.wait_in_step()
    lengths = [path.stat().st_size for replica in (a, b) for path in (replica.directory / "meta", replica.data_path)]
    refused = a.command("resize", "900G", check=False)
    assert refused.returncode == 1
    assert "No space left" in refused.stderr
    for replica in (a, b):
        status = replica.wait_status(resize=None, connection="Connected")
        assert status["size"] == OLD
    assert lengths == [
        path.stat().st_size for replica in (a, b) for path in (replica.directory / "meta", replica.data_path)
    ], "the room is given back"
    # With less there is room.
    a.command("resize", "320M")
    assert wait_same_size(a, b) == NEW
    with a.client() as client:
        check_new_range(client, OLD, NEW)


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_backing_must_be_large_enough_and_its_rest_is_zeroed(cluster: Cluster, tmp_path: Path, side: str) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xaa" * 100 * MIB)
    options = {f"options_{side}": ("--backing", backing, "--force")}
    a, b = cluster.created_pair("64M", **options)
    for replica in (a, b):
        replica.allow("no room", PEER_LOST)
    b.launch()
    a.launch("--primary")
    a.wait_in_step(30)
    b.wait_in_step(30)
    refused = a.command("resize", "320M", check=False)
    assert refused.returncode == 1
    assert str(backing) in refused.stderr
    assert "larger" in refused.stderr
    a.command("resize", "100M")
    assert wait_same_size(a, b) == 100 * MIB
    with a.client() as client:
        check_new_range(client, OLD, 100 * MIB)
    assert_equal_copies(a, b)


def test_a_block_device_grows_into_what_it_has(cluster: Cluster, tmp_path: Path) -> None:
    disk = LoopDisk(tmp_path, 128 * MIB, 256 * MIB)
    cluster.at_end(disk.close)
    run(["dd", "if=/dev/urandom", f"of={disk.path}", "bs=1M", "count=128", "conv=fsync"])
    a = cluster.standalone("64M", "--backing", disk.path, "--force").serve()
    refused = a.command("resize", "320M", check=False)
    assert refused.returncode == 1
    assert str(disk.path) in refused.stderr
    a.command("resize", "128M")
    with a.client() as client:
        assert client.get_size() == 128 * MIB
        check_new_range(client, OLD, 128 * MIB)


# -- deaths in the middle ---------------------------------------------------------------------------------------------


def ask(replica: Replica, size_bytes: int) -> socket.socket:
    """Send the command and don't wait for the answer."""
    control = socket.socket(socket.AF_UNIX)
    control.connect(str(replica.directory / "control.sock"))
    control.sendall(json.dumps({"command": "resize", "size": size_bytes}).encode() + b"\n")
    return control


@pytest.mark.parametrize("victim", ["primary", "secondary", "both"])
def test_whoever_is_killed_in_the_middle_both_end_with_one_size(
    cluster: Cluster, rng: random.Random, victim: str
) -> None:
    rounds_of_death(cluster, rng, victim, 5)


@pytest.mark.long
@pytest.mark.parametrize("victim", ["primary", "secondary", "both"])
def test_many_deaths(cluster: Cluster, rng: random.Random, victim: str) -> None:
    rounds_of_death(cluster, rng, victim, 40)


def rounds_of_death(cluster: Cluster, rng: random.Random, victim: str, rounds: int) -> None:
    a, b = cluster.pair("64M")
    for replica in (a, b):
        replica.allow(PEER_LOST, UNANSWERED, CLIENT_GONE, "crash|promot|must not|not clean|no room")
    victims = {"primary": [a], "secondary": [b], "both": [a, b]}[victim]
    history, size = new_history(rng), OLD
    for number in range(1, rounds + 1):
        writer = Writer(a, history, number, depth=4, blocks=2500, flush_every=50)
        cluster.at_end(writer.close)
        writer.wait_answers(50)
        wanted = size + rng.choice([1, 64, 200]) * MIB
        with ask(a, wanted):
            writer.wait_answers(rng.randint(0, 200))
            cluster.kill_together(*victims)
        if a in victims:
            writer.ended_by_loss()
        else:
            writer.stop()
        for replica in victims:
            replica.launch()
        for replica in (a, b):
            replica.wait_ready()
            replica.wait_in_step(30)
        found = wait_same_size(a, b)
        assert found in (size, wanted)
        if a in victims:
            a.promote()
        assert not history.errors
        with a.client(timeout_s=5) as client:
            assert client.get_size() == found
            history.assert_on(client)
            if found > size:
                check_new_range(client, size, found)
        a.wait_in_step()
        b.wait_in_step()
        assert_equal_copies(a, b)
        size = found


def test_the_secondary_is_promoted_in_the_middle_and_goes_on_with_what_it_has(cluster: Cluster) -> None:
    """The primary dies when it has room and its peer, which stands still, has not heard of it or just begins."""
    a, b = cluster.pair("64M", peer_timeout_s=20.0)
    for replica in (a, b):
        replica.allow(PEER_LOST, UNANSWERED, CLIENT_GONE, "crash|promot|must not|not clean|no room")
    with a.client() as client:
        client.pwrite(PATTERN, 0)
    b.freeze()
    with ask(a, NEW):
        a.wait_status(resize__next_size=NEW)
        cluster.kill_together(a)
    b.thaw()
    b.promote()
    with b.client() as client:
        assert client.get_size() in (OLD, NEW)
        client.pwrite(PATTERN, 4096)
    a.serve()
    assert wait_same_size(a, b) in (OLD, NEW)
    a.wait_in_step(30)
    b.wait_in_step(30)
    with b.client() as client:
        assert client.pread(4096, 0) == client.pread(4096, 4096) == PATTERN
    assert_equal_copies(a, b)

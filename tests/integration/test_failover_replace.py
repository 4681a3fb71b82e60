"""Replicas that have to be filled: a replacement, an invalidated one, a backing with contents, a later peer."""

import random
from pathlib import Path

from tests.integration.cluster import PEER_LOST, Cluster, assert_equal_copies
from tests.integration.processes import free_port

MIB = 1 << 20
SYNC = PEER_LOST + "|inconsistent|sync|join|insecure"


def test_a_replacement_joins_and_is_filled(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    a.allow(SYNC)
    with a.client() as client:
        client.pwrite(rng.randbytes(8 * MIB), 4 * MIB)
    b.kill()
    replacement = cluster.replica("c")
    replacement.allow(SYNC)
    addresses = ("--listen", b.listen, "--peer", a.listen)

    # One that does not say that it joins is a stranger.
    stranger = cluster.replica("d")
    stranger.allow(SYNC, "refuse|unrelated|create|fresh")
    a.allow("refuse|unrelated|create|fresh")
    stranger.create("64M", *addresses)
    stranger.serve()
    stranger.wait_log("--join")
    assert stranger.status()["connection"] not in ("Connected", "SyncTarget")
    stranger.stop()

    replacement.create("64M", *addresses, "--join")
    assert replacement.status()["disk"] == "Inconsistent"
    replacement.serve()
    a.wait_in_step()
    assert replacement.wait_in_step()["role"] == "secondary"
    resync = replacement.status()["last_resync"]
    assert resync["dirty_bytes"] == 64 * MIB
    assert resync["sent_bytes"] < 10 * MIB, "what was never written is not sent"
    assert resync["skipped_bytes"] >= 54 * MIB
    assert_equal_copies(a, replacement)


def test_a_joining_replica_never_wins(cluster: Cluster, rng: random.Random) -> None:
    """--join on the side that serves nothing yet: it refuses to become primary, its peer's data stay."""
    a, b = cluster.pair()
    with a.client() as client:
        client.pwrite(rng.randbytes(MIB), 0)
    b.stop()
    a.allow(SYNC)
    b.allow(SYNC)
    joining = cluster.replica("c")
    joining.create("64M", "--listen", b.listen, "--peer", a.listen, "--join")
    joining.configure(wait_for_peer_s=0.3)
    a.stop()
    joining.serve_fails("--primary")
    joining.serve()
    joining.allow(SYNC)
    assert joining.promote("--force", check=False).returncode == 1


def test_invalidate_syncs_whole(cluster: Cluster, rng: random.Random) -> None:
    """Its data file was damaged behind its back: invalidated, it is compared whole; equal blocks are skipped."""
    a, b = cluster.pair()
    a.allow(SYNC)
    b.allow(SYNC)
    with a.client() as client:
        client.pwrite(rng.randbytes(16 * MIB), 0)
        client.flush()
    b.stop()
    with b.data_path.open("r+b") as data:
        data.seek(5 * MIB)
        data.write(rng.randbytes(MIB))
        data.seek(40 * MIB)
        data.write(rng.randbytes(4096))
    b.command("invalidate")
    b.serve()
    a.wait_in_step()
    b.wait_in_step()
    resync = a.status()["last_resync"]
    assert resync["dirty_bytes"] == 64 * MIB
    assert resync["sent_bytes"] < 2 * MIB
    assert_equal_copies(a, b)


def test_invalidate_is_refused_while_serving(cluster: Cluster) -> None:
    a, _ = cluster.pair()
    refused = a.command("invalidate", check=False)
    assert refused.returncode == 1
    assert refused.stderr
    assert a.status()["disk"] == "UpToDate"


def test_backing_with_contents_is_synced_from_the_first_primary(
    cluster: Cluster, rng: random.Random, tmp_path: Path
) -> None:
    contents = rng.randbytes(8 * MIB) + bytes(24 * MIB)
    disk_a, disk_b = tmp_path / "disk-a", tmp_path / "disk-b"
    disk_a.write_bytes(contents)
    disk_b.write_bytes(contents[: 4 * MIB] + rng.randbytes(28 * MIB))
    a, b = cluster.created_pair("32M", options_a=("--backing", disk_a), options_b=("--backing", disk_b))
    for replica in (a, b):
        replica.allow(SYNC, "backing|primary|contents")
    b.serve()
    a.serve()
    # Nobody knows whose contents are meant to win before one of them is made primary.
    met = a.wait_status(plan=lambda plan: plan is not None and plan["rule"] == "backing-undecided")
    assert met["connection"] not in ("SyncSource", "SyncTarget")
    a.promote()
    a.wait_in_step()
    b.wait_in_step()
    assert disk_a.read_bytes() == contents
    assert disk_b.read_bytes() == contents
    resync = a.status()["last_resync"]
    assert resync["dirty_bytes"] == 32 * MIB
    assert resync["sent_bytes"] <= 5 * MIB, "equal and zero blocks are skipped"


def test_a_volume_that_stood_alone_gets_a_peer(cluster: Cluster, rng: random.Random) -> None:
    a = cluster.standalone().serve()
    whole = rng.randbytes(6 * MIB)
    with a.client() as client:
        client.pwrite(whole, 10 * MIB)
    a.stop()

    b = cluster.replica("b")
    listen_a, listen_b = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    a.configure(listen=listen_a, peer=listen_b)
    b.create("64M", "--listen", listen_b, "--peer", listen_a)
    for replica in (a, b):
        replica.allow(SYNC)
    b.serve()
    a.serve("--primary")
    a.wait_in_step()
    b.wait_in_step()
    assert a.status()["role"] == "primary"
    assert a.status()["last_resync"]["dirty_bytes"] >= 6 * MIB
    assert_equal_copies(a, b)
    with a.client() as client:
        assert bytes(client.pread(6 * MIB, 10 * MIB)) == whole

"""`nbdmirror why-slow` names what was made slow: either disk, the link, flushes, the log; and what waits now."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import PEER_LOST, Cluster, Replica
from tests.integration.fault_disk import FaultDisk
from tests.integration.processes import free_port, wait_for
from tests.integration.slow_wire import SlowWire

MIB = 1 << 20
SMALLEST_LOG = 64
EXTENT_BYTES = 4 * MIB
DELAY_S = 0.02
# So many are slow that half of all are.
WRITES = 80


def why(replica: Replica) -> dict[str, Any]:
    found = json.loads(replica.command("why-slow", "--json").stdout)
    assert isinstance(found, dict)
    return found


def pair_on(cluster: Cluster, a_disk: Path | None = None, b_disk: Path | None = None) -> tuple[Replica, Replica]:
    options = [("--backing", disk) if disk else () for disk in (a_disk, b_disk)]
    a, b = cluster.created_pair("64M", options_a=options[0], options_b=options[1])
    for replica in (a, b):
        replica.allow(PEER_LOST + "|backing")
    b.launch()
    a.launch("--primary")
    a.wait_ready()
    b.wait_ready()
    a.wait_in_step(30)
    # The comparison after the handshake holds ranges, for as long as these disks take to read.
    a.wait_status(proof=lambda proof: proof and proof["state"] == "proven" and not proof["rest_left_bytes"])
    return a, b


def write_some(client: Any, count: int = WRITES, flush: bool = False) -> None:
    for number in range(count):
        client.pwrite(os.urandom(4096), number % 64 * 4096)
        if flush:
            client.flush()


def test_nothing_is_slow_and_it_says_so_in_words(cluster: Cluster) -> None:
    a, b = cluster.pair()
    with a.client() as client:
        write_some(client, 500)
        client.flush()
    found = why(a)
    assert {"write", "flush"} <= set(found["stages"])
    assert set(found["stages"]["write"]) >= {"range", "log", "own_disk", "link", "peer_disk", "interpreter", "total"}
    assert found["stages"]["write"]["peer_disk"]["p50_us"] > 0, "the peer says what its disk takes"
    assert found["oldest"] is None
    wait_for(lambda: why(a)["peer_processor"] is not None, 20.0, "the peer to have looked at its processors")
    page = a.command("why-slow").stdout
    assert "\x1b" not in page
    for words in ("p99.9", "peer's disk", "slowest of the last minutes", "oldest now", "resync", "peer's processor"):
        assert words in page
    other = why(b)
    assert (other["role"], other["oldest"]) == ("secondary", None)
    assert set(other["stages"]["apply"]) == {"receive", "own_disk", "reply", "total"}
    assert set(other["stages"]["apply flush"]) >= {"own_disk", "total"}


@pytest.mark.parametrize(("slow", "cause"), [("primary", "own-disk"), ("secondary", "peer-disk")])
def test_a_slow_disk(cluster: Cluster, tmp_path: Path, slow: str, cause: str) -> None:
    disk = FaultDisk(tmp_path, 64 * MIB)
    cluster.at_end(disk.close)
    a, b = pair_on(cluster, **{"a_disk" if slow == "primary" else "b_disk": disk.path})
    with a.client() as client:
        disk.fail(write_delay_s=DELAY_S)
        write_some(client)
        found = why(a)
        disk.fail()
    assert found["cause"] == cause, found
    assert "disk is slow (half of the writes" in found["says"]
    stage = "own_disk" if slow == "primary" else "peer_disk"
    slowest = found["slowest"][0]
    assert slowest["stages_us"].get(stage, slowest["stages_us"].get("disk_or_link")) >= 0.8e6 * DELAY_S
    if slow == "secondary":
        assert why(b)["cause"] == "own-disk", "it knows that it is its own"


def test_slow_flushes(cluster: Cluster, tmp_path: Path) -> None:
    disk = FaultDisk(tmp_path, 64 * MIB)
    cluster.at_end(disk.close)
    a, _ = pair_on(cluster, a_disk=disk.path)
    with a.client() as client:
        write_some(client)
        disk.fail(fsync_delay_s=DELAY_S)
        write_some(client, 40, flush=True)
        found = why(a)
        disk.fail()
    assert found["cause"] == "own-flush", found
    assert found["stages"]["flush"]["own_disk"]["p50_us"] >= 0.8e6 * DELAY_S


def test_a_request_that_hangs_now(cluster: Cluster, tmp_path: Path) -> None:
    """It is seen while it hangs, though it was not one of those that are measured."""
    disk = FaultDisk(tmp_path, 64 * MIB)
    cluster.at_end(disk.close)
    a, _ = pair_on(cluster, a_disk=disk.path)
    with a.client() as client:
        write_some(client, 7)
        disk.fail(write_delay_s=3.0)
        cookie = client.aio_pwrite(nbd_buffer(b"\xa5" * 4096), 40960)

        def hangs() -> dict[str, Any] | None:
            now = why(a)
            return now if now["oldest"] and now["oldest"]["age_s"] > 0.1 else None

        found = wait_for(hangs, 5.0, "the write to hang")
        oldest = found["oldest"]
        assert (oldest["kind"], oldest["offset"], oldest["length"]) == ("write", 40960, 4096)
        assert oldest["waits_for"] == "own_disk"
        assert found["cause"] == "own-disk"
        assert "waits now" in found["says"]
        wait_for(lambda: client.poll(100) >= 0 and client.aio_command_completed(cookie), 10.0, "the write to end")
        disk.fail()
        assert why(a)["slowest"][0]["total_us"] > 1_000_000, "afterwards it is among the slowest"


def nbd_buffer(content: bytes) -> Any:
    import nbd

    return nbd.Buffer.from_bytearray(bytearray(content))


def test_a_slow_link(cluster: Cluster) -> None:
    a, b = (cluster.replica(name) for name in "ab")
    ports = [free_port(), free_port()]
    wires = [SlowWire(port) for port in ports]
    for wire in wires:
        cluster.at_end(wire.close)
    for replica, port, wire in zip((a, b), ports, reversed(wires), strict=True):
        replica.allow(PEER_LOST)
        replica.create("64M", "--listen", f"tcp://127.0.0.1:{port}", "--peer", f"tcp://127.0.0.1:{wire.port}")
    b.launch()
    a.launch("--primary")
    a.wait_ready()
    a.wait_in_step(30)
    for wire in wires:
        wire.delay_s = 0.005
    with a.client() as client:
        write_some(client)
    found = why(a)
    assert found["cause"] == "link", found
    assert found["stages"]["write"]["link"]["p50_us"] >= 8000


def test_a_peer_that_hangs_and_one_that_was_killed(cluster: Cluster) -> None:
    """Neither is called a slow link: not while a write waits for it, and not afterwards."""
    a, b = cluster.pair(peer_timeout_s=30.0)
    a.allow(PEER_LOST)
    with a.client() as client:
        write_some(client)
        b.freeze()
        cookie = client.aio_pwrite(nbd_buffer(b"\xa5" * 4096), 40960)

        def is_silent() -> dict[str, Any] | None:
            now = why(a)
            return now if now["cause"] == "peer-gone" else None

        found = wait_for(is_silent, 20.0, "the peer to be called silent")
        assert "the peer is silent" in found["says"]
        assert "a write waits now" in found["says"]
        b.kill()
        wait_for(lambda: client.poll(100) >= 0 and client.aio_command_completed(cookie), 20.0, "the write to end")
        a.wait_status(connection="Connecting")
        write_some(client)
        found = why(a)
    assert found["peer_silence"]["silent_s"] is None
    assert found["cause"] == "peer-gone", found
    assert "the peer was silent, or was lost" in found["says"]


def test_a_peer_that_paused(cluster: Cluster) -> None:
    """It is remembered, though its session never ended."""
    a, b = cluster.pair(peer_timeout_s=30.0)
    with a.client() as client:
        write_some(client)
        b.freeze()
        cookie = client.aio_pwrite(nbd_buffer(b"\xa5" * 4096), 40960)
        wait_for(lambda: why(a)["peer_silence"]["silent_s"] > 1.0, 20.0, "the peer to be silent")
        b.thaw()
        wait_for(lambda: client.poll(100) >= 0 and client.aio_command_completed(cookie), 20.0, "the write to end")
        write_some(client)
        found = why(a)
    assert found["cause"] == "peer-gone", found
    assert found["peer_silence"]["silent_s"] < 0.5
    assert len(found["peer_silence"]["before"]) == 1


def test_a_log_that_is_too_small(cluster: Cluster, rng: random.Random, tmp_path: Path) -> None:
    """Each write meets another extent; what a record costs on this machine decides whether that is called slow."""
    size_bytes = 8 * SMALLEST_LOG * EXTENT_BYTES
    a, b = cluster.created_pair(str(size_bytes), activity_log_extents=SMALLEST_LOG)
    b.launch()
    a.launch("--primary")
    a.wait_ready()
    a.wait_in_step(30)
    with a.client() as client:
        for _ in range(400):
            client.pwrite(b"\x5a" * 4096, rng.randrange(8 * SMALLEST_LOG) * EXTENT_BYTES)
    found = why(a)
    write = found["stages"]["write"]
    assert write["log"]["p99_us"] > write["range"]["p50_us"]
    if found["cause"] != "nothing" and write["log"]["p50_us"] > 1000:
        assert found["cause"] == "cold-extents", found


def test_without_a_server_it_says_so(cluster: Cluster) -> None:
    a = cluster.standalone()
    done = a.command("why-slow", check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "nothing serves" in done.stderr
    a.serve()
    with a.client() as client:
        write_some(client, 64)
    found = why(a)
    assert found["peer"] is None
    assert found["stages"]["write"]["own_disk"]["p50_us"] > 0

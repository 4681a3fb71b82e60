"""Disks that are full, fail, or come back damaged: clear errors, nothing lost, never silently different."""

import errno
import os
import random
import struct
from pathlib import Path
from typing import Any

import crcmod.predefined
import nbd
import pytest

from tests.integration.clients import Writer, new_history
from tests.integration.cluster import PEER_LOST, Cluster, Replica, assert_equal_copies, nbdmirror
from tests.integration.disks import LoopDisk, SmallFilesystem
from tests.integration.fault_disk import FaultDisk
from tests.integration.processes import free_port, wait_for

MIB = 1 << 20
DISK = PEER_LOST + "|disk|space|full|fail|error|inconsistent|sync|backing|not clean"
RECORD_BYTES = 4096
CRC_32C = crcmod.predefined.mkPredefinedCrcFun("crc-32c")


def equal_or_said(a: Replica, b: Replica) -> None:
    """Either both are in step and equal, or the primary says that its peer lacks something (error-is-dirty)."""

    def settled() -> dict[str, Any] | None:
        status = a.peek()
        if status is None:
            return None
        in_step = status["connection"] == "Connected" and status["dirty_bytes"] == 0
        apart = status["connection"] in ("Connecting", "Standalone") and status["dirty_bytes"] > 0
        return status if in_step or (apart and status["warnings"]) else None

    status = wait_for(settled, 20.0, "the replicas to be in step or to say that they are not")
    if status["connection"] == "Connected":
        assert_equal_copies(a, b)


@pytest.fixture
def small(cluster: Cluster, tmp_path: Path) -> SmallFilesystem:
    filesystem = SmallFilesystem(tmp_path / "small", 48 * MIB)
    cluster.at_end(filesystem.close)
    return filesystem


def write_through(client: nbd.NBD, rng: random.Random, offsets_mib: range) -> None:
    for offset in offsets_mib:
        client.pwrite(rng.randbytes(4 * MIB), offset * MIB)


# What fails is noticed at other places under protocols A and B, which answer earlier.
PROTOCOLS = ["C", pytest.param("A", marks=pytest.mark.long), pytest.param("B", marks=pytest.mark.long)]


# -- full ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("full", ["primary", "secondary"])
def test_a_full_disk(cluster: Cluster, rng: random.Random, small: SmallFilesystem, full: str, protocol: str) -> None:
    """A sparse volume larger than its filesystem: in the middle of many writes there is no room left."""
    sparse = small.path / "disk"
    with sparse.open("wb") as file:
        file.truncate(128 * MIB)
    a, b = pair_on_disks(cluster, "128M", protocol=protocol, **{"a_disk" if full == "primary" else "b_disk": sparse})
    history = new_history(rng)
    writer = Writer(a, history, depth=8, blocks=30000, blocks_max=32, flush_every=100, count=3000)
    cluster.at_end(writer.close)
    writer.finish(0, 60)
    assert {request.errno for request in history.errors} <= {errno.ENOSPC}, "no other error than no space"
    if full == "primary":
        assert history.errors, "127 MiB can't fit into 48"
    assert a.running
    assert b.running
    with a.client(timeout_s=2) as client:
        history.assert_on(client)
    equal_or_said(a, b)

    # Room is made: what was refused before succeeds, and the two are in step again.
    with a.client(timeout_s=2) as client:
        client.trim(110 * MIB, 0)
    if a.status()["connection"] != "Connected":
        b.command("connect")
    a.wait_in_step(30)
    with a.client(timeout_s=2) as client:
        client.pwrite(rng.randbytes(MIB), MIB)
        client.flush()
    assert_equal_copies(a, b)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("full", ["a", "b"])
def test_a_full_disk_with_the_metadata_on_it(
    cluster: Cluster, rng: random.Random, small: SmallFilesystem, full: str, protocol: str
) -> None:
    """Whoever is full can still record that its peer went on, and take over or come back."""
    a, b = (cluster.replica(f"small/{name}" if name == full else name) for name in "ab")
    a.listen, b.listen = (f"tcp://127.0.0.1:{free_port()}" for _ in "ab")
    for replica, peer in ((a, b), (b, a)):
        replica.create("128M", "--listen", replica.listen, "--peer", peer.listen, "--protocol", protocol)
        replica.allow(DISK, "promot|must not|crash")
    b.serve()
    a.serve("--primary")
    a.wait_in_step()
    history = new_history(rng)
    writer = Writer(a, history, depth=16, blocks=30000, blocks_max=32, flush_every=100, count=2500)
    cluster.at_end(writer.close)
    writer.finish(0, 60)
    assert {request.errno for request in history.errors} <= {errno.ENOSPC}
    assert bool(history.errors) == (full == "a")
    with a.client(timeout_s=2) as client:
        history.assert_on(client)
    equal_or_said(a, b)

    a.kill()
    if full == "a":
        b.promote()
        if protocol != "C":
            history.forget_unflushed()
        with b.client(timeout_s=2) as client:
            history.assert_on(client)
            client.trim(110 * MIB, 0)
            client.flush()
        a.serve()
    else:
        refused = b.promote(check=False)
        assert refused.returncode == 1, "it knows that it lacks something"
        a.serve()
        a.wait_status(connection=lambda state: state != "Handshake")
        a.promote()
        with a.client(timeout_s=2) as client:
            history.assert_on(client)
            client.trim(110 * MIB, 0)
            client.flush()
        b.command("connect", check=False)
    a.wait_in_step(40)
    b.wait_in_step(40)
    assert_equal_copies(a, b)


def test_a_full_disk_of_a_standalone_volume(cluster: Cluster, rng: random.Random, small: SmallFilesystem) -> None:
    """The log can still be written: the metadata was allocated whole when the volume was made."""
    a = cluster.replica("small/a")
    a.allow(DISK)
    a.create("128M")
    a.serve()
    with a.client() as client:
        with pytest.raises(nbd.Error) as failure:
            write_through(client, rng, range(0, 128, 4))
        assert failure.value.errnum == errno.ENOSPC
        assert len(bytes(client.pread(MIB, 0))) == MIB
        client.pwrite(b"\xa5" * 4096, 0)
        client.flush()
    a.stop()
    assert "stopped, clean" in a.log()
    a.serve()
    with a.client() as client:
        assert bytes(client.pread(4096, 0)) == b"\xa5" * 4096


# -- failing ------------------------------------------------------------------------------------------------------


def pair_on_disks(
    cluster: Cluster, size: str, a_disk: Path | None = None, b_disk: Path | None = None, protocol: str = "C"
) -> tuple[Replica, Replica]:
    a, b = cluster.created_pair(
        size,
        protocol,
        options_a=("--backing", a_disk) if a_disk else (),
        options_b=("--backing", b_disk) if b_disk else (),
    )
    for replica in (a, b):
        replica.allow(DISK, "primary")
    b.launch()
    a.launch("--primary")
    a.wait_ready()
    b.wait_ready()
    a.wait_in_step(30)
    return a, b


def test_a_failed_flush_is_never_repeated_as_if_well(cluster: Cluster, rng: random.Random, tmp_path: Path) -> None:
    """The kernel tells of a lost write-back once; the second fdatasync of the same file succeeds, and lies."""
    disk = LoopDisk(tmp_path, 64 * MIB, 8 * MIB)
    cluster.at_end(disk.close)
    a = cluster.standalone("64M", "--backing", disk.path)
    a.allow(DISK)
    a.serve()
    with a.client() as client:
        client.pwrite(rng.randbytes(4096), 0)
        client.flush()
        write_through(client, rng, range(0, 32, 4))
        for _ in range(3):
            with pytest.raises(nbd.Error) as failure:
                client.flush()
            assert failure.value.errnum == errno.EIO
    assert a.wait_status(disk="Failed")["warnings"]
    a.stop()
    assert "stopped, not clean" in a.log()
    assert a.status()["disk"] == "Failed", "it stays Failed over a restart"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_failed_flush_of_the_primary(cluster: Cluster, rng: random.Random, tmp_path: Path, protocol: str) -> None:
    """Its disk is Failed, the volume goes on through the peer's copy."""
    disk = LoopDisk(tmp_path, 64 * MIB, 8 * MIB)
    cluster.at_end(disk.close)
    a, b = pair_on_disks(cluster, "64M", a_disk=disk.path, protocol=protocol)
    history = new_history(rng)
    writer = Writer(a, history, depth=8, blocks=12000, blocks_max=32, flush_every=50, count=1500)
    cluster.at_end(writer.close)
    writer.finish(0, 60)
    assert a.wait_status(disk="Failed")["role"] == "primary"
    assert not history.errors, "the peer's copy was there all the time"
    with a.client(timeout_s=2) as client:
        history.assert_on(client)
    history.assert_in_file(b.data_path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_failed_flush_of_the_secondary(cluster: Cluster, rng: random.Random, tmp_path: Path, protocol: str) -> None:
    disk = LoopDisk(tmp_path, 64 * MIB, 8 * MIB)
    cluster.at_end(disk.close)
    a, b = pair_on_disks(cluster, "64M", b_disk=disk.path, protocol=protocol)
    history = new_history(rng)
    writer = Writer(a, history, depth=8, blocks=12000, blocks_max=32, flush_every=50, count=1500)
    cluster.at_end(writer.close)
    writer.finish(0, 60)
    assert not history.errors
    status = a.wait_status(peer__disk=lambda disk: disk not in ("UpToDate", "Consistent"))
    assert status["dirty_bytes"] > 0
    assert status["warnings"]
    assert b.wait_status(disk="Failed")["role"] == "secondary"
    refused = b.promote(check=False)
    assert refused.returncode == 1
    assert "Failed" in refused.stderr
    with a.client(timeout_s=2) as client:
        history.assert_on(client)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("failing", ["primary", "secondary"])
def test_writes_that_fail(cluster: Cluster, rng: random.Random, tmp_path: Path, failing: str, protocol: str) -> None:
    """EIO on write: the replica is Failed, the other one goes on, no client sees an error."""
    disk = FaultDisk(tmp_path, 64 * MIB)
    cluster.at_end(disk.close)
    a, b = pair_on_disks(
        cluster, "64M", protocol=protocol, **{"a_disk" if failing == "primary" else "b_disk": disk.path}
    )
    victim, other = (a, b) if failing == "primary" else (b, a)
    history = new_history(rng)
    writer = Writer(a, history, depth=8, blocks=4000, flush_every=50, zeroes=0.1)
    cluster.at_end(writer.close)
    writer.wait_answers(200)
    disk.fail(write_errno=errno.EIO)
    victim.wait_status(disk="Failed")
    writer.wait_answers(200)
    writer.stop()
    assert disk.counts()["write_errors"] > 0
    assert not history.errors
    with a.client(timeout_s=2) as client:
        history.assert_on(client)
    history.assert_in_file(other.data_path)

    # A new disk: invalidated, it is filled again.
    victim.stop()
    disk.fail()
    if failing == "primary":
        b.promote()
    victim.command("invalidate")
    victim.serve()
    victim.wait_in_step(30)
    history.assert_in_file(victim.data_path)


def test_a_read_error_is_answered_from_the_peer_and_mended(
    cluster: Cluster, rng: random.Random, tmp_path: Path
) -> None:
    disk = FaultDisk(tmp_path, 64 * MIB)
    cluster.at_end(disk.close)
    a, b = pair_on_disks(cluster, "64M", a_disk=disk.path)
    data = rng.randbytes(MIB)
    with a.client() as client:
        client.pwrite(data, 8 * MIB)
        client.flush()
        disk.fail(reads=[(8 * MIB + 64 * 1024, 4096)])
        assert bytes(client.pread(MIB, 8 * MIB)) == data, "answered from the peer"
        assert disk.counts()["read_errors"] > 0
        a.wait_log("read")

        def mended() -> bool:
            before = disk.counts()["read_errors"]
            assert bytes(client.pread(4096, 8 * MIB + 64 * 1024)) == data[64 * 1024 : 68 * 1024]
            return disk.counts()["read_errors"] == before

        wait_for(mended, 5.0, "the block to be rewritten")
    assert a.status()["disk"] == "UpToDate"
    assert any("read" in line.lower() for line in a.log().splitlines() if "WARNING" in line or "ERROR" in line)
    assert_equal_copies(a, b)


def test_a_disk_that_goes_on_failing(cluster: Cluster, rng: random.Random, tmp_path: Path) -> None:
    """Nothing can be read and nothing rewritten: Failed, the volume goes on through the peer; without it, EIO."""
    disk = FaultDisk(tmp_path, 64 * MIB)
    cluster.at_end(disk.close)
    a, b = pair_on_disks(cluster, "64M", a_disk=disk.path)
    data = rng.randbytes(MIB)
    with a.client() as client:
        client.pwrite(data, 8 * MIB)
        client.flush()
        disk.fail(read_errno=errno.EIO, write_errno=errno.EIO)
        for offset in range(0, MIB, 64 * 1024):
            assert bytes(client.pread(64 * 1024, 8 * MIB + offset)) == data[offset : offset + 64 * 1024]
        a.wait_status(disk="Failed")
        client.pwrite(data, 20 * MIB)
        assert bytes(client.pread(MIB, 20 * MIB)) == data
        client.flush()
        with b.data_path.open("rb") as copy:
            copy.seek(20 * MIB)
            assert copy.read(MIB) == data
        b.kill()
        with pytest.raises(nbd.Error) as failure:
            client.pread(4096, 8 * MIB)
        assert failure.value.errnum == errno.EIO
        with pytest.raises(nbd.Error):
            client.pwrite(data, 8 * MIB)


def test_a_read_error_without_a_peer_is_eio(cluster: Cluster, rng: random.Random, tmp_path: Path) -> None:
    disk = FaultDisk(tmp_path, 64 * MIB)
    cluster.at_end(disk.close)
    a = cluster.standalone("64M", "--backing", disk.path)
    a.allow(DISK)
    a.serve()
    with a.client() as client:
        client.pwrite(rng.randbytes(MIB), 0)
        disk.fail(reads=[(4096, 4096)])
        with pytest.raises(nbd.Error) as failure:
            client.pread(4096, 4096)
        assert failure.value.errnum == errno.EIO
        assert len(client.pread(4096, 0)) == 4096


# -- damaged ------------------------------------------------------------------------------------------------------


def damage(path: Path, offset: int, length: int = 8) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(length)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in old))


def test_a_truncated_data_file(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    a.allow(PEER_LOST)
    with a.client() as client:
        client.pwrite(rng.randbytes(MIB), 0)
    b.stop()
    with b.data_path.open("r+b") as data:
        data.truncate(32 * MIB)
    said = b.serve_fails().stderr
    assert str(b.data_path) in said
    assert str(32 * MIB) in said.replace(",", "") or "32" in said
    assert b.data_path.stat().st_size == 32 * MIB, "it is not silently made longer"


@pytest.mark.parametrize("copy", [0, 1])
def test_one_damaged_superblock(cluster: Cluster, rng: random.Random, copy: int) -> None:
    a = cluster.standalone().serve()
    data = rng.randbytes(MIB)
    with a.client() as client:
        client.pwrite(data, 0)
    a.stop()
    damage(a.directory / "meta", copy * RECORD_BYTES + 100)
    inspected = a.command("inspect", check=False)
    assert inspected.returncode == 1
    assert "damaged" in inspected.stdout + inspected.stderr
    a.allow("damaged|superblock|copy")
    a.serve()
    assert "damaged" in a.log()
    with a.client() as client:
        assert bytes(client.pread(MIB, 0)) == data
    a.stop()
    assert a.command("inspect").returncode == 0, "the damaged copy was written again"


def test_both_superblocks_damaged(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    a.stop()
    for copy in (0, 1):
        damage(a.directory / "meta", copy * RECORD_BYTES + 100)
    said = a.serve_fails().stderr
    assert "damaged" in said
    inspected = a.command("inspect", check=False)
    assert inspected.returncode == 1
    assert "damaged" in inspected.stdout + inspected.stderr
    assert a.command("status", check=False).returncode == 1


def test_metadata_of_another_version(cluster: Cluster) -> None:
    """Both copies say a version that this program does not know: refused, and not called damaged."""
    a = cluster.standalone()
    meta = a.directory / "meta"
    # A record: magic (4 bytes), version (u16), ..., CRC-32C of all before it in the last 4 of its 4096 bytes.
    with meta.open("r+b") as file:
        for copy in (0, 1):
            file.seek(copy * RECORD_BYTES)
            record = bytearray(file.read(RECORD_BYTES))
            (version,) = struct.unpack_from("<H", record, 4)
            struct.pack_into("<H", record, 4, version + 100)
            struct.pack_into("<I", record, RECORD_BYTES - 4, CRC_32C(bytes(record[:-4])))
            file.seek(copy * RECORD_BYTES)
            file.write(record)
    said = a.serve_fails().stderr
    assert f"version {version + 100}" in said
    inspected = a.command("inspect", check=False)
    assert inspected.returncode == 1
    assert "version" in inspected.stdout + inspected.stderr


def test_a_truncated_metadata_file(cluster: Cluster) -> None:
    """One copy of the superblock is left: nothing else is trusted, and the file is made whole again."""
    a = cluster.standalone().serve()
    a.allow("damaged|can't be read")
    with a.client() as client:
        client.pwrite(b"kept" * 128, 0)
    a.stop()
    meta = a.directory / "meta"
    length = meta.stat().st_size
    os.truncate(meta, 6000)
    assert nbdmirror("inspect", a.directory, check=False).returncode == 1
    a.serve()
    assert "damaged" in a.log()
    with a.client() as client:
        assert bytes(client.pread(4, 0)) == b"kept"
    a.stop()
    assert meta.stat().st_size == length
    assert nbdmirror("inspect", a.directory).returncode == 0


@pytest.mark.parametrize("length", [0, 100])
def test_an_empty_metadata_file(cluster: Cluster, length: int) -> None:
    a = cluster.standalone()
    os.truncate(a.directory / "meta", length)
    said = a.serve_fails().stderr
    assert "meta" in said
    assert nbdmirror("inspect", a.directory, check=False).returncode == 1


def test_a_damaged_log_makes_everything_suspect(cluster: Cluster, rng: random.Random) -> None:
    """After a crash the log can't tell what may differ: all is compared, and it is said."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(PEER_LOST, "damaged|log|crash|promot|must not")
    history = new_history(rng)
    writer = Writer(a, history, depth=16, blocks=8000, flush_every=200)
    cluster.at_end(writer.close)
    writer.wait_answers(800)
    a.kill()
    writer.ended_by_loss()
    # The ring begins behind the two superblocks; two damaged records are more than one torn by the crash.
    for record in (2, 3, 4):
        damage(a.directory / "meta", record * RECORD_BYTES + 50, 64)
    b.promote()
    a.serve()
    assert "damaged" in a.log()
    a.wait_in_step(30)
    b.wait_in_step(30)
    assert b.status()["last_resync"]["dirty_bytes"] == 64 * MIB
    assert_equal_copies(a, b)
    history.assert_in_file(a.data_path)


def test_a_damaged_map_makes_its_extents_dirty(cluster: Cluster, rng: random.Random) -> None:
    """A page of the dirty map is damaged while the peer is away: what it covered is synced whole."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(PEER_LOST, "damaged|map|crash|alone|no answer")
    b.stop()
    data = rng.randbytes(MIB)
    with a.client() as client:
        client.pwrite(data, 0)
        client.flush()
    a.stop()
    meta = a.directory / "meta"
    # The map ends the file: its last page is as good as any when the volume is this small, and so is every other.
    damage(meta, meta.stat().st_size - RECORD_BYTES + 200)
    a.configure(wait_for_peer_s=0.3)
    a.serve("--primary")
    assert "damaged" in a.log()
    b.serve()
    a.wait_in_step(30)
    assert_equal_copies(a, b)
    assert a.status()["last_resync"]["dirty_bytes"] >= MIB

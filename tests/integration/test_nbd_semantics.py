"""What the NBD protocol promises, asked by clients that others wrote, of a volume that stands alone."""

import contextlib
import errno
import itertools
import json
import os
import random
import signal
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.integration.clients import fio
from tests.integration.cluster import Cluster, Replica
from tests.integration.processes import free_port, run, wait_for

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 4 * KIB
HOLE_AND_ZERO = nbd.STATE_HOLE | nbd.STATE_ZERO


@pytest.fixture
def volume(cluster: Cluster) -> Replica:
    return cluster.standalone("64M").serve()


def block_status(handle: Any, length: int, offset: int, flags: int = 0) -> list[tuple[int, int]]:
    """(length, flags) of the extents of a range, neighbours of one kind merged."""
    extents: list[tuple[int, int]] = []

    def extent(_context: str, _offset: int, entries: list[int], _error: Any) -> int:
        extents.extend(zip(entries[::2], entries[1::2], strict=True))
        return 0

    handle.block_status(length, offset, extent, flags)
    return [
        (sum(size for size, _ in group), kind)
        for kind, group in ((kind, list(group)) for kind, group in itertools.groupby(extents, lambda pair: pair[1]))
    ]


def whole_map(handle: Any) -> list[tuple[int, int, int]]:
    """(offset, length, flags) of the whole volume; a server may answer for less than it was asked for."""
    found: list[tuple[int, int, int]] = []
    offset = 0
    while offset < handle.get_size():
        for length, kind in block_status(handle, handle.get_size() - offset, offset):
            found.append((offset, length, kind))
            offset += length
    return found


# -- what the server says of itself ------------------------------------------------------------------------------------


def test_nbdinfo_shows_what_is_true(volume: Replica) -> None:
    (export,) = json.loads(run(["nbdinfo", "--json", volume.uri]).stdout)["exports"]
    assert export["export-name"] == "vol"
    assert export["export-size"] == 64 * MIB
    for ability in ("flush", "fua", "multi_conn", "trim", "zero", "cache", "df"):
        assert export[f"can_{ability}"] is True, ability
    assert isinstance(export["can_fast_zero"], bool)
    assert export["is_read_only"] is False
    assert export["is_rotational"] is False
    assert "base:allocation" in export["contexts"]
    sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [1, BLOCK, 32 * MIB]
    for ability in ("read-only", "rotational"):
        assert run(["nbdinfo", "--is", ability, volume.uri], check=False).returncode == 2
    assert "hole,zero" in run(["nbdinfo", "--map", volume.uri]).stdout


def test_exports_are_the_volume_and_its_empty_name(volume: Replica) -> None:
    anywhere = f"nbd+unix:///?socket={volume.socket_path}"
    listed = json.loads(run(["nbdinfo", "--list", "--json", anywhere]).stdout)["exports"]
    assert [export["export-name"] for export in listed] == ["vol"]
    assert run(["nbdinfo", "--size", anywhere]).stdout.strip() == str(64 * MIB)
    volume.allow("there is no export 'other'")
    refused = run(["qemu-img", "info", f"nbd+unix:///other?socket={volume.socket_path}"], check=False)
    assert refused.returncode == 1
    assert "there is no export 'other', only 'vol'" in refused.stderr
    volume.wait_log("WARNING.*refused process [0-9]+.*there is no export 'other'")


# -- contents ----------------------------------------------------------------------------------------------------------


def zero_fast(handle: Any, length: int, offset: int, flags: int) -> bool:
    """Whether the server could zero the range quickly; it must not have touched it otherwise."""
    try:
        handle.zero(length, offset, flags | nbd.CMD_FLAG_FAST_ZERO)
    except nbd.Error as error:
        if error.errnum != errno.ENOTSUP:
            raise
        return False
    return True


def random_request(handle: Any, model: bytearray, rng: random.Random) -> None:
    """One request of any kind and alignment, on the volume and on the model."""
    length = rng.choice((1, 511, 512, BLOCK, rng.randrange(1, 200 * KIB)))
    offset = rng.randrange(len(model) - length)
    if rng.random() < 0.3:
        offset = offset // BLOCK * BLOCK
        length = min(-(-length // BLOCK) * BLOCK, len(model) - offset)
    fua = rng.choice((0, nbd.CMD_FLAG_FUA))
    written: bytes | None = bytes(length)
    match rng.choice(("write", "write", "zero", "zero fast", "trim", "flush", "read", "read", "cache")):
        case "write":
            written = rng.randbytes(length)
            handle.pwrite(written, offset, fua)
        case "zero":
            handle.zero(length, offset, fua | rng.choice((0, nbd.CMD_FLAG_NO_HOLE)))
        case "zero fast" if handle.can_fast_zero() and zero_fast(handle, length, offset, fua):
            pass
        case "trim":
            handle.trim(length, offset, fua)
        case "flush":
            handle.flush()
            written = None
        case "cache":
            handle.cache(length, offset)
            written = None
        case _:
            assert handle.pread(length, offset) == model[offset : offset + length]
            written = None
    if written is not None:
        model[offset : offset + length] = written


def test_every_request_at_every_alignment(volume: Replica, rng: random.Random) -> None:
    """Random requests of all kinds on two connections, against a model in memory; then against the data file."""
    model = bytearray(4 * MIB)
    with volume.client() as one, volume.client() as two:
        for _ in range(800):
            random_request(rng.choice((one, two)), model, rng)
        assert two.pread(len(model), 0) == model
        one.flush()
        with volume.data_path.open("rb") as data_file:
            assert data_file.read(len(model)) == model


def test_the_largest_requests(volume: Replica, rng: random.Random) -> None:
    data = rng.randbytes(MIB) * 32
    with volume.client() as handle:
        handle.pwrite(data, 64 * MIB - len(data))
        assert handle.pread(len(data), 64 * MIB - len(data)) == data
        handle.set_strict_mode(0)
        for request in (lambda: handle.pread(BLOCK, 64 * MIB), lambda: handle.zero(2, 64 * MIB - 1)):
            with pytest.raises(nbd.Error) as refused:
                request()
            assert refused.value.errnum in (errno.EINVAL, errno.ENOSPC)
        assert handle.pread(1, 64 * MIB - 1) == data[-1:]
    volume.allow("invalid request")


def test_zeroes_and_trims_of_gigabytes(cluster: Cluster) -> None:
    volume = cluster.standalone("6G").serve()
    marks = (0, 4 * GIB - MIB, 5 * GIB)
    with volume.client() as handle:
        for request in (handle.zero, handle.trim):
            for mark in marks:
                handle.pwrite(b"x" * MIB, mark)
            request(4 * GIB - BLOCK, BLOCK)
            assert handle.pread(BLOCK, 0) == b"x" * BLOCK
            assert handle.pread(MIB, 4 * GIB - MIB) == bytes(MIB)
            assert handle.pread(MIB, 5 * GIB) == b"x" * MIB
    with volume.client() as handle:
        handle.flush()
    assert volume.data_path.stat().st_blocks * 512 < 16 * MIB


def test_zeroes_without_leave_to_trim_keep_their_space(volume: Replica) -> None:
    def allocated() -> int:
        with volume.client() as handle:
            handle.flush()
        return volume.data_path.stat().st_blocks * 512

    with volume.client() as handle:
        handle.pwrite(b"x" * (8 * MIB), 0)
        handle.flush()
        handle.zero(4 * MIB, 0, nbd.CMD_FLAG_NO_HOLE)
        assert handle.pread(8 * MIB, 0) == bytes(4 * MIB) + b"x" * (4 * MIB)
    assert allocated() >= 8 * MIB
    with volume.client() as handle:
        handle.zero(4 * MIB, 4 * MIB)
        assert handle.pread(8 * MIB, 0) == bytes(8 * MIB)
    assert allocated() < 8 * MIB


# -- block status ------------------------------------------------------------------------------------------------------


def test_block_status_follows_the_sparse_file(volume: Replica) -> None:
    with volume.client() as handle:
        assert whole_map(handle) == [(0, 64 * MIB, HOLE_AND_ZERO)]
        handle.pwrite(b"x" * (64 * KIB), MIB)
        handle.pwrite(b"x" * (64 * KIB), 2 * MIB)
        handle.flush()
        data = [(offset, length) for offset, length, kind in whole_map(handle) if not kind]
        assert data == [(MIB, 64 * KIB), (2 * MIB, 64 * KIB)]
        handle.trim(64 * KIB, MIB)
        data = [(offset, length) for offset, length, kind in whole_map(handle) if not kind]
        assert data == [(2 * MIB, 64 * KIB)]
        ((length, kind),) = block_status(handle, 8 * MIB, 0, nbd.CMD_FLAG_REQ_ONE)
        assert (length, kind) == (2 * MIB, HOLE_AND_ZERO)
        ((length, kind),) = block_status(handle, BLOCK, 2 * MIB + BLOCK, nbd.CMD_FLAG_REQ_ONE)
        assert (length, kind) == (BLOCK, 0)


def test_block_status_of_a_badly_fragmented_file(volume: Replica) -> None:
    with volume.client() as handle:
        offsets = range(0, 64 * MIB, 8 * KIB)
        for offset in offsets:
            handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"x" * BLOCK)), offset, lambda _error: 1)
            while handle.aio_in_flight() >= 32:
                handle.poll(-1)
        while handle.aio_in_flight():
            handle.poll(-1)
        handle.flush()
        assert [offset for offset, _, kind in whole_map(handle) if not kind] == list(offsets)


# -- other clients -----------------------------------------------------------------------------------------------------


def test_qemu_io(volume: Replica) -> None:
    def qemu_io(*commands: str) -> str:
        words = itertools.chain.from_iterable(("-c", command) for command in commands)
        said = run(["qemu-io", "-f", "raw", "-d", "unmap", *words, volume.uri]).stdout
        assert "failed" not in said, said
        return said

    qemu_io(
        "write -P 0xab 0 1M",
        "write -f -P 0xcd 1M 64k",
        "flush",
        "read -P 0xab 0 1M",
        "read -P 0xcd 1M 64k",
        "write -z 512k 64k",
        "write -z -u 600k 100k",
        "discard 900k 124k",
        "aio_write -P 0x11 2M 1M",
        "aio_write -P 0x22 3M 1M",
        "aio_flush",
        "write -P 0x33 4097 1023",
    )
    qemu_io(  # another process, so nothing comes from a cache
        "read -P 0xab 8192 516096",
        "read -P 0 512k 64k",
        "read -P 0 600k 100k",
        "read -P 0 900k 124k",
        "read -P 0xcd 1M 64k",
        "read -P 0x11 2M 1M",
        "read -P 0x22 3M 1M",
        "read -P 0x33 4097 1023",
        "read -P 0xab 0 4097",
    )


def sparse_image(path: Path, rng: random.Random) -> None:
    with path.open("wb") as image:
        image.truncate(64 * MIB)
        for offset in rng.sample(range(0, 64 * MIB, 128 * KIB), 60):
            image.seek(offset)
            image.write(rng.randbytes(rng.randrange(1, 128 * KIB)))


def test_nbdcopy_and_qemu_img_move_an_image_in_and_out(volume: Replica, tmp_path: Path, rng: random.Random) -> None:
    image, back = tmp_path / "image", tmp_path / "back"
    sparse_image(image, rng)
    run(["nbdcopy", "--connections=4", "--requests=16", "--flush", image, volume.uri])
    run(["qemu-img", "compare", "-f", "raw", "-F", "raw", image, volume.uri])
    assert volume.data_path.stat().st_blocks * 512 < 32 * MIB, "holes were not kept"
    run(["nbdcopy", "--connections=4", volume.uri, back])
    run(["cmp", image, back])
    allocated = json.loads(run(["qemu-img", "map", "--output=json", "-f", "raw", volume.uri]).stdout)
    assert sum(entry["length"] for entry in allocated) == 64 * MIB
    assert sum(entry["length"] for entry in allocated if entry["data"]) < 32 * MIB

    sparse_image(image, rng)
    run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", image, volume.uri])
    run(["qemu-img", "convert", "-f", "raw", "-O", "raw", volume.uri, back])
    run(["cmp", image, back])


@pytest.mark.parametrize("depth", [1, 16])
def test_fio_finds_what_it_wrote(volume: Replica, depth: int) -> None:
    fio(
        volume.uri,
        *("--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned=0", "--size=32m", f"--iodepth={depth}"),
        *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--fsync=64", "--randrepeat=0"),
    )


# -- several connections -----------------------------------------------------------------------------------------------


def test_connections_see_each_other_at_once(volume: Replica, rng: random.Random) -> None:
    handles = [volume.connect_client() for _ in range(4)]
    assert all(handle.can_multi_conn() for handle in handles)
    for _ in range(200):
        writer, reader, flusher = (rng.choice(handles) for _ in range(3))
        offset, data = rng.randrange(64 * MIB - BLOCK), rng.randbytes(BLOCK)
        writer.pwrite(data, offset)
        assert reader.pread(BLOCK, offset) == data
        if rng.random() < 0.1:
            flusher.flush()
    for handle in handles:
        handle.shutdown()


def test_one_client_at_a_time(volume: Replica) -> None:
    volume.allow("another client is attached")
    with volume.client(), volume.client():
        refused = run(["qemu-img", "info", volume.uri], check=False)
        assert refused.returncode == 1
        holder = f"another client is attached: process {os.getpid()} "
        assert holder in refused.stderr
        assert "with 2 connections" in refused.stderr
        volume.wait_log(f"WARNING.*refused process [0-9]+ .*{holder}")
    for _ in range(5):  # hanging up is enough: the next client waits until the last one is drained
        with volume.client() as handle:
            handle.pwrite(b"x" * BLOCK, 0)
        run(["nbdinfo", "--size", volume.uri])


def test_a_client_that_died_is_no_holder(volume: Replica) -> None:
    program = "import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]); print('in', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        ["/usr/bin/python3", "-c", program, volume.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"in\n"
        volume.allow("another client is attached")
        assert run(["nbdinfo", "--size", volume.uri], check=False).returncode == 1
    finally:
        holder.kill()
        holder.communicate()
    run(["nbdinfo", "--size", volume.uri])


def test_shared_lets_others_in(cluster: Cluster) -> None:
    volume = cluster.standalone("64M").serve("--shared")
    with volume.client() as handle:
        handle.pwrite(b"x" * BLOCK, 0)
        run(["qemu-io", "-f", "raw", "-c", "read -P 0x78 0 4096", "-c", "write -P 0x79 0 4096", volume.uri])
        assert handle.pread(BLOCK, 0) == b"y" * BLOCK


def test_on_tcp_a_client_is_an_address(cluster: Cluster) -> None:
    port = free_port()
    volume = cluster.standalone("64M").serve("--nbd", f"tcp:127.0.0.1:{port}")

    def connect(source: str) -> Any:
        handle = nbd.NBD()
        handle.set_export_name("vol")
        end = socket.create_connection(("127.0.0.1", port), 10.0, (source, 0))
        end.setblocking(False)
        handle.connect_socket(end.detach())
        return handle

    volume.allow("another client is attached")
    one = connect("127.0.0.1")
    run(["nbdinfo", "--size", f"nbd://127.0.0.1:{port}/vol"])  # another process, the same address
    with pytest.raises(nbd.Error):
        connect("127.0.0.2")
    volume.wait_log(r"refused address 127\.0\.0\.2: another client is attached: address 127\.0\.0\.1 with 1 connection")
    one.shutdown()
    connect("127.0.0.2").shutdown()


# -- hanging up --------------------------------------------------------------------------------------------------------


def test_clients_that_hang_up_in_the_middle_do_no_harm(volume: Replica, rng: random.Random) -> None:
    volume.allow("nbdkit: .*(write reply|write data|read request|read data):")
    pid = volume.nbdkit_pid
    for number in range(30):
        handle = volume.connect_client()
        for offset in range(0, 64 * BLOCK, BLOCK):
            handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(rng.randbytes(BLOCK))), offset)
        handle.aio_pread(nbd.Buffer(8 * MIB), 0)
        if number % 2:
            handle.aio_flush()
        del handle  # closes the socket with all of that on the way
    with volume.client(timeout_s=10.0) as handle:
        handle.pwrite(b"x" * BLOCK, 0)
        assert handle.pread(BLOCK, 0) == b"x" * BLOCK
    assert volume.nbdkit_pid == pid


def test_a_stop_cuts_idle_clients_without_an_answer(volume: Replica) -> None:
    handle = volume.connect_client()
    handle.pwrite(b"x" * BLOCK, 0)
    assert volume.stop() < 5.0
    wait_for(lambda: handle.poll(0) < 0 or handle.aio_is_dead() or handle.aio_is_closed(), 5.0, "the connection to end")
    assert volume.data_path.read_bytes()[:BLOCK] == b"x" * BLOCK


class BareClient:
    """A client of a few bytes, which sees every byte that the server sends, and when it hangs up."""

    def __init__(self, replica: Replica) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10.0)
        self.socket.connect(str(replica.socket_path))
        self.received = self.socket.makefile("rb")
        self.received.read(18)  # the server's greeting
        name = replica.name.encode()
        self.socket.sendall(struct.pack(">I", 3))  # fixed newstyle, no zeroes
        self.socket.sendall(struct.pack(">QII", 0x49484156454F5054, 7, len(name) + 6))  # NBD_OPT_GO
        self.socket.sendall(struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
        kind = 0
        while kind != 1:  # NBD_REP_ACK
            _, _, kind, length = struct.unpack(">QIII", self.received.read(20))
            assert kind < 1 << 31, "the server refuses"
            self.received.read(length)

    def write(self, cookie: int, offset: int, data: bytes) -> None:
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, cookie, offset, len(data)) + data)

    def answer(self) -> tuple[int, int]:
        """(cookie, error) of the next answer."""
        _, error, cookie = struct.unpack(">IIQ", self.received.read(16))
        return cookie, error

    def rest(self) -> bytes:
        """Everything that the server sends until it hangs up."""
        got = b""
        with contextlib.suppress(ConnectionResetError):  # it hung up with requests unread
            while part := self.received.read1():
                got += part
        return got

    def close(self) -> None:
        self.received.close()
        self.socket.close()


def test_requests_that_are_cut_off_get_no_answer_of_any_kind(cluster: Cluster) -> None:
    """An error would end a mounted filesystem; a lost connection is waited for (invariant silent-not-error)."""
    a, b = cluster.pair("64M", peer_timeout_s=30.0)
    for replica in (a, b):
        replica.allow(".")
    busy, idle = BareClient(a), BareClient(a)
    for client in (busy, idle):
        cluster.at_end(client.close)
    busy.write(1, 0, b"x" * BLOCK)
    assert busy.answer() == (1, 0)
    b.freeze()
    for cookie in range(2, 22):  # more than nbdkit has threads a connection: some are not even read
        busy.write(cookie, cookie * BLOCK, b"x" * BLOCK)
    assert a.stop() < 5.0
    assert busy.rest() == b""
    assert idle.rest() == b""


def test_nbdkit_that_is_told_to_end_stops_in_order(volume: Replica) -> None:
    """Nobody should signal nbdkit itself; a service manager that signals a whole group does. The parent goes on."""
    with volume.client() as handle:
        handle.pwrite(b"x" * BLOCK, 0)
    pid = volume.nbdkit_pid
    volume.allow("aborting sleep because of server shut down", "starting it again")
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: volume.nbdkit_pids() not in ([pid], []), 10.0, "a new nbdkit")
    with volume.client(timeout_s=10.0) as handle:
        assert handle.pread(BLOCK, 0) == b"x" * BLOCK

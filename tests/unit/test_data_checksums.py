"""The checksum of a client's data: taken when the write enters the primary, checked before the secondary writes."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import crcmod.predefined
import lz4.block
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirror import primary as primary_module
from mirror import secondary as secondary_module
from mirror import sync
from mirror.core import layout, wire
from mirror.core.spin import Spin
from mirror.link import Stream
from nbd_server.volume import Volume
from tests.pair import pair, peer_of, session_of, wait_ended, wait_in_step

reference = crcmod.predefined.mkPredefinedCrcFun("crc-32c")
BLOCK = bytes(range(256)) * 16

# RFC 3720 (iSCSI), B.4.
VECTORS = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (b"123456789", 0xE3069283),
]


# -- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "checksum"), VECTORS)
def test_known_answers(data: bytes, checksum: int) -> None:
    assert wire.crc32c(data) == reference(data) == checksum


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=5000), start=st.integers(0, 64), more=st.integers(0, 3))
def test_the_hardware_and_the_reference_agree(data: bytes, start: int, more: int) -> None:
    data = data * (1 + more)
    expected = reference(data[start:])
    for same in (data[start:], bytearray(data)[start:], memoryview(data)[start:], memoryview(bytearray(data))[start:]):
        assert wire.crc32c(same) == expected


def test_the_hardware_does_it() -> None:
    assert crc32c.hardware_based
    # One function for records, headers, payloads and what the write path takes at its entry.
    assert wire._crc is crc32c.crc32c
    assert layout.crc32c.crc32c is crc32c.crc32c
    assert primary_module.crc32c is wire.crc32c


POLYNOMIAL = 0x11EDC6F41


def syndromes(bits: int) -> list[int]:
    """What a single flipped bit, so many bits from the end, changes in the checksum."""
    found = []
    remainder = 1
    for _ in range(bits):
        found.append(remainder)
        remainder <<= 1
        if remainder >> 32:
            remainder ^= POLYNOMIAL
    return found


def test_up_to_three_flipped_bits_and_any_burst_of_32_are_found_in_a_record() -> None:
    """CRC-32C is linear, so what it misses depends on the flipped bits alone, not on the contents."""
    found = syndromes(8 * layout.RECORD_BYTES)
    # None is 0 (one bit), no two are equal (two bits); an even polynomial finds every odd number of bits (three).
    assert 0 not in found
    assert len(set(found)) == len(found)
    assert POLYNOMIAL.bit_count() % 2 == 0
    # A burst is a polynomial of a degree below 32 times a power of x, which the polynomial, odd at x^0, can't divide.
    assert POLYNOMIAL & 1
    # And the library computes that polynomial: its checksums differ by the syndrome of what was flipped.
    record = bytearray(layout.RECORD_BYTES)
    clean = wire.crc32c(record)
    for bit in (0, 1, 7, 8, 4095, 20000, 8 * layout.RECORD_BYTES - 1):
        record[bit // 8] ^= 1 << bit % 8
        difference = wire.crc32c(record) ^ clean
        record[bit // 8] ^= 1 << bit % 8
        # In this order of bits the first to be divided is bit 0 of byte 0; the register is reflected.
        behind = 8 * layout.RECORD_BYTES - 1 - bit
        assert int(f"{difference:032b}"[::-1], 2) == multiply(found[behind])


def multiply(remainder: int) -> int:
    """Times x^32: the checksum itself stands behind the data."""
    for _ in range(32):
        remainder <<= 1
        if remainder >> 32:
            remainder ^= POLYNOMIAL
    return remainder


def test_up_to_five_flipped_bits_are_found_in_a_header() -> None:
    """A header is short: no four of its bits cancel out either; five are odd."""
    found = syndromes(8 * wire.HEADER_BYTES)
    pairs = {one ^ other for one, other in itertools.combinations(found, 2)}
    assert len(pairs) == len(found) * (len(found) - 1) // 2


# -- end to end -------------------------------------------------------------------------------------------------------


def watch_writes(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """All that this replica's disk is told to write from now on."""
    store = volume._replica.store
    really_write, written = store.write, list[bytes]()

    def write(data: memoryview, *where: Any) -> None:
        written.append(bytes(data))
        really_write(data, *where)

    monkeypatch.setattr(store, "write", write)
    return written


def before_the_next_send(volume: Volume, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Run `act` once, where a change has entered and was not sent yet."""
    session = session_of(volume)
    really_borrow = session.borrow
    left = [act]
    writer = threading.current_thread()

    def borrow() -> Stream:
        # Proofs and flushes borrow streams too: this is about the thread that writes, or what it has queued.
        if left and (threading.current_thread() is writer or volume._primary._deferred._pending):
            left.pop()()
        return really_borrow()

    monkeypatch.setattr(session, "borrow", borrow)


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_a_bit_that_flips_between_entry_and_send_is_never_written_by_the_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    with pair(tmp_path, protocol) as (first, second):
        # Under A a write for whose answer nobody looks goes by the queue.
        first._primary.spin = Spin("off")
        first.write(memoryview(BLOCK), 0, False)
        # Nothing of it is on its way or parked.
        first.flush()
        written = watch_writes(second, monkeypatch)
        buffer = bytearray(BLOCK[::-1])
        flipped = bytes([buffer[0] ^ 1]) + bytes(buffer[1:])
        whole = bytes(buffer)

        def flip() -> None:
            # No new session before what the old one wrote was looked at.
            for volume in (first, second):
                peer_of(volume)._wanted = False
            if protocol == "A":
                (pending,) = first._primary._deferred._pending.values()
                assert pending.payload == whole
                pending.payload = flipped
            else:
                buffer[0] ^= 1

        before_the_next_send(first, monkeypatch, flip)
        sessions = session_of(first), session_of(second)
        first.write(memoryview(buffer), 4096, False)
        # On the secondary by its own finding, on the primary because its peer hung up.
        assert "damaged" in wait_ended(second, sessions[1])
        wait_ended(first, sessions[0])
        assert written == []
        for volume in (first, second):
            volume.connect(False)
        wait_in_step(first)
        wait_in_step(second)
        a, b = ((tmp_path / name / "data").read_bytes() for name in "ab")
        assert a == b
        if protocol == "A":
            # What the client was told is there, on both: the next session brought it from the primary's disk.
            assert a[4096:8192] == whole


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_data_is_summed_once_by_each_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    with pair(tmp_path, protocol) as (first, _):
        summed: list[int] = []

        def count(data: bytes) -> int:
            summed.append(len(data))
            checksum: int = crc32c.crc32c(data)
            return checksum

        monkeypatch.setattr(wire, "_crc", count)
        # Of a length that nothing else has, such as the digests of a proof.
        first.write(memoryview(BLOCK)[:3333], 0, False)
        first._primary.wait_applied()
        monkeypatch.undo()
        assert summed.count(3333) == 2


def test_a_bit_that_flips_while_data_is_unpacked_is_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync.Compression, "wanted", lambda _: True)
    really_unpack = lz4.block.decompress
    flips = [True]

    def unpack(*arguments: Any, **options: Any) -> bytes:
        data = really_unpack(*arguments, **options)
        return bytes([data[0] ^ 1]) + data[1:] if flips and flips.pop() else data

    monkeypatch.setattr(secondary_module.lz4.block, "decompress", unpack)
    content = b"compressible" * 4096
    with pair(tmp_path) as (first, second):
        first.disconnect()
        first.write(memoryview(content), 0, False)
        written = watch_writes(second, monkeypatch)
        first.connect(False)
        wait_in_step(first)
        wait_in_step(second)
        assert not flips
        assert all(one[:1] == b"c" for one in written)
        assert (tmp_path / "b" / "data").read_bytes()[: len(content)] == content

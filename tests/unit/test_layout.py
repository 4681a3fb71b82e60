"""The records of the metadata file: whole, truncated, with each bit flipped, and as garbage."""

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import crc32c
import crcmod.predefined
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirror.core import layout
from mirror.core.errors import DamagedRecord, MirrorError, UnknownVersion
from mirror.core.generation import Kind
from mirror.core.layout import (
    Geometry,
    LogRecord,
    Superblock,
    blank_log_record,
    decode_log_record,
    decode_map_page,
    decode_superblock,
    decode_suspects_page,
    decode_unproven_page,
    encode_log_record,
    encode_map_page,
    encode_superblock,
    encode_suspects_page,
    encode_unproven_page,
    ring_position,
)
from mirror.core.limits import (
    BLOCK_BYTES,
    BLOCKS_PER_EXTENT,
    EXTENT_BYTES,
    EXTENTS_PER_PAGE,
    HISTORY_MAX,
    LOG_CHANGES_MAX,
    LOG_RING_RECORDS,
    LOG_SLICE,
    LOG_SLOTS_MAX,
    RECORD_BYTES,
)
from mirror.core.states import DiskState

SUPERBLOCK = Superblock(
    sequence=7,
    name="vol-1",
    size_bytes=10 * EXTENT_BYTES,
    replica_id=bytes(range(16)),
    volume_id=bytes(16),
    kind=Kind.ESTABLISHED,
    disk=DiskState.UP_TO_DATE,
    peer_disk=DiskState.OUTDATED,
    current=2**64 - 1,
    base=3,
    history=(3, 2, 1),
    primary=True,
    clean=False,
    met_peer=True,
    incarnation=5,
    boot_id=bytes(range(16, 32)),
    log_slots=1024,
    log_epoch=1,
    protocol="C",
    redundancy_lost_at=1.5e9,
    last_resync={"started": "2024-01-01T00:00:00Z", "dirty_bytes": 4096, "seconds": 0.25},
    next_size_bytes=11 * EXTENT_BYTES,
    last_verify={"started": 1.5e9, "ended": 1.6e9, "checked_bytes": 4096, "differing_bytes": 0, "result": "equal"},
)
LOG_RECORD = LogRecord(
    epoch=3, sequence=70, slots=400, changes=((5, 77), (399, None)), rotating=((160, 1), (161, None))
)

u64 = st.integers(0, 2**64 - 1)
notes = st.none() | st.dictionaries(
    st.text(max_size=12),
    st.text(max_size=10) | st.integers(0, 2**63) | st.floats(allow_nan=False, allow_infinity=False),
    max_size=3,
)
superblocks = st.builds(
    Superblock,
    sequence=u64,
    name=st.from_regex(r"[A-Za-z0-9._-]{1,63}", fullmatch=True),
    size_bytes=st.integers(1, 2**41).map(lambda blocks: blocks * BLOCK_BYTES),
    next_size_bytes=st.just(0) | st.integers(2**41 + 1, 2**41 + 99).map(lambda blocks: blocks * BLOCK_BYTES),
    replica_id=st.binary(min_size=16, max_size=16).filter(any),
    volume_id=st.binary(min_size=16, max_size=16),
    kind=st.sampled_from(Kind),
    disk=st.sampled_from([disk for disk in DiskState if disk is not DiskState.CONSISTENT]),
    peer_disk=st.none() | st.sampled_from(DiskState),
    current=u64,
    base=u64,
    history=st.lists(st.integers(1, 2**64 - 1), max_size=HISTORY_MAX).map(tuple),
    primary=st.booleans(),
    clean=st.booleans(),
    met_peer=st.booleans(),
    incarnation=u64,
    boot_id=st.binary(min_size=16, max_size=16),
    log_slots=st.integers(1, LOG_SLOTS_MAX),
    log_epoch=st.integers(1, 2**64 - 1),
    protocol=st.sampled_from("ABC"),
    redundancy_lost_at=st.floats(0, 1e12),
    last_resync=notes,
    last_verify=notes,
)


@st.composite
def log_records(draw: st.DrawFn) -> LogRecord:
    slots = draw(st.integers(1, LOG_SLOTS_MAX))
    extents = st.none() | st.integers(0, 2**32 - 2)
    named = draw(st.lists(st.integers(0, slots - 1), unique=True, max_size=LOG_CHANGES_MAX))
    start = draw(st.integers(0, slots - 1))
    run = draw(st.integers(0, min(LOG_SLICE, slots - start)))
    return LogRecord(
        epoch=draw(u64),
        sequence=draw(u64),
        slots=slots,
        changes=tuple((slot, draw(extents)) for slot in named),
        rotating=tuple((slot, draw(extents)) for slot in range(start, start + run)),
    )


bitmaps = st.lists(st.integers(0, 2**BLOCKS_PER_EXTENT - 1), min_size=EXTENTS_PER_PAGE, max_size=EXTENTS_PER_PAGE)

# Every kind of record: name, one record, its decoder.
KINDS: list[tuple[str, bytes, Callable[[bytes], Any]]] = [
    ("superblock", encode_superblock(SUPERBLOCK), decode_superblock),
    ("log record", encode_log_record(LOG_RECORD), decode_log_record),
    ("map page", encode_map_page(4, [1, 2, 3]), lambda raw: decode_map_page(raw, 4)),
    ("suspects page", encode_suspects_page(4, [1, 2, 3]), lambda raw: decode_suspects_page(raw, 4)),
    ("unproven page", encode_unproven_page(4, 5), lambda raw: decode_unproven_page(raw, 4)),
]
every_kind = pytest.mark.parametrize(("raw", "decode"), [row[1:] for row in KINDS], ids=[row[0] for row in KINDS])


@settings(deadline=None)
@given(superblocks)
def test_a_superblock_survives_the_round_trip(block: Superblock) -> None:
    raw = encode_superblock(block)
    assert len(raw) == RECORD_BYTES
    assert decode_superblock(raw) == block


@settings(deadline=None, max_examples=50)
@given(log_records())
def test_a_log_record_survives_the_round_trip(record: LogRecord) -> None:
    raw = encode_log_record(record)
    assert len(raw) == RECORD_BYTES
    assert decode_log_record(raw) == record


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**40), bitmaps)
def test_a_map_page_survives_the_round_trip(index: int, bits: list[int]) -> None:
    raw = encode_map_page(index, bits)
    assert len(raw) == RECORD_BYTES
    assert decode_map_page(raw, index) == bits


def test_the_largest_records_fit() -> None:
    slots = LOG_SLOTS_MAX
    changes = tuple((slot, 2**32 - 2) for slot in range(LOG_CHANGES_MAX))
    rotating = tuple((slot, 2**32 - 2) for slot in range(slots - LOG_SLICE, slots))
    largest = LogRecord(2**64 - 1, 2**64 - 1, slots, changes, rotating)
    assert decode_log_record(encode_log_record(largest)) == largest
    full = [2**BLOCKS_PER_EXTENT - 1] * EXTENTS_PER_PAGE
    assert decode_map_page(encode_map_page(2**63, full), 2**63) == full
    block = dataclasses.replace(
        SUPERBLOCK,
        name="n" * 63,
        history=(2**64 - 1,) * HISTORY_MAX,
        last_resync={"x": "y" * 500},
        last_verify={"z": "y" * 500},
    )
    assert decode_superblock(encode_superblock(block)) == block


@every_kind
def test_every_flipped_bit_is_damage(raw: bytes, decode: Callable[[bytes], Any]) -> None:
    flipped = bytearray(raw)
    for bit in range(RECORD_BYTES * 8):
        flipped[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(DamagedRecord):
            decode(bytes(flipped))
        flipped[bit >> 3] ^= 1 << (bit & 7)
    assert decode(bytes(flipped)) == decode(raw)


@every_kind
def test_every_truncation_is_damage(raw: bytes, decode: Callable[[bytes], Any]) -> None:
    for length in range(RECORD_BYTES):
        with pytest.raises(DamagedRecord):
            decode(raw[:length])
        # The rest of a torn record is what stood there before: here nothing.
        if raw[length:].strip(b"\0"):
            with pytest.raises(DamagedRecord):
                decode(raw[:length].ljust(RECORD_BYTES, b"\0"))
    with pytest.raises(DamagedRecord):
        decode(raw + b"\0")


@every_kind
@pytest.mark.parametrize("filler", [b"\0", b"\xff", b"\x55"])
def test_a_record_that_was_never_written_is_damage(raw: bytes, decode: Callable[[bytes], Any], filler: bytes) -> None:
    with pytest.raises(DamagedRecord):
        decode(filler * RECORD_BYTES)


@pytest.mark.parametrize("index", range(len(KINDS)))
def test_a_record_of_another_kind_is_damage(index: int) -> None:
    for other, (_, raw, _) in enumerate(KINDS):
        if other != index:
            with pytest.raises(DamagedRecord, match="begins with"):
                KINDS[index][2](raw)


def seal(body: bytes) -> bytes:
    """What a record of any contents would look like."""
    return body + struct.pack("<I", crc32c.crc32c(body))


@every_kind
def test_the_checksum_is_crc_32c(raw: bytes, decode: Callable[[bytes], Any]) -> None:
    reference = crcmod.predefined.mkCrcFun("crc-32c")
    assert raw[-4:] == struct.pack("<I", reference(raw[:-4]))


@every_kind
@pytest.mark.parametrize("version", [0, 4, 65535])
def test_another_version_is_named(raw: bytes, decode: Callable[[bytes], Any], version: int) -> None:
    with pytest.raises(UnknownVersion) as caught:
        decode(seal(raw[:4] + struct.pack("<H", version) + raw[6:-4]))
    assert (caught.value.found, caught.value.known) == (version, layout.VERSIONS[raw[:4]])
    assert caught.value.remedy


def test_each_kind_of_record_has_a_version_of_its_own() -> None:
    assert {raw[:4]: struct.unpack("<H", raw[4:6])[0] for _, raw, _ in KINDS} == layout.VERSIONS


def test_a_superblock_of_version_1_knows_of_no_resize_and_no_verify() -> None:
    older = dataclasses.replace(SUPERBLOCK, next_size_bytes=0, last_verify=None)
    raw = encode_superblock(older)
    assert decode_superblock(seal(raw[:4] + struct.pack("<H", 1) + raw[6:-4])) == older
    # Whatever stands where version 1 had nothing is not looked at.
    raw = encode_superblock(SUPERBLOCK)
    assert decode_superblock(seal(raw[:4] + struct.pack("<H", 1) + raw[6:-4])) == older


@every_kind
def test_a_version_is_not_believed_without_the_checksum(raw: bytes, decode: Callable[[bytes], Any]) -> None:
    with pytest.raises(DamagedRecord):
        decode(raw[:4] + b"\x09" + raw[5:])


def decodes_or_is_damage(decode: Callable[[bytes], Any], body: bytes) -> bool:
    """Behind a right magic and version, under a right checksum, no field may be trusted to be in bounds."""
    try:
        decode(seal(body))
    except DamagedRecord:
        return False
    return True


@every_kind
@pytest.mark.parametrize("filler", [b"\x00", b"\xff", b"\x7f", b"\x01"])
def test_every_field_may_hold_nonsense(raw: bytes, decode: Callable[[bytes], Any], filler: bytes) -> None:
    outcomes = {
        decodes_or_is_damage(decode, (raw[:start] + filler * width + raw[start + width :])[:-4])
        for start in range(6, 700)
        for width in (1, 2, 4)
    }
    assert True in outcomes


@every_kind
@settings(deadline=None)
@given(start=st.integers(6, 40) | st.integers(6, 700), garbage=st.binary(max_size=400))
def test_random_bytes_end_in_a_record_or_a_named_error(
    raw: bytes, decode: Callable[[bytes], Any], start: int, garbage: bytes
) -> None:
    with pytest.raises(MirrorError):
        decode(garbage.ljust(RECORD_BYTES, b"\0"))
    decodes_or_is_damage(decode, raw[:start] + garbage + raw[start + len(garbage) : -4])


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "n" * 64},
        {"name": "a/b"},
        {"name": "ä"},
        {"name": "a\n"},
        {"size_bytes": 0},
        {"size_bytes": BLOCK_BYTES + 1},
        {"size_bytes": 2**63},
        {"size_bytes": 12 * EXTENT_BYTES},
        {"replica_id": bytes(16)},
        {"volume_id": b"short"},
        {"disk": DiskState.CONSISTENT},
        {"history": (1,) * (HISTORY_MAX + 1)},
        {"history": (1, 0)},
        {"current": 2**64},
        {"base": -1},
        {"log_slots": 0},
        {"log_slots": LOG_SLOTS_MAX + 1},
        {"log_epoch": 0},
        {"protocol": "D"},
        {"redundancy_lost_at": float("nan")},
        {"next_size_bytes": 10 * EXTENT_BYTES},
        {"next_size_bytes": 10 * EXTENT_BYTES + 1},
        {"next_size_bytes": 2**63},
        {"last_verify": {"x": "y" * 600}},
        {"last_resync": {"x": "y" * 600}},
        {"last_resync": {"x": float("inf")}},
        {"last_resync": {"x": [1]}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_superblock_that_cannot_be_right_is_never_written(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        encode_superblock(dataclasses.replace(SUPERBLOCK, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"changes": ((400, 1),)},
        {"changes": ((1, 1), (1, 2))},
        {"changes": ((1, 2**32 - 1),)},
        {"changes": tuple((slot, 1) for slot in range(LOG_CHANGES_MAX + 1)), "slots": 8192},
        {"rotating": ((1, 1), (3, 1))},
        {"rotating": ((399, 1), (400, 1))},
        {"slots": LOG_SLOTS_MAX + 1},
        {"sequence": -1},
    ],
)
def test_a_log_record_that_cannot_be_right_is_never_written(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        encode_log_record(dataclasses.replace(LOG_RECORD, **changes))


def test_a_page_at_another_pages_place_is_damage() -> None:
    with pytest.raises(DamagedRecord, match="it is page 4"):
        decode_map_page(encode_map_page(4, []), 5)


def test_a_page_may_hold_fewer_extents_at_the_end_of_the_volume() -> None:
    assert decode_map_page(encode_map_page(0, [9]), 0) == [9] + [0] * (EXTENTS_PER_PAGE - 1)
    with pytest.raises(AssertionError):
        encode_map_page(0, [0] * (EXTENTS_PER_PAGE + 1))


def test_a_blank_log_record_belongs_to_no_epoch() -> None:
    assert decode_log_record(blank_log_record()).epoch == 0


def test_the_ring_less_one_record_names_every_slot_of_the_largest_log() -> None:
    assert -(-LOG_SLOTS_MAX // LOG_SLICE) <= LOG_RING_RECORDS - 1
    assert sorted(ring_position(sequence) for sequence in range(5, 5 + LOG_RING_RECORDS)) == list(
        range(LOG_RING_RECORDS)
    )


@pytest.mark.parametrize("extents", [1, 30, 31, 32, 62, 63, 1000])
@pytest.mark.parametrize("partial", [0, BLOCK_BYTES])
def test_records_have_places_that_do_not_overlap(extents: int, partial: int) -> None:
    geometry = Geometry(extents * EXTENT_BYTES - partial)
    assert geometry.extents == extents
    places = [
        *geometry.superblock_offsets,
        *(geometry.log_record_offset(position) for position in range(LOG_RING_RECORDS)),
        *(geometry.map_page_offset(index) for index in range(geometry.pages)),
    ]
    assert places == list(range(0, geometry.metadata_bytes, RECORD_BYTES))
    pages = [geometry.extents_of_page(index) for index in range(geometry.pages)]
    assert [extent for page in pages for extent in page] == list(range(extents))
    assert all(geometry.page_of_extent(extent) == index for index, page in enumerate(pages) for extent in page)

"""Every combination of what a start may find in the metadata."""

import dataclasses
import itertools
import struct

import crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirror.core import recovery
from mirror.core.activity_log import DamagedLog, Rebuilt
from mirror.core.errors import UnknownVersion
from mirror.core.generation import Kind
from mirror.core.layout import Superblock, decode_superblock, encode_superblock
from mirror.core.limits import EXTENT_BYTES, LOG_RING_RECORDS, RECORD_BYTES
from mirror.core.recovery import Copy, Dirty, Log, choose_superblock, classify
from mirror.core.states import DiskState

BLOCK = Superblock(
    sequence=7,
    name="vol",
    size_bytes=1 << 20,
    replica_id=bytes(range(16)),
    volume_id=bytes(16),
    kind=Kind.ESTABLISHED,
    disk=DiskState.UP_TO_DATE,
    peer_disk=None,
    current=1,
    base=0,
    history=(),
    primary=False,
    clean=True,
    met_peer=True,
    incarnation=1,
    boot_id=bytes(16),
    log_slots=64,
    log_epoch=1,
    protocol="C",
    redundancy_lost_at=0.0,
    last_resync=None,
)
NEWER = dataclasses.replace(BLOCK, sequence=8, disk=DiskState.INCONSISTENT)
CONFLICTING = dataclasses.replace(BLOCK, disk=DiskState.OUTDATED)
FOREIGN = dataclasses.replace(NEWER, replica_id=bytes(range(1, 17)))


def of_version(version: int) -> bytes:
    body = encode_superblock(BLOCK)[:-4]
    body = body[:4] + struct.pack("<H", version) + body[6:]
    return body + struct.pack("<I", crc32c.crc32c(body))


RAW = {
    "old": encode_superblock(BLOCK),
    "new": encode_superblock(NEWER),
    "conflicting": encode_superblock(CONFLICTING),
    "foreign": encode_superblock(FOREIGN),
    "torn": encode_superblock(NEWER)[:1024] + encode_superblock(BLOCK)[1024:2048] + bytes(2048),
    "zero": bytes(RECORD_BYTES),
    "unread": b"",
    "version 4": of_version(4),
    "version 0": of_version(0),
}
DAMAGED = {"torn", "zero", "unread"}
UNKNOWN = {"version 4", "version 0"}


def expected(first: str, second: str) -> tuple[str, Superblock | None]:
    """The row and the superblock, said another way than the table says it."""
    if {first, second} & UNKNOWN:
        return "unknown-version", None
    if first in DAMAGED and second in DAMAGED:
        return "both-damaged", None
    if first in DAMAGED:
        return "first-damaged", decode_superblock(RAW[second])
    if second in DAMAGED:
        return "second-damaged", decode_superblock(RAW[first])
    if first == second:
        return "copies-equal", decode_superblock(RAW[first])
    if {first, second} != {"old", "new"} and {first, second} != {"conflicting", "new"}:
        return "copies-conflict", None
    return ("second-older", NEWER) if first == "new" else ("first-older", NEWER)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(RAW, repeat=2)))
def test_every_pair_of_copies_has_its_row(first: str, second: str) -> None:
    found = choose_superblock(RAW[first], RAW[second])
    name, superblock = expected(first, second)
    assert (found.row.name, found.superblock) == (name, superblock)
    assert (found.refusal is None) == (superblock is not None)
    assert found.rewrite == (superblock is not None and first != second)
    # Damage and lost writes are said; that a crash came between two writes is not.
    assert bool(found.warning) == (name in ("first-damaged", "second-damaged", "first-older"))
    if found.refusal is not None:
        assert found.refusal.remedy
        assert isinstance(found.refusal, UnknownVersion) == (name == "unknown-version")


def test_a_refusal_names_the_damage() -> None:
    refusal = choose_superblock(RAW["zero"], RAW["torn"]).refusal
    assert refusal is not None
    assert "never written" in refusal.message
    assert "checksum" in refusal.message


@settings(deadline=None)
@given(st.binary(max_size=RECORD_BYTES), st.binary(max_size=RECORD_BYTES))
def test_garbage_is_refused(first: bytes, second: bytes) -> None:
    assert choose_superblock(first, second).superblock is None


@pytest.mark.parametrize("written", range(0, 2 * RECORD_BYTES + 1, 512))
def test_a_crash_at_any_sector_of_the_two_writes_finds_the_old_or_the_new(written: int) -> None:
    """The first copy is durable before the second is begun, and each may be torn."""
    old, new = RAW["old"] * 2, RAW["new"] * 2
    torn = new[:written] + old[written:]
    found = choose_superblock(torn[:RECORD_BYTES], torn[RECORD_BYTES:])
    assert found.superblock == (BLOCK if written < RECORD_BYTES and torn[:RECORD_BYTES] != RAW["new"] else NEWER)


def test_no_row_is_there_for_nothing() -> None:
    pairs = {
        (recovery._compare(one, other), recovery._compare(other, one))
        for one, other in itertools.product([recovery._decode(raw) for raw in RAW.values()], repeat=2)
    }
    assert pairs == set(recovery.COPIES)


# -- log and map ------------------------------------------------------------------------------------------------------

EXTENTS = frozenset({3, 9})
LOGS: dict[Log, list[Rebuilt | DamagedLog]] = {
    Log.EMPTY: [Rebuilt(frozenset(), 1, (), None), Rebuilt(frozenset(), 1, (), 1)],
    Log.EXTENTS: [Rebuilt(EXTENTS, 5, (3, 9), None), Rebuilt(EXTENTS, 5, (3, 9), 5)],
    Log.DAMAGED: [DamagedLog("position 3: its checksum does not fit", (3,)), DamagedLog("a gap", ())],
}
EVERY_LOG = [(kind, log) for kind, logs in LOGS.items() for log in logs]


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("primary", [False, True])
@pytest.mark.parametrize(("kind", "log"), EVERY_LOG)
@pytest.mark.parametrize("pages", [(), (0,), (4, 7)])
def test_every_state_has_its_row(
    clean: bool, primary: bool, kind: Log, log: Rebuilt | DamagedLog, pages: tuple[int, ...]
) -> None:
    size_bytes = (max(EXTENTS) + 1) * EXTENT_BYTES
    found = classify(dataclasses.replace(BLOCK, clean=clean, primary=primary, size_bytes=size_bytes), log, pages)
    crashed = not clean
    assert found.crashed == crashed
    assert found.crashed_primary == primary
    assert found.pages == pages
    # After a crash the log counts, and a damaged one means anything; after an orderly stop nothing rests on it.
    expected_dirty = {Log.EMPTY: Dirty.NOTHING, Log.EXTENTS: Dirty.EXTENTS, Log.DAMAGED: Dirty.ALL}[kind]
    assert found.dirty == (expected_dirty if crashed else Dirty.NOTHING)
    assert found.extents == (EXTENTS if crashed and kind is Log.EXTENTS else frozenset())
    names = [row.name for row in found.rows]
    assert ("map-pages-damaged" in names) == bool(pages)
    assert all(row.sentence for row in found.rows)
    if isinstance(log, DamagedLog):
        assert found.mend == tuple(range(LOG_RING_RECORDS))
        assert any(log.why in warning for warning in found.warnings)
    else:
        assert found.mend == (() if log.torn is None else (log.torn,))
        assert ("log-record-torn" in names) == (log.torn is not None)
    # A plain crash is no news for the operator; damage is.
    assert bool(found.warnings) == (kind is Log.DAMAGED or bool(pages))


def test_the_table_of_states_is_whole_and_every_row_has_its_own_name() -> None:
    assert set(recovery.STATES) == set(itertools.product([False, True], [False, True], Log))
    rows = {*recovery.STATES.values(), *recovery.COPIES.values(), recovery.MAP_DAMAGED, recovery.LOG_TORN}
    assert len({row.name for row in rows}) == len(rows)
    assert {Copy.NEWER, Copy.OLDER, Copy.EQUAL} < {copy for pair in recovery.COPIES for copy in pair}


def test_a_log_that_names_an_extent_outside_the_volume_is_damaged() -> None:
    block = dataclasses.replace(BLOCK, clean=False, primary=True)
    inside, outside = (Rebuilt(frozenset({0, extent}), 5, (), None) for extent in (0, 1))
    assert classify(block, inside, []).extents == {0}
    found = classify(block, outside, [])
    assert (found.rows[0].name, found.dirty, found.extents) == ("primary-crashed-log-damaged", Dirty.ALL, frozenset())
    assert "outside the volume" in found.warnings[0]

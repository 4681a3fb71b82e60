"""What the metadata file holds: records of 4 096 bytes, encoded, decoded and checked here.

    offset   0      superblock, first copy
    offset   4096   superblock, second copy: written only when the first is durable, so one of them is always whole
    offset   8192   ring of LOG_RING_RECORDS log records; record n stands at position n mod LOG_RING_RECORDS
    after it        map pages, the bitmaps of EXTENTS_PER_PAGE extents each

Every record begins with a magic that names its kind and the version of that kind, and ends with the CRC-32C of all
before it; numbers are little-endian. An all-zero record is no record: `create` writes every one, so that a page which
the disk forgot is seen as damaged and never taken for "nothing dirty" (invariant say-why).

Promises: decode(encode(x)) == x; decoding any bytes whatever ends in a record, `DamagedRecord` or `UnknownVersion`; the
version is believed only after the checksum. What encode refuses (an assertion, a bug of ours) decode refuses too
(damage): both ask the same function.

What lost: one growing journal for all metadata (the start would have to replay it, a full disk would stop it), JSON
superblocks (no fixed place for a checksum), a checksum kept beside the map (a torn pair is worse than a torn page).
"""

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import crc32c

from mirror.core.errors import DamagedRecord, UnknownVersion
from mirror.core.generation import Generations, Kind
from mirror.core.limits import (
    BLOCK_BYTES,
    BLOCKS_PER_EXTENT,
    EXTENT_BYTES,
    EXTENTS_PER_PAGE,
    EXTENTS_PER_UNPROVEN_PAGE,
    HISTORY_MAX,
    LOG_CHANGES_MAX,
    LOG_RING_RECORDS,
    LOG_SLICE,
    LOG_SLOTS_MAX,
    NAME_MAX_CHARACTERS,
    NOTE_BYTES_MAX,
    RECORD_BYTES,
    SUSPECT_PARTS_MAX,
)
from mirror.core.states import DiskState

_SUPERBLOCK_MAGIC, _LOG_MAGIC, _MAP_MAGIC = b"NMSB", b"NMLR", b"NMMP"
_SUSPECTS_MAGIC, _UNPROVEN_MAGIC = b"NMSU", b"NMUP"
# The newest version of each kind of record: the one that is written. All from 1 on are read.
SUPERBLOCK_VERSION = 3
_LOG_VERSION = 1
_MAP_VERSION = 1
_SUSPECTS_VERSION = 1
_UNPROVEN_VERSION = 1
VERSIONS = {
    _SUPERBLOCK_MAGIC: SUPERBLOCK_VERSION,
    _LOG_MAGIC: _LOG_VERSION,
    _MAP_MAGIC: _MAP_VERSION,
    _SUSPECTS_MAGIC: _SUSPECTS_VERSION,
    _UNPROVEN_MAGIC: _UNPROVEN_VERSION,
}

_CHECKSUM = struct.Struct("<I")
_BODY_BYTES = RECORD_BYTES - _CHECKSUM.size
_HEAD = struct.Struct("<4sH")
_U64_MAX = (1 << 64) - 1

# -- any record -------------------------------------------------------------------------------------------------------


def _seal(body: bytes) -> bytes:
    """A record of this body: padded, then checksummed."""
    assert len(body) <= _BODY_BYTES, f"a record of {len(body)} bytes"
    padded = body.ljust(_BODY_BYTES, b"\0")
    return padded + _CHECKSUM.pack(crc32c.crc32c(padded))


def _check(raw: bytes, magic: bytes, what: str) -> bytes:
    """The body of a record whose kind, checksum and version are right."""
    if len(raw) != RECORD_BYTES:
        raise DamagedRecord(what, f"{len(raw)} bytes long instead of {RECORD_BYTES}")
    body = bytes(raw[:_BODY_BYTES])
    found_magic, version = _HEAD.unpack_from(body)
    if found_magic != magic:
        raise DamagedRecord(what, "all zero, never written" if not any(raw) else f"begins with {found_magic!r}")
    if crc32c.crc32c(body) != _CHECKSUM.unpack_from(raw, _BODY_BYTES)[0]:
        raise DamagedRecord(what, "its checksum does not fit its contents")
    if not 1 <= version <= VERSIONS[magic]:
        raise UnknownVersion(what, version, VERSIONS[magic])
    return body


# -- superblock -------------------------------------------------------------------------------------------------------

# magic version | kind disk peer_disk flags protocol name_length history_count | resync_length log_slots
# | sequence size current base incarnation log_epoch redundancy_lost_at | replica volume boot | name
_SUPERBLOCK = struct.Struct("<4sH 6Bs HI 6Qd 16s16s16s 64s")
_HISTORY = struct.Struct(f"<{HISTORY_MAX}Q")
_RESYNC_AT = _SUPERBLOCK.size + _HISTORY.size
# Since version 2, behind the place of the longest note on the last resync: next_size verify_length | note
_SINCE_2 = struct.Struct("<QH")
_SINCE_2_AT = _RESYNC_AT + NOTE_BYTES_MAX
_VERIFY_AT = _SINCE_2_AT + _SINCE_2.size
# Since version 3, behind the place of the longest note on the last verify: count | that many offset length
_SINCE_3 = struct.Struct("<H")
_SINCE_3_AT = _VERIFY_AT + NOTE_BYTES_MAX
_PART = struct.Struct("<QI")
_PARTS_AT = _SINCE_3_AT + _SINCE_3.size
assert _PARTS_AT + SUSPECT_PARTS_MAX * _PART.size <= _BODY_BYTES

# Codes on disk never change their meaning; 0 stands for "not known".
_KIND_CODES = {Kind.FRESH: 1, Kind.BACKING: 2, Kind.JOINING: 3, Kind.ESTABLISHED: 4}
_DISK_CODES = {
    DiskState.UP_TO_DATE: 1,
    DiskState.CONSISTENT: 2,
    DiskState.OUTDATED: 3,
    DiskState.INCONSISTENT: 4,
    DiskState.FAILED: 5,
}
_KINDS = {code: kind for kind, code in _KIND_CODES.items()}
_DISKS = {code: disk for disk, code in _DISK_CODES.items()}

_PRIMARY, _CLEAN, _MET_PEER = 1, 2, 4
IDENTIFIER_BYTES = 16
_NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{NAME_MAX_CHARACTERS}}}", re.ASCII)

# What is kept of a resync or a verify: a flat table.
Note = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Superblock:
    """What a replica durably knows of itself and its peer. Generations are u64, 0 = none.

    `next_size_bytes` is the size that a resize leads to while not both replicas have it yet, 0 when none is under way.
    `suspect_parts` are ranges (offset, length) of bytes in suspect blocks that a client wrote while the peer was away.
    """

    sequence: int
    name: str
    size_bytes: int
    replica_id: bytes
    volume_id: bytes
    kind: Kind
    disk: DiskState
    peer_disk: DiskState | None
    current: int
    base: int
    history: tuple[int, ...]
    primary: bool
    clean: bool
    met_peer: bool
    incarnation: int
    boot_id: bytes
    log_slots: int
    log_epoch: int
    protocol: str
    redundancy_lost_at: float
    last_resync: Note | None
    next_size_bytes: int = 0
    last_verify: Note | None = None
    suspect_parts: tuple[tuple[int, int], ...] = ()

    @property
    def generations(self) -> Generations:
        return Generations(self.current, self.base, self.history)


def _superblock_fault(block: Superblock) -> str:
    """What can't be right in a superblock, or nothing."""
    numbers = (block.sequence, block.current, block.base, block.incarnation, *block.history)
    identifiers = (block.replica_id, block.volume_id, block.boot_id)
    checks = (
        (is_name(block.name), f"the name {block.name!r}"),
        (size_is_right(block.size_bytes), f"the size {block.size_bytes}"),
        (all(len(one) == IDENTIFIER_BYTES for one in identifiers), "an identifier's length"),
        (any(block.replica_id), "an empty replica identifier"),
        (block.disk is not DiskState.CONSISTENT, "the disk state Consistent, which is never durable"),
        (all(0 <= number <= _U64_MAX for number in numbers), "a number of more than 64 bits"),
        (len(block.history) <= HISTORY_MAX and all(block.history), "the history of generations"),
        (1 <= block.log_slots <= LOG_SLOTS_MAX, f"{block.log_slots} slots of the activity log"),
        (1 <= block.log_epoch <= _U64_MAX, f"log epoch {block.log_epoch}"),
        (block.protocol in ("A", "B", "C"), f"the protocol {block.protocol!r}"),
        (math.isfinite(block.redundancy_lost_at) and block.redundancy_lost_at >= 0, "the time of lost redundancy"),
        (_next_size_is_right(block), f"the next size {block.next_size_bytes}"),
        (len(block.suspect_parts) <= SUSPECT_PARTS_MAX, f"{len(block.suspect_parts)} parts of suspect blocks"),
        (all(_part_is_right(block, *part) for part in block.suspect_parts), "a part outside the volume or of no block"),
    )
    return next((why for right, why in checks if not right), "")


def _next_size_is_right(block: Superblock) -> bool:
    size_bytes = block.next_size_bytes
    return size_bytes == 0 or (size_bytes > block.size_bytes and size_is_right(size_bytes))


def _part_is_right(block: Superblock, offset: int, length: int) -> bool:
    inside = 0 < length < BLOCK_BYTES and 0 <= offset <= block.size_bytes - length
    return inside and offset // BLOCK_BYTES == (offset + length - 1) // BLOCK_BYTES


def size_is_right(size_bytes: int) -> bool:
    """Whether a volume can have this size."""
    return size_bytes > 0 and size_bytes % BLOCK_BYTES == 0 and size_bytes <= (_NO_EXTENT - 1) * EXTENT_BYTES


def encode_superblock(block: Superblock) -> bytes:
    """4 096 bytes. A superblock that can't be right is a bug of ours."""
    fault = _superblock_fault(block)
    assert not fault, f"superblock to be written has {fault}"
    resync = _encode_note(block.last_resync, "resync")
    verify = _encode_note(block.last_verify, "verify")
    name = block.name.encode("ascii")
    return _seal(
        _SUPERBLOCK.pack(
            _SUPERBLOCK_MAGIC,
            SUPERBLOCK_VERSION,
            _KIND_CODES[block.kind],
            _DISK_CODES[block.disk],
            0 if block.peer_disk is None else _DISK_CODES[block.peer_disk],
            block.primary * _PRIMARY | block.clean * _CLEAN | block.met_peer * _MET_PEER,
            len(name),
            len(block.history),
            block.protocol.encode("ascii"),
            len(resync),
            block.log_slots,
            block.sequence,
            block.size_bytes,
            block.current,
            block.base,
            block.incarnation,
            block.log_epoch,
            block.redundancy_lost_at,
            block.replica_id,
            block.volume_id,
            block.boot_id,
            name,
        )
        + _HISTORY.pack(*block.history, *[0] * (HISTORY_MAX - len(block.history)))
        + resync.ljust(NOTE_BYTES_MAX, b"\0")
        + _SINCE_2.pack(block.next_size_bytes, len(verify))
        + verify.ljust(NOTE_BYTES_MAX, b"\0")
        + _SINCE_3.pack(len(block.suspect_parts))
        + b"".join([_PART.pack(*part) for part in block.suspect_parts])
    )


def decode_superblock(raw: bytes) -> Superblock:
    """Raises DamagedRecord, UnknownVersion."""
    what = "superblock"
    body = _check(raw, _SUPERBLOCK_MAGIC, what)
    fields = _SUPERBLOCK.unpack_from(body)
    next_size_bytes, verify_length = _SINCE_2.unpack_from(body, _SINCE_2_AT) if fields[1] >= 2 else (0, 0)
    kind, disk, peer_disk, flags, name_length, history_count, protocol, resync_length, log_slots = fields[2:11]
    if kind not in _KINDS or disk not in _DISKS or (peer_disk and peer_disk not in _DISKS):
        raise DamagedRecord(what, f"it has kind {kind}, disk state {disk}, the peer's {peer_disk}")
    if flags & ~(_PRIMARY | _CLEAN | _MET_PEER) or history_count > HISTORY_MAX or name_length > NAME_MAX_CHARACTERS:
        raise DamagedRecord(what, f"it has flags {flags}, {history_count} generations, a name of {name_length}")
    block = Superblock(
        kind=_KINDS[kind],
        disk=_DISKS[disk],
        peer_disk=_DISKS[peer_disk] if peer_disk else None,
        primary=bool(flags & _PRIMARY),
        clean=bool(flags & _CLEAN),
        met_peer=bool(flags & _MET_PEER),
        protocol=protocol.decode("latin-1"),
        log_slots=log_slots,
        sequence=fields[11],
        size_bytes=fields[12],
        current=fields[13],
        base=fields[14],
        incarnation=fields[15],
        log_epoch=fields[16],
        redundancy_lost_at=fields[17],
        replica_id=fields[18],
        volume_id=fields[19],
        boot_id=fields[20],
        name=fields[21][:name_length].decode("latin-1"),
        history=_HISTORY.unpack_from(body, _SUPERBLOCK.size)[:history_count],
        last_resync=_decode_note(body, _RESYNC_AT, resync_length, "resync"),
        next_size_bytes=next_size_bytes,
        last_verify=_decode_note(body, _VERIFY_AT, verify_length, "verify"),
        suspect_parts=_decode_parts(body) if fields[1] >= 3 else (),
    )
    if fault := _superblock_fault(block):
        raise DamagedRecord(what, f"it has {fault}")
    return block


def _decode_parts(body: bytes) -> tuple[tuple[int, int], ...]:
    (count,) = _SINCE_3.unpack_from(body, _SINCE_3_AT)
    if count > SUSPECT_PARTS_MAX:
        raise DamagedRecord("superblock", f"it claims {count} parts of suspect blocks")
    return tuple(_PART.iter_unpack(body[_PARTS_AT : _PARTS_AT + count * _PART.size]))


def _encode_note(note: Note | None, of: str) -> bytes:
    if note is None:
        return b""
    assert _note_is_right(note), f"note on the last {of} to be written is {note!r}"
    encoded = _note_bytes(note)
    assert len(encoded) <= NOTE_BYTES_MAX, f"note on the last {of} to be written has {len(encoded)} bytes"
    return encoded


def _decode_note(body: bytes, start: int, length: int, of: str) -> Note | None:
    if not length:
        return None
    fault = ""
    note: object = None
    try:
        note = json.loads(body[start : start + length])
    except (ValueError, RecursionError) as error:
        fault = str(error)
    if length > NOTE_BYTES_MAX or not isinstance(note, dict) or not _note_is_right(note):
        raise DamagedRecord("superblock", f"its note on the last {of} can't be read: {fault or 'no table of values'}")
    return note


def is_note(value: object) -> bool:
    """Whether a superblock can keep it: a flat table of words and numbers that is not too long."""
    if not isinstance(value, dict) or not _note_is_right(value):
        return False
    return len(_note_bytes(value)) <= NOTE_BYTES_MAX


def is_name(text: str) -> bool:
    """Whether a volume can have this name."""
    return _NAME.fullmatch(text) is not None


def _note_bytes(note: Note) -> bytes:
    return json.dumps(dict(note), separators=(",", ":")).encode("ascii")


def _note_is_right(note: Note) -> bool:
    values = note.values()
    return all(isinstance(one, str | int) or (isinstance(one, float) and math.isfinite(one)) for one in values)


# -- activity log -----------------------------------------------------------------------------------------------------

# magic version | slots | epoch sequence | changes rotating_start rotating_count
_LOG = struct.Struct("<4sH H QQ HHH")
_CHANGE = struct.Struct("<HI")
# An extent number that no volume reaches stands for "this slot is empty".
_NO_EXTENT = (1 << 32) - 1

Slot = tuple[int, int | None]


@dataclass(frozen=True)
class LogRecord:
    """One durable step of the activity log: what `changes`, and what a run of other slots holds after it.

    `epoch` names the life of the log, 0 a blank record; `sequence` counts from 1 in each epoch; `slots` is the size of
    the log's table. A slot comes with its extent, or None when it is empty.
    """

    epoch: int
    sequence: int
    slots: int
    changes: tuple[Slot, ...]
    rotating: tuple[Slot, ...]


def ring_position(sequence: int) -> int:
    """Where in the ring the record of this sequence stands."""
    return sequence % LOG_RING_RECORDS


def blank_log_record() -> bytes:
    """A record that belongs to no epoch: what `create` fills the ring with, and what mends a torn one."""
    return encode_log_record(LogRecord(epoch=0, sequence=0, slots=1, changes=(), rotating=()))


def _log_fault(record: LogRecord) -> str:
    """What can't be right in a log record, or nothing."""
    changed = [slot for slot, _ in record.changes]
    run = [slot for slot, _ in record.rotating]
    first = run[0] if run else 0
    extents = [extent for _, extent in record.changes + record.rotating if extent is not None]
    checks = (
        (0 <= record.epoch <= _U64_MAX and 0 <= record.sequence <= _U64_MAX, "a number of more than 64 bits"),
        (1 <= record.slots <= LOG_SLOTS_MAX, f"{record.slots} slots"),
        (len(changed) <= LOG_CHANGES_MAX, f"{len(changed)} changes"),
        (len(set(changed)) == len(changed), "two changes of one slot"),
        (len(run) <= LOG_SLICE and run == [*range(first, first + len(run))], "a slice that is no run of slots"),
        (all(0 <= slot < record.slots for slot in (*changed, *run[:1], *run[-1:])), "a slot outside the log"),
        (not extents or (min(extents) >= 0 and max(extents) < _NO_EXTENT), "an extent outside any volume"),
    )
    return next((why for right, why in checks if not right), "")


def encode_log_record(record: LogRecord) -> bytes:
    """4 096 bytes. A record that can't be right is a bug of ours."""
    fault = _log_fault(record)
    assert not fault, f"log record to be written has {fault}"
    changes = [_CHANGE.pack(slot, _NO_EXTENT if extent is None else extent) for slot, extent in record.changes]
    rotating = [_NO_EXTENT if extent is None else extent for _, extent in record.rotating]
    start = record.rotating[0][0] if record.rotating else 0
    head = _LOG.pack(
        _LOG_MAGIC,
        _LOG_VERSION,
        record.slots,
        record.epoch,
        record.sequence,
        len(changes),
        start,
        len(rotating),
    )
    return _seal(head + b"".join(changes) + struct.pack(f"<{len(rotating)}I", *rotating))


def decode_log_record(raw: bytes) -> LogRecord:
    """Raises DamagedRecord, UnknownVersion."""
    what = "log record"
    body = _check(raw, _LOG_MAGIC, what)
    _, _, slots, epoch, sequence, changed, start, count = _LOG.unpack_from(body)
    if changed > LOG_CHANGES_MAX or count > LOG_SLICE:
        raise DamagedRecord(what, f"it claims {changed} changes and a slice of {count}")
    middle = _LOG.size + changed * _CHANGE.size
    changes = tuple(_slot(slot, number) for slot, number in _CHANGE.iter_unpack(body[_LOG.size : middle]))
    numbers = struct.unpack_from(f"<{count}I", body, middle)
    rotating = tuple(_slot(start + index, number) for index, number in enumerate(numbers))
    record = LogRecord(epoch, sequence, slots, changes, rotating)
    if fault := _log_fault(record):
        raise DamagedRecord(what, f"it has {fault}")
    return record


def _slot(slot: int, number: int) -> Slot:
    return slot, None if number == _NO_EXTENT else number


# -- dirty map --------------------------------------------------------------------------------------------------------

_MAP = struct.Struct("<4sH xx Q")
_BITMAP_BYTES = BLOCKS_PER_EXTENT // 8


def encode_map_page(index: int, bitmaps: Sequence[int]) -> bytes:
    """The page that holds these extents' bitmaps (block i is bit i); missing ones at the volume's end are clean."""
    return _encode_bitmaps(_MAP_MAGIC, index, bitmaps)


def decode_map_page(raw: bytes, index: int) -> list[int]:
    """EXTENTS_PER_PAGE bitmaps. Raises DamagedRecord, also for another page's record; UnknownVersion."""
    return _decode_bitmaps(raw, _MAP_MAGIC, index, f"map page {index}")


def _encode_bitmaps(magic: bytes, index: int, bitmaps: Sequence[int]) -> bytes:
    assert len(bitmaps) <= EXTENTS_PER_PAGE, f"{len(bitmaps)} extents for one page"
    return _seal(_MAP.pack(magic, VERSIONS[magic], index) + b"".join([_bitmap_bytes(bits) for bits in bitmaps]))


def _bitmap_bytes(bits: int) -> bytes:
    return bits.to_bytes(_BITMAP_BYTES, "little")


def _decode_bitmaps(raw: bytes, magic: bytes, index: int, what: str) -> list[int]:
    body = _check(raw, magic, what)
    found = _MAP.unpack_from(body)[2]
    if found != index:
        raise DamagedRecord(what, f"it is page {found}")
    starts = range(_MAP.size, _MAP.size + EXTENTS_PER_PAGE * _BITMAP_BYTES, _BITMAP_BYTES)
    return [int.from_bytes(body[start : start + _BITMAP_BYTES], "little") for start in starts]


# -- suspects and unproven extents, in files of their own -------------------------------------------------------------

# A page of DIR/suspects is laid out as one of the dirty map; its own magic keeps it from being taken for one.
# Of DIR/unproven: magic version | page | cursor; then one bit an extent
_UNPROVEN = struct.Struct("<4sH xx Q Q")
_UNPROVEN_BYTES = EXTENTS_PER_UNPROVEN_PAGE // 8
assert _UNPROVEN.size + _UNPROVEN_BYTES <= _BODY_BYTES


def encode_suspects_page(index: int, bitmaps: Sequence[int]) -> bytes:
    """The page that holds these extents' suspect blocks (block i is bit i)."""
    return _encode_bitmaps(_SUSPECTS_MAGIC, index, bitmaps)


def decode_suspects_page(raw: bytes, index: int) -> list[int]:
    """EXTENTS_PER_PAGE bitmaps. Raises DamagedRecord, also for another page's record; UnknownVersion."""
    return _decode_bitmaps(raw, _SUSPECTS_MAGIC, index, f"page {index} of the suspects")


def encode_unproven_page(index: int, bits: int, cursor: int = 0) -> bytes:
    """Bit i is extent index * EXTENTS_PER_UNPROVEN_PAGE + i. `cursor` counts in page 0: where the slow pass goes on."""
    return _seal(
        _UNPROVEN.pack(_UNPROVEN_MAGIC, _UNPROVEN_VERSION, index, cursor) + bits.to_bytes(_UNPROVEN_BYTES, "little")
    )


def decode_unproven_page(raw: bytes, index: int) -> tuple[int, int]:
    """The bits and the cursor. Raises DamagedRecord, also for another page's record; UnknownVersion."""
    what = f"page {index} of the unproven extents"
    body = _check(raw, _UNPROVEN_MAGIC, what)
    _, _, found, cursor = _UNPROVEN.unpack_from(body)
    if found != index:
        raise DamagedRecord(what, f"it is page {found}")
    return int.from_bytes(body[_UNPROVEN.size : _UNPROVEN.size + _UNPROVEN_BYTES], "little"), cursor


# -- where records stand ----------------------------------------------------------------------------------------------


class Geometry:
    """Offsets in the metadata file of a volume of `size_bytes`."""

    superblock_offsets = (0, RECORD_BYTES)
    log_offset = 2 * RECORD_BYTES
    map_offset = log_offset + LOG_RING_RECORDS * RECORD_BYTES

    def __init__(self, size_bytes: int) -> None:
        self.extents = -(-size_bytes // EXTENT_BYTES)
        self.pages = -(-self.extents // EXTENTS_PER_PAGE)
        self.unproven_pages = -(-self.extents // EXTENTS_PER_UNPROVEN_PAGE)
        self.metadata_bytes = self.map_offset + self.pages * RECORD_BYTES

    def page_of_extent(self, extent: int) -> int:
        return extent // EXTENTS_PER_PAGE

    def extents_of_page(self, index: int) -> range:
        start = index * EXTENTS_PER_PAGE
        return range(start, min(start + EXTENTS_PER_PAGE, self.extents))

    @classmethod
    def log_record_offset(cls, position: int) -> int:
        return cls.log_offset + position * RECORD_BYTES

    def map_page_offset(self, index: int) -> int:
        return self.map_offset + index * RECORD_BYTES

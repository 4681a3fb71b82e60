"""A reader of the formats that knows nothing but docs/format.md and docs/protocol.md: their tables and their words.

It takes offsets, sizes, types and codes from the tables, so that a table that is wrong is found, and does what stands
between them in its own way. It never imports the product.
"""

import itertools
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
RECORD_BYTES = 4096
RING_RECORDS = 64
NO_EXTENT = 4_294_967_295


@dataclass(frozen=True)
class Row:
    """A field as a table has it."""

    offset: int
    size: int
    type: str
    field: str
    since: int
    meaning: str


def section(document: str, heading: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    text = (DOCS / document).read_text()
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{document} has no section {heading!r}"
    return found[1]


def table(document: str, heading: str, first_column: str) -> list[dict[str, str]]:
    """The table under a heading whose first column has this name, row by row."""
    for block in section(document, heading).split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        if rows and rows[0][0] == first_column:
            return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    raise AssertionError(f"{document}, {heading}: no table that begins with {first_column!r}")


def fields(document: str, heading: str) -> list[Row]:
    """The fields of a record; they neither overlap nor leave a gap unnamed but what the reader pads."""
    rows = [
        Row(
            int(row["offset"]),
            int(row["size"]),
            row["type"],
            row["field"],
            int(row.get("since") or 1),
            row["meaning"],
        )
        for row in table(document, heading, "offset")
    ]
    assert rows, heading
    for before, after in itertools.pairwise(rows):
        assert before.offset + before.size <= after.offset, f"{heading}: {before.field} runs into {after.field}"
    return rows


_NUMBERS = {"u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q", "i32": "<i", "f64": "<d"}


def value(row: Row, raw: bytes) -> Any:
    """A field of a record."""
    part = raw[row.offset : row.offset + row.size]
    if row.type in _NUMBERS:
        (number,) = struct.unpack(_NUMBERS[row.type], part)
        return number
    if row.type == "text":
        return part.rstrip(b"\0").decode("ascii")
    if row.type == "u64[16]":
        return list(struct.unpack("<16Q", part))
    return part


def read(document: str, heading: str, raw: bytes) -> dict[str, Any]:
    """All fields of a record of this version."""
    rows = fields(document, heading)
    version = next((value(row, raw) for row in rows if row.field == "version"), 1)
    return {row.field: value(row, raw) for row in rows if row.since <= version}


def crc32c(data: bytes) -> int:
    """By the definition, bit by bit in a table: another program's word than the library's."""
    register = 0xFFFFFFFF
    for byte in data:
        register = _TABLE[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register ^ 0xFFFFFFFF


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_TABLE = [_entry(byte) for byte in range(256)]


# -- metadata ---------------------------------------------------------------------------------------------------------

KINDS = {
    "NMSB": "Superblock",
    "NMLR": "Log record",
    "NMMP": "Map page",
    "NMSU": "Suspects page",
    "NMUP": "Unproven page",
}
STATES = {1: "UpToDate", 2: "Consistent", 3: "Outdated", 4: "Inconsistent", 5: "Failed"}
ORIGINS = {1: "fresh", 2: "backing", 3: "joining", 4: "established"}


def record(raw: bytes) -> tuple[str, dict[str, Any]]:
    """The kind of a record and its fields."""
    assert len(raw) == RECORD_BYTES
    known = read("format.md", "Any record", raw)
    assert known["checksum"] == crc32c(raw[: RECORD_BYTES - 4])
    kind = KINDS[known["magic"].decode()]
    return kind, read("format.md", kind, raw)


def superblock(raw: bytes) -> dict[str, Any]:
    kind, found = record(raw)
    assert kind == "Superblock"
    flags = found["flags"]
    known = {
        "kind": ORIGINS[found["kind"]],
        "disk": STATES[found["disk"]],
        "peer_disk": STATES[found["peer_disk"]] if found["peer_disk"] else None,
        "primary": bool(flags & 1),
        "clean": bool(flags & 2),
        "met_peer": bool(flags & 4),
        "history": found["history"][: found["history_count"]],
        **{name: found[name].hex() for name in ("replica_id", "volume_id", "boot_id")},
    }
    assert len(found["name"]) == found["name_length"]
    for name in ("last_resync", "last_verify"):
        if name in found:
            length = found[f"{name}_length"]
            known[name] = json.loads(found[name][:length]) if length else None
    if "suspect_parts" in found:
        length = 12 * found["suspect_parts_count"]
        known["suspect_parts"] = [list(part) for part in struct.iter_unpack("<QI", found["suspect_parts"][:length])]
    plain = ("sequence", "name", "size_bytes", "current", "base", "incarnation", "log_slots", "log_epoch", "protocol")
    known.update({name: found[name] for name in (*plain, "redundancy_lost_at")})
    known.update({name: found[name] for name in ("next_size_bytes",) if name in found})
    return known


def log_record(raw: bytes) -> dict[str, Any]:
    kind, found = record(raw)
    assert kind == "Log record"
    entries, count, start = found["entries"], found["change_count"], found["rotating_start"]
    changes = [list(struct.unpack_from("<HI", entries, 6 * index)) for index in range(count)]
    run = struct.unpack_from(f"<{found['rotating_count']}I", entries, 6 * count)
    rotating = [[slot, extent] for slot, extent in enumerate(run, start)]
    for entry in (*changes, *rotating):
        entry[1] = None if entry[1] == NO_EXTENT else entry[1]
    names = ("epoch", "sequence", "slots")
    return {**{name: found[name] for name in names}, "changes": changes, "rotating": rotating}


def map_page(raw: bytes, expected_kind: str = "Map page") -> dict[str, Any]:
    kind, found = record(raw)
    assert kind == expected_kind
    bitmaps = []
    for start in range(0, len(found["bitmaps"]), 128):
        bitmap = found["bitmaps"][start : start + 128]
        bits = sum(1 << block for block in range(1024) if bitmap[block // 8] >> block % 8 & 1)
        bitmaps.append(f"{bits:x}")
    return {"index": found["index"], "bitmaps": bitmaps}


def unproven_page(raw: bytes) -> dict[str, Any]:
    kind, found = record(raw)
    assert kind == "Unproven page"
    extents = [bit for bit in range(8 * len(found["bits"])) if found["bits"][bit // 8] >> bit % 8 & 1]
    return {"index": found["index"], "cursor": found["cursor"], "extents": extents}


def metadata(raw: bytes) -> dict[str, Any]:
    """A whole metadata file: its superblock, the hot extents of its log, its dirty blocks."""
    places = [int(row["offset"].replace(" ", "")) for row in table("format.md", "Where records stand", "offset")]
    copies = [superblock(raw[place : place + RECORD_BYTES]) for place in places[:2]]
    known = max(copies, key=lambda copy: int(copy["sequence"]))
    slots: dict[int, int | None] = {}
    ring = [log_record(raw[places[2] + RECORD_BYTES * at :][:RECORD_BYTES]) for at in range(RING_RECORDS)]
    for at, one in enumerate(ring):
        assert one["sequence"] % RING_RECORDS == at or one["epoch"] != known["log_epoch"]
    for one in sorted(ring, key=lambda one: int(one["sequence"])):
        if one["epoch"] == known["log_epoch"]:
            slots.update(dict((*one["rotating"], *one["changes"])))
    extents = -(-known["size_bytes"] // (4 << 20))
    dirty = []
    for page in range(-(-extents // 31)):
        found = map_page(raw[places[3] + page * RECORD_BYTES :][:RECORD_BYTES])
        assert found["index"] == page
        for extent, bits in enumerate(found["bitmaps"], 31 * page):
            dirty += [(extent * 1024 + block) * 4096 for block in range(1024) if int(bits, 16) >> block & 1]
    hot = {extent for extent in slots.values() if extent is not None}
    return {"superblock": known, "hot": hot, "dirty": dirty}


# -- the wire ---------------------------------------------------------------------------------------------------------


def frames(raw: bytes) -> Iterator[tuple[bool, bytes]]:
    """The frames of a stream behind its greeting: whether each is a command, and its body."""
    at = 0
    while at < len(raw):
        flags = raw[at]
        assert flags in (0, 2, 4, 6)
        if flags & 2:
            size, at = int.from_bytes(raw[at + 1 : at + 9], "big"), at + 9
        else:
            size, at = raw[at + 1], at + 2
        assert at + size <= len(raw), "a torn frame"
        yield bool(flags & 4), raw[at : at + size]
        at += size


def codes(heading: str, first_column: str, name_column: str) -> dict[int, str]:
    return {int(row[first_column]): row[name_column] for row in table("protocol.md", heading, first_column)}


def message(body: bytes) -> dict[str, Any]:
    header = read("protocol.md", "Messages", body)
    assert header.pop("magic") == 0x626E
    assert header.pop("version") == 1
    assert header.pop("header_crc") == crc32c(body[:56])
    payload = body[60:]
    assert len(payload) == header["payload_length"]
    assert header["payload_crc"] == (crc32c(payload) if payload else 0)
    header["type"] = codes("Messages", "code", "type")[header["type"]]
    return {**header, "payload": payload.hex()}


def connection(raw: bytes) -> list[dict[str, Any]]:
    """What one side of a connection said: its messages, after a greeting and a READY."""
    greeting = read("protocol.md", "ZMTP", raw)
    assert (greeting["first"], greeting["last"], greeting["major"]) == (255, 127, 3)
    assert greeting["mechanism"] == "NULL"
    said = list(frames(raw[64:]))
    is_command, ready = said[0]
    assert is_command
    assert ready.startswith(b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER")
    messages = [message(body) for is_command, body in said[1:] if not is_command]
    assert [one["sequence"] for one in messages] == list(range(1, len(messages) + 1))
    return messages

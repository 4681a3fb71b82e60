"""Files and bytes of every version so far: they open for ever, and say what they said when they were made."""

import dataclasses
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mirror import handshake
from mirror.core import layout, wire
from mirror.core.errors import ProtocolError, UnknownVersion
from mirror.core.layout import (
    decode_log_record,
    decode_map_page,
    decode_superblock,
    decode_suspects_page,
    decode_unproven_page,
)
from mirror.core.limits import BLOCK_BYTES, EXTENTS_PER_PAGE, RECORD_BYTES
from mirror.core.wire import Flag
from tests.golden import by_docs, record

HERE = Path(__file__).parent
DIRECTORIES = sorted(path.parent for path in HERE.glob("*/SHA256SUMS"))
METADATA = [path for path in DIRECTORIES if path.name.startswith("metadata-")]
SIDE_MAPS = [path for path in DIRECTORIES if path.name.startswith("side-maps-")]
WIRES = [path for path in DIRECTORIES if path.name.startswith("wire-")]


def values(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "values.json").read_text())
    return found


RECORDS = [path for directory in (*METADATA, *SIDE_MAPS) for path in sorted(directory.glob("*.bin"))]
FILES = [path for directory in METADATA for path in sorted(directory.glob("meta-*.gz"))]
by_path = {"ids": lambda path: f"{path.parent.name}/{path.name}"}


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
def test_nobody_has_changed_what_was_recorded(directory: Path) -> None:
    told = dict(reversed(line.split()) for line in (directory / record.SUMS).read_text().splitlines())
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.name != record.SUMS
    }
    assert found == told


def test_the_formats_of_now_are_recorded() -> None:
    """`python -m tests.golden.record` makes what is missing after a version was raised."""
    assert HERE / f"metadata-{layout.SUPERBLOCK_VERSION}" in METADATA
    assert HERE / f"wire-{wire.SESSION_VERSION}" in WIRES


# -- records ----------------------------------------------------------------------------------------------------------


def as_recorded(found: Any, expected: dict[str, Any], defaults: dict[str, Any]) -> None:
    """A decoded record says what it said; what its version did not have yet has its default."""
    told = record.plain(dataclasses.asdict(found))
    assert {name: told[name] for name in expected} == expected
    assert {name: value for name, value in told.items() if name not in expected} == {
        name: value for name, value in defaults.items() if name not in expected
    }


# What a reader takes for fields that an older version does not have.
SUPERBLOCK_DEFAULTS: dict[str, Any] = {"next_size_bytes": 0, "last_verify": None, "suspect_parts": []}


@pytest.mark.parametrize("path", RECORDS, **by_path)
def test_a_golden_record_is_read(path: Path) -> None:
    raw, expected = path.read_bytes(), values(path.parent)[path.stem]
    match path.stem.partition("-")[0]:
        case "superblock":
            as_recorded(decode_superblock(raw), expected, SUPERBLOCK_DEFAULTS)
            assert by_docs.superblock(raw) == expected
        case "log":
            as_recorded(decode_log_record(raw), expected, {})
            assert by_docs.log_record(raw) == expected
        case "map":
            bitmaps = [int(bits, 16) for bits in expected["bitmaps"]]
            assert decode_map_page(raw, expected["index"]) == bitmaps
            assert by_docs.map_page(raw) == expected
        case "suspects":
            bitmaps = [int(bits, 16) for bits in expected["bitmaps"]]
            assert decode_suspects_page(raw, expected["index"]) == bitmaps
            assert by_docs.map_page(raw, "Suspects page") == expected
        case "unproven":
            bits = sum(1 << extent for extent in expected["extents"])
            assert decode_unproven_page(raw, expected["index"]) == (bits, expected["cursor"])
            assert by_docs.unproven_page(raw) == expected
        case other:
            pytest.fail(f"a record of kind {other}")


def test_what_is_written_now_is_what_was_recorded_for_this_version() -> None:
    directory = HERE / f"metadata-{layout.SUPERBLOCK_VERSION}"
    for name, raw, meaning in record.records():
        assert (directory / f"{name}.bin").read_bytes() == raw, name
        assert values(directory)[name] == json.loads(json.dumps(meaning))


def test_side_maps_are_written_now_as_they_were_recorded_for_this_version() -> None:
    directory = HERE / f"side-maps-{max(layout.VERSIONS[magic] for magic in record.SIDE_MAPS)}"
    for name, raw, meaning in record.side_maps():
        assert (directory / f"{name}.bin").read_bytes() == raw, name
        assert values(directory)[name] == meaning


# -- whole metadata files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, **by_path)
def test_a_golden_metadata_file_opens(path: Path) -> None:
    raw, expected = gzip.decompress(path.read_bytes()), values(path.parent)[path.stem]
    found = record.found_at_start(raw)
    superblock = expected.pop("superblock")
    assert {name: found[name] for name in expected} == expected
    assert {name: found["superblock"][name] for name in superblock} == superblock


@pytest.mark.parametrize("path", FILES, **by_path)
def test_a_golden_metadata_file_is_read_by_the_documents_alone(path: Path) -> None:
    raw, expected = gzip.decompress(path.read_bytes()), values(path.parent)[path.stem]
    found = by_docs.metadata(raw)
    assert found["superblock"] == expected["superblock"]
    dirty = {at for offset, length in expected["dirty"] for at in range(offset, offset + length, BLOCK_BYTES)}
    of_the_log = {
        at
        for extent in found["hot"]
        for at in range(extent << 22, min(extent + 1 << 22, superblock_size(expected)), BLOCK_BYTES)
    }
    assert dirty == set(found["dirty"]) | (set() if expected["superblock"]["clean"] else of_the_log)


def superblock_size(expected: dict[str, Any]) -> int:
    size: int = expected["superblock"]["size_bytes"]
    return size


# -- the tables against the encoders ----------------------------------------------------------------------------------

OTHER_VALUES: dict[str, Any] = {
    "sequence": 2**64 - 1,
    "name": "other",
    "size_bytes": 2**44 - 2**12,
    "replica_id": b"\xff" * 16,
    "volume_id": b"\xff" * 16,
    "kind": layout.Kind.ESTABLISHED,
    "disk": layout.DiskState.FAILED,
    "peer_disk": layout.DiskState.FAILED,
    "current": 2**64 - 1,
    "base": 2**64 - 1,
    "history": tuple(range(2**64 - 16, 2**64)),
    "primary": True,
    "clean": False,
    "met_peer": True,
    "incarnation": 2**64 - 1,
    "boot_id": b"\xff" * 16,
    "log_slots": 8192,
    "log_epoch": 2**64 - 1,
    "protocol": "A",
    "redundancy_lost_at": -0.0 + 1e300,
    "last_resync": {"x": "y" * 400},
    "next_size_bytes": 2**44 - 2**12,
    "last_verify": {"x": "y" * 400},
    "suspect_parts": tuple((4096 * number, 4095) for number in range(1, 129)),
}
# Where a field is more than its own row of the table.
ALSO = {
    "name": {"name_length"},
    "history": {"history_count"},
    "last_resync": {"last_resync_length"},
    "last_verify": {"last_verify_length"},
    "suspect_parts": {"suspect_parts_count"},
}
AT = {"primary": "flags", "clean": "flags", "met_peer": "flags"}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(layout.Superblock)])
def test_each_field_of_a_superblock_stands_where_the_document_says(name: str) -> None:
    before = layout.encode_superblock(record.FRESH)
    after = layout.encode_superblock(dataclasses.replace(record.FRESH, **{name: OTHER_VALUES[name]}))
    rows = {row.field: row for row in by_docs.fields("format.md", "Superblock")}
    places = {AT.get(name, name), *ALSO.get(name, ())}
    allowed = {at for place in places for at in range(rows[place].offset, rows[place].offset + rows[place].size)} | set(
        range(RECORD_BYTES - 4, RECORD_BYTES)
    )
    changed = {at for at in range(RECORD_BYTES) if before[at] != after[at]}
    assert changed - allowed == set()
    assert all(changed & set(range(rows[place].offset, rows[place].offset + rows[place].size)) for place in places)


def test_the_versions_in_the_document_are_those_of_the_code() -> None:
    rows = {row.field: row for row in by_docs.fields("format.md", "Superblock")}
    assert rows["version"].meaning == str(layout.SUPERBLOCK_VERSION)
    assert max(row.since for row in rows.values()) <= layout.SUPERBLOCK_VERSION
    told = {row["what"]: row["now"] for row in by_docs.table("protocol.md", "Versions", "what")}
    assert told == {"ZMTP": "3.0", "header": str(wire.VERSION), "session protocol": str(wire.SESSION_VERSION)}
    brought = [int(row["version"]) for row in by_docs.table("protocol.md", "Versions", "version")]
    assert brought == list(range(1, wire.SESSION_VERSION + 1))


def test_what_is_said_of_another_version_is_what_the_documents_say(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bytearray(layout.encode_superblock(record.FRESH))
    raw[4] = 9
    raw[-4:] = wire.crc32c(raw[:-4]).to_bytes(4, "little")
    with pytest.raises(UnknownVersion) as unknown:
        decode_superblock(bytes(raw))
    assert f"    {unknown.value}\n" in by_docs.section("format.md", "Versions")
    told = {row["rule"].strip("`"): row["said"].strip("`") for row in by_docs.table("protocol.md", "Versions", "rule")}
    newer = {"version": wire.SESSION_VERSION + 2, "version_min": wire.SESSION_VERSION + 1}
    with pytest.raises(handshake.Refusal) as too_new:
        handshake.check_versions(newer)
    assert str(too_new.value) == told["peer-too-new"]
    monkeypatch.setattr(handshake, "SESSION_VERSION_MIN", 2)
    with pytest.raises(handshake.Refusal) as too_old:
        handshake.check_versions({})
    for words in ("peer-too-old", "upgrade nbdmirror on the peer's node"):
        assert words in str(too_old.value)
        assert words in told["peer-too-old"]
    body = bytearray(wire.encode_message(*[1] * 10)[2:])
    body[2] = 2
    with pytest.raises(ProtocolError) as header:
        wire.decode_header(bytes(body))
    other = {row["what"]: row["another one"] for row in by_docs.table("protocol.md", "Versions", "what")}
    assert str(header.value) in other["header"]
    with pytest.raises(ProtocolError) as zmtp:
        wire.check_greeting_start(wire.greeting()[:10] + b"\x01")
    assert str(zmtp.value) in other["ZMTP"]


def test_the_codes_in_the_document_are_those_of_the_code() -> None:
    assert by_docs.codes("Messages", "code", "type") == {int(kind): kind.name for kind in wire.MessageType}
    flags = {value: name for name, value in vars(Flag).items() if name.isupper()}
    assert by_docs.codes("Messages", "flag", "name") == flags


def test_the_places_in_the_document_are_those_of_the_code() -> None:
    places = [
        int(row["offset"].replace(" ", "")) for row in by_docs.table("format.md", "Where records stand", "offset")
    ]
    geometry = layout.Geometry(1 << 40)
    assert places == [*geometry.superblock_offsets, geometry.log_offset, geometry.map_offset]
    bitmaps = next(row for row in by_docs.fields("format.md", "Map page") if row.field == "bitmaps")
    assert bitmaps.type == f"bitmap[{EXTENTS_PER_PAGE}]"


def test_the_keys_in_the_document_are_those_of_the_code() -> None:
    rows = by_docs.table("protocol.md", "A handshake", "key of `standing`")
    told = {name.strip("` ") for row in rows for name in row["key of `standing`"].split(",")}
    assert told == set(handshake._STANDING)


# -- the wire ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", WIRES, ids=lambda path: path.name)
def test_golden_messages_are_read(directory: Path) -> None:
    raw = (directory / "messages.bin").read_bytes()
    expected = json.loads((directory / "messages.json").read_text())
    assert [by_docs.message(body) for _, body in by_docs.frames(raw)] == expected
    for (_, body), meaning in zip(by_docs.frames(raw), expected, strict=True):
        header = wire.decode_header(body[: wire.HEADER_BYTES])
        told = {**header._asdict(), "type": header.type.name, "payload": body[wire.HEADER_BYTES :].hex()}
        assert told == meaning


def test_messages_are_written_now_as_they_were_recorded_for_this_version() -> None:
    directory = HERE / f"wire-{wire.SESSION_VERSION}"
    written = list(record.messages())
    assert (directory / "messages.bin").read_bytes() == b"".join(raw for raw, _ in written)
    assert json.loads((directory / "messages.json").read_text()) == [meaning for _, meaning in written]
    kinds = {meaning["type"] for _, meaning in written}
    assert kinds == {kind.name for kind in wire.MessageType}, "each type is recorded"


def recorded_session(directory: Path) -> list[dict[str, bytes]]:
    raw = json.loads(gzip.decompress((directory / "session.json.gz").read_bytes()))
    return [{way: bytes.fromhex(said) for way, said in one.items()} for one in raw]


@pytest.mark.parametrize("directory", WIRES, ids=lambda path: path.name)
def test_a_golden_session_is_read_by_the_documents_alone(directory: Path) -> None:
    connections = recorded_session(directory)
    control, *data = [{way: by_docs.connection(raw) for way, raw in one.items()} for one in connections]
    hello, prepare, go = (json.loads(bytes.fromhex(one["payload"])) for one in control["there"][:3])
    reply, prepared, gone = (json.loads(bytes.fromhex(one["payload"])) for one in control["back"][:3])
    steps = [message["step"] for message in (prepare, prepared, go, gone)]
    assert steps == ["prepare", "prepared", "go", "gone"]
    assert (hello["version"], reply["version"]) == (int(directory.name.rpartition("-")[2]),) * 2
    assert len(data) == 36
    for index, one in enumerate(data, start=1):
        first = one["there"][0]
        assert (first["type"], first["number"], first["offset"]) == ("HELLO", index, hello["session"])
        asked, answered = (one["there"][1:], one["back"]) if index <= 18 else (one["back"], one["there"][1:])
        assert all(message["session"] == hello["session"] for message in (*asked, *answered))
        final = [message for message in answered if message["type"] != "RECEIVED"]
        assert [message["type"] for message in final] == ["ANSWER"] * len(asked)
        received = [message for message in asked if message["flags"] & Flag.ACK_RECEIVED]
        assert len(answered) - len(final) == len(received)
    kinds = {message["type"] for one in (control, *data) for way in one.values() for message in way}
    assert kinds >= {"HELLO", "HELLO_REPLY", "CONTROL", "HEARTBEAT", "WRITE", "ZERO", "TRIM", "FLUSH", "SUMS", "ANSWER"}


@pytest.mark.parametrize("directory", WIRES, ids=lambda path: path.name)
def test_a_golden_session_is_read(directory: Path) -> None:
    """The current program reads every byte of it, or names the version that it no longer speaks."""
    connections = recorded_session(directory)
    for one in connections:
        for raw in one.values():
            messages = [body for is_command, body in by_docs.frames(raw[wire.GREETING_BYTES :]) if not is_command]
            wire.parse_greeting(raw[: wire.GREETING_BYTES])
            for body in messages:
                header = wire.decode_header(body[: wire.HEADER_BYTES])
                payload = body[wire.HEADER_BYTES :]
                again = wire.encode_message(*header)
                assert again + payload == wire.outgoing_prefix(len(body)) + body
                if header.type in (wire.MessageType.HELLO, wire.MessageType.HELLO_REPLY) and payload:
                    message = wire.decode_object(payload, "a message")
                    if message.get("version", 1) < wire.SESSION_VERSION_MIN:
                        with pytest.raises(handshake.Refusal, match="peer-too-old"):
                            handshake.check_versions(message)
                    else:
                        handshake.check_versions(message)
                        handshake.decode_standing(message["standing"])

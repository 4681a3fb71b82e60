"""Make the golden files of the formats as they are now: `python -m tests.golden.record`.

Run it once when a format's version has changed, look at what it wrote, commit it, and never change or remove it again:
whatever is under tests/golden must open for ever. It leaves alone what is there already.

    metadata-N/   records and whole metadata files by the code whose superblock has version N
    side-maps-N/  pages of DIR/suspects and DIR/unproven, whose versions are N
    wire-N/       messages and a recorded session by the code whose session protocol has version N

Beside the bytes stands in JSON what they mean, as a reader must find it (values.json, messages.json).
"""

import dataclasses
import enum
import gzip
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mirror import sync
from mirror.core import layout, wire
from mirror.core.generation import Kind
from mirror.core.layout import (
    LogRecord,
    Superblock,
    encode_log_record,
    encode_map_page,
    encode_superblock,
    encode_suspects_page,
    encode_unproven_page,
)
from mirror.core.limits import (
    BLOCKS_PER_EXTENT,
    EXTENT_BYTES,
    EXTENTS_PER_PAGE,
    EXTENTS_PER_UNPROVEN_PAGE,
    HISTORY_MAX,
    LOG_CHANGES_MAX,
    LOG_SLICE,
    LOG_SLOTS_MAX,
    SUSPECT_PARTS_MAX,
)
from mirror.core.parked import News, encode_news
from mirror.core.recovery import choose_superblock
from mirror.core.states import DiskState
from mirror.core.wire import SESSION_VERSION, Flag, MessageType
from mirror.opening import open_replica
from mirror.runtime import Runtime
from tests.golden.tap import Tap
from tests.pair import SIZE_BYTES, create, free_port, pair, session_of, wait_in_step

HERE = Path(__file__).parent
SUMS = "SHA256SUMS"
SIDE_MAPS = (b"NMSU", b"NMUP")

# -- records ----------------------------------------------------------------------------------------------------------

FRESH = Superblock(
    sequence=1,
    name="vol",
    size_bytes=SIZE_BYTES,
    replica_id=bytes(range(1, 17)),
    volume_id=bytes(16),
    kind=Kind.FRESH,
    disk=DiskState.UP_TO_DATE,
    peer_disk=None,
    current=1,
    base=0,
    history=(),
    primary=False,
    clean=True,
    met_peer=False,
    incarnation=2,
    boot_id=bytes(range(32, 48)),
    log_slots=1024,
    log_epoch=1,
    protocol="C",
    redundancy_lost_at=0.0,
    last_resync=None,
)
FULLEST = dataclasses.replace(
    FRESH,
    sequence=2**64 - 1,
    name="A.longest_name-" + "n" * 48,
    size_bytes=(2**32 - 2) * EXTENT_BYTES,
    volume_id=bytes(range(240, 256)),
    kind=Kind.ESTABLISHED,
    peer_disk=DiskState.CONSISTENT,
    current=2**64 - 1,
    base=2**63,
    history=tuple(range(2**63, 2**63 + HISTORY_MAX)),
    primary=True,
    clean=False,
    met_peer=True,
    incarnation=2**64 - 2,
    log_slots=LOG_SLOTS_MAX,
    log_epoch=2**64 - 1,
    protocol="A",
    redundancy_lost_at=1800000000.25,
    last_resync={"started": 1800000001.5, "dirty_bytes": 2**63, "words": 'é " \\ \u2028', "seconds": 0.125},
    last_verify={"started": 1800000002.5, "ended": 1800000003.5, "checked_bytes": 2**63, "result": "equal"},
    suspect_parts=tuple((4096 * number + 1, 4095) for number in range(SUSPECT_PARTS_MAX)),
)
SUPERBLOCKS = {
    "fresh": FRESH,
    "fullest": FULLEST,
    "joining": dataclasses.replace(FRESH, kind=Kind.JOINING, disk=DiskState.INCONSISTENT, current=0),
    "backing": dataclasses.replace(FRESH, kind=Kind.BACKING, current=77, protocol="B"),
    "primary-alone": dataclasses.replace(
        FRESH,
        sequence=9,
        volume_id=FRESH.replica_id,
        kind=Kind.ESTABLISHED,
        peer_disk=DiskState.OUTDATED,
        current=5,
        base=4,
        history=(4, 1),
        primary=True,
        clean=False,
        met_peer=True,
        redundancy_lost_at=1.5e9,
    ),
    "target-of-a-resync": dataclasses.replace(
        FRESH,
        sequence=3,
        kind=Kind.ESTABLISHED,
        disk=DiskState.INCONSISTENT,
        peer_disk=DiskState.UP_TO_DATE,
        clean=False,
    ),
    "resizing": dataclasses.replace(
        FRESH, sequence=5, kind=Kind.ESTABLISHED, clean=False, next_size_bytes=SIZE_BYTES + 40 * EXTENT_BYTES
    ),
    "failed": dataclasses.replace(FRESH, sequence=4, kind=Kind.ESTABLISHED, disk=DiskState.FAILED, clean=False),
}
LOG_RECORDS = {
    "blank": LogRecord(0, 0, 1, (), ()),
    "first": LogRecord(1, 1, 64, ((0, 0), (1, 7)), tuple((slot, None) for slot in range(64))),
    "given-up": LogRecord(3, 70, 400, ((5, 77), (399, None)), ((160, 1), (161, None))),
    "fullest": LogRecord(
        2**64 - 1,
        2**64 - 1,
        LOG_SLOTS_MAX,
        tuple((slot, 2**32 - 2 - slot) for slot in range(LOG_CHANGES_MAX)),
        tuple((slot, slot) for slot in range(LOG_SLOTS_MAX - LOG_SLICE, LOG_SLOTS_MAX)),
    ),
}
ALL_BLOCKS = (1 << BLOCKS_PER_EXTENT) - 1
MAP_PAGES = {
    "clean": (0, [0] * EXTENTS_PER_PAGE),
    "some": (4, [1, 1 << 9, 1 << (BLOCKS_PER_EXTENT - 1), *[0] * (EXTENTS_PER_PAGE - 4), ALL_BLOCKS]),
    "all": (2**63, [ALL_BLOCKS] * EXTENTS_PER_PAGE),
}


UNPROVEN_PAGES: dict[str, tuple[int, list[int], int]] = {
    "none": (0, [], 0),
    "some": (0, [0, 9, EXTENTS_PER_UNPROVEN_PAGE - 1], 7),
    "all": (2**63, list(range(EXTENTS_PER_UNPROVEN_PAGE)), 2**64 - 1),
}


def side_maps() -> Iterator[tuple[str, bytes, Any]]:
    """The same of the pages of DIR/suspects and DIR/unproven."""
    for name, (index, bitmaps) in MAP_PAGES.items():
        meaning = {"index": index, "bitmaps": [f"{b:x}" for b in bitmaps]}
        yield f"suspects-{name}", encode_suspects_page(index, bitmaps), meaning
    for name, (index, extents, cursor) in UNPROVEN_PAGES.items():
        bits = sum(1 << extent for extent in extents)
        meaning = {"index": index, "cursor": cursor, "extents": extents}
        yield f"unproven-{name}", encode_unproven_page(index, bits, cursor), meaning


def records() -> Iterator[tuple[str, bytes, Any]]:
    """Name, bytes and meaning of each golden record."""
    for name, block in SUPERBLOCKS.items():
        yield f"superblock-{name}", encode_superblock(block), plain(dataclasses.asdict(block))
    for name, record in LOG_RECORDS.items():
        yield f"log-{name}", encode_log_record(record), plain(dataclasses.asdict(record))
    for name, (index, bitmaps) in MAP_PAGES.items():
        yield f"map-{name}", encode_map_page(index, bitmaps), {"index": index, "bitmaps": [f"{b:x}" for b in bitmaps]}


def plain(value: Any) -> Any:
    """As JSON holds it: bytes in hex, members of enumerations by their value."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


# -- whole metadata files ---------------------------------------------------------------------------------------------


def metadata_files() -> Iterator[tuple[str, bytes, Any]]:
    """What the running code leaves in `meta`, in some moments of a replica's life."""
    with scratch() as directory:
        create(directory / "new", 7000, 7001)
        yield metadata("fresh", directory / "new")
        with pair(directory / "pair") as (first, _):
            for block in (0, 1, 700, 1500):
                first.write(memoryview(b"\xa5" * 4096), block * 4096, False)
            first.flush()
            yield metadata("crashed-primary", directory / "pair" / "a")
            yield metadata("crashed-secondary", directory / "pair" / "b")
            first.disconnect()
            first.write(memoryview(b"\x5a" * 4096), 1800 * 4096, False)
            yield metadata("crashed-primary-alone", directory / "pair" / "a")
        yield metadata("stopped-primary", directory / "pair" / "a")
        yield metadata("stopped-secondary", directory / "pair" / "b")


def metadata(name: str, directory: Path) -> tuple[str, bytes, Any]:
    raw = (directory / "meta").read_bytes()
    return name, raw, found_at_start(raw)


def found_at_start(raw: bytes) -> dict[str, Any]:
    """What a start makes of a metadata file: its superblock, and what it then takes for dirty. Raises MirrorError."""
    choice = choose_superblock(raw[: layout.RECORD_BYTES], raw[layout.RECORD_BYTES : 2 * layout.RECORD_BYTES])
    if choice.refusal is not None:
        raise choice.refusal
    block = choice.superblock
    assert block is not None
    with scratch() as directory:
        (directory / "meta").write_bytes(raw)
        with (directory / "data").open("wb") as file:
            file.truncate(block.size_bytes)
        replica, notes = open_replica(
            Runtime(),
            directory,
            directory / "data",
            name=block.name,
            protocol=block.protocol,
            log_slots=block.log_slots,
            tracked=True,
            memory_kept=False,
        )
        replica.store.close()
    return {
        "superblock": plain(dataclasses.asdict(block)),
        "crashed_primary": replica.crashed_primary,
        "dirty": [list(run) for run in replica.dirty.runs()],
        "notes": notes,
    }


# -- messages ---------------------------------------------------------------------------------------------------------

SESSION = 0x0123456789ABCDEF
PAYLOAD = bytes(range(256))
# type, flags, offset, length, payload, code, number
MESSAGES: list[tuple[MessageType, int, int, int, bytes, int, int]] = [
    (MessageType.HELLO, 0, SESSION, 0, b"", 0, 36),
    (MessageType.HELLO, 0, 0, 0, b'{"version": 2}', 0, 0),
    (MessageType.HELLO_REPLY, 0, 0, 0, b'{"rule": "equal"}', 0, 0),
    (MessageType.REFUSED, 0, 0, 0, b'{"reason": "busy"}', 0, 0),
    (MessageType.QUESTION, 0, 0, 0, b'{"map_from": 0}', 0, 0),
    (MessageType.TOLD, 0, 0, 0, b'{"map": [[0, "f"]], "map_next": null}', 0, 0),
    (MessageType.CONTROL, 0, 0, 0, b'{"op": "outdate", "request": 1}', 0, 0),
    (MessageType.HEARTBEAT, 0, 0, 0, bytes(8 * 18), 0, 0),
    (MessageType.WRITE, 0, 4096, 256, PAYLOAD, 0, 0),
    (MessageType.WRITE, Flag.FUA, 2**40, 191, PAYLOAD[:191], 0, 0),
    (MessageType.WRITE, Flag.FUA, 2**40, 195, PAYLOAD[:195], 0, 0),
    (MessageType.WRITE, Flag.ACK_RECEIVED, 0, 196, PAYLOAD[:196], 0, 0),
    # The second parked write while the first is open, and a flush that covers neither the second nor the fourth.
    (MessageType.WRITE, Flag.PARK | Flag.TIMED, 4096, 256, PAYLOAD, 0, 2 << 8 | 1),
    (MessageType.FLUSH, 0, 0, 0, encode_news(News(4, (2, 4))), 0, 0),
    # 200 times the letter a, as an LZ4 block; its checksum stands in `number`.
    (MessageType.WRITE, Flag.RESYNC | Flag.LZ4, 8192, 200, bytes.fromhex("1f610100af506161616161"), 0, 0),
    (MessageType.ZERO, Flag.MAY_TRIM | Flag.FUA, 0, 2**26, b"", 0, 0),
    (MessageType.TRIM, 0, 4096, 4096, b"", 0, 0),
    (MessageType.FLUSH, 0, 0, 0, b"", 0, 0),
    (MessageType.READ, 0, 2**20, 2**20, b"", 0, 0),
    (MessageType.SUMS, Flag.RESYNC, 0, 8192, b"", 0, 0),
    (MessageType.ANSWER, 0, 0, 0, b"", 0, 0),
    (MessageType.ANSWER, 0, 0, 0, bytes(32), 0, 0),
    (MessageType.ANSWER, 0, 0, 0, b"", 28, 0),
    (MessageType.RECEIVED, 0, 0, 0, b"", 0, 0),
]


def messages() -> Iterator[tuple[bytes, dict[str, Any]]]:
    """One after the other as on a stream, each with its meaning."""
    for sequence, (kind, flags, offset, length, payload, code, noted) in enumerate(MESSAGES, start=1):
        number = wire.crc32c(b"a" * length) if flags & Flag.LZ4 else noted
        crc = wire.crc32c(payload)
        head = wire.encode_message(kind, flags, SESSION, sequence, offset, length, len(payload), crc, code, number)
        yield (
            head + payload,
            {
                "type": kind.name,
                "flags": int(flags),
                "session": SESSION,
                "sequence": sequence,
                "offset": offset,
                "length": length,
                "payload_length": len(payload),
                "payload_crc": crc,
                "code": code,
                "number": number,
                "payload": payload.hex(),
            },
        )


def session() -> list[dict[str, str]]:
    """What each connection of a real session said, control first: "there" from the side that dialled, "back" to it."""
    with scratch() as directory:
        listen = free_port(), free_port()
        tap = Tap(listen[1])
        try:
            always, sync.Compression.wanted = sync.Compression.wanted, lambda _: True  # type: ignore[method-assign]
            # The second finds nobody, so it is the first that dials.
            with pair(directory, "B", (*listen, tap.port, free_port())) as (first, second):
                act(first, 1)
                first.disconnect()
                act(first, 11)
                tap.connections.clear()
                first.connect(False)
                wait_in_step(first)
                wait_in_step(second)
                act(first, 21)
                for _ in range(3):
                    session_of(first).beat()
        finally:
            sync.Compression.wanted = always  # type: ignore[method-assign]
            tap.close()
        return [{"there": kept.there.hex(), "back": kept.back.hex()} for kept in tap.connections]


def act(volume: Any, content: int) -> None:
    """Every kind of change, small ones."""
    for number, (first, fua) in enumerate([(0, False), (3, True), (9, False)]):
        volume.write(memoryview(bytes([number + content]) * 4096 * 2), first * 4096, fua)
    volume.write(memoryview(PAYLOAD), 100, False)
    volume.zero(4096, 4096, True, False, False)
    volume.trim(9 * 4096, 4096, True)
    volume.flush()


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def scratch() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="golden"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def write_metadata(directory: Path) -> None:
    values: dict[str, Any] = {}
    for name, raw, meaning in records():
        (directory / f"{name}.bin").write_bytes(raw)
        values[name] = meaning
    for name, raw, meaning in metadata_files():
        (directory / f"meta-{name}.gz").write_bytes(gzip.compress(raw, mtime=0))
        values[f"meta-{name}"] = meaning
    write_json(directory / "values.json", values)


def write_side_maps(directory: Path) -> None:
    values: dict[str, Any] = {}
    for name, raw, meaning in side_maps():
        (directory / f"{name}.bin").write_bytes(raw)
        values[name] = meaning
    write_json(directory / "values.json", values)


def write_wire(directory: Path) -> None:
    told = list(messages())
    (directory / "messages.bin").write_bytes(b"".join(raw for raw, _ in told))
    write_json(directory / "messages.json", [meaning for _, meaning in told])
    (directory / "session.json.gz").write_bytes(gzip.compress(json.dumps(session()).encode(), mtime=0))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_sums(directory: Path) -> None:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(directory.iterdir())
        if path.name != SUMS
    ]
    (directory / SUMS).write_text("".join(lines))


def main() -> int:
    written = False
    for name, write in (
        (f"metadata-{layout.SUPERBLOCK_VERSION}", write_metadata),
        (f"side-maps-{max(layout.VERSIONS[magic] for magic in SIDE_MAPS)}", write_side_maps),
        (f"wire-{SESSION_VERSION}", write_wire),
    ):
        directory = HERE / name
        if directory.exists():
            continue
        directory.mkdir()
        write(directory)
        write_sums(directory)
        written = True
        sys.stdout.write(f"wrote {directory}\n")
    if not written:
        sys.stderr.write("all versions of now are there already; golden files are never changed\n")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())

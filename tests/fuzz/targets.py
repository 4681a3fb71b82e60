"""What is fuzzed: for each decoder how an input is made, what must hold of its outcome, and what it may cost.

A check raises AssertionError, or lets any exception through that is not one of the documented errors. What is sealed by
a checksum must be refused whenever it is not one of the recorded inputs; behind a right checksum (resealed) anything
may stand, and must be refused by name or come back as it went.
"""

import json
import random
import socket
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import crc32c

from cli import inspect, offline
from mirror import driven, handshake, questions
from mirror.core import wire
from mirror.core.activity_log import ActivityLog, DamagedLog, Rebuilt
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import DamagedRecord, LinkLost, MirrorError, OperatorError, ProtocolError, UnknownVersion
from mirror.core.generation import Action, Outcome
from mirror.core.layout import (
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
from mirror.core.limits import HEADER_BYTES, KIB, LOG_RING_RECORDS, MIB, RECORD_BYTES, REQUEST_BYTES_MAX
from mirror.core.map_message import add_map
from mirror.core.parked import News, decode_news, decode_slot, encode_news, encode_slot
from mirror.core.policy import REFUSE_ALWAYS, Policies
from mirror.core.recovery import choose_superblock
from mirror.link import RECEIVE_BUFFER_BYTES, Stream
from mirror.opening import open_replica
from mirror.replica import Replica
from mirror.runtime import Runtime
from nbd_server import config
from nbd_server.control import ControlServer
from nbd_server.processor import NUMBER_MAX, SAID, of_peer
from nbd_server.volume import StartOptions, Volume
from tests.fuzz import corpus
from tests.fuzz.mutation import mutate
from tests.golden import record
from tests.golden.record import ALL_BLOCKS
from tests.pair import create


@dataclass(frozen=True)
class Target:
    """`memory_bytes`: what a check may allocate beyond its input; `steps`: lines of Python that it may run; `share` of
    all inputs that it gets."""

    name: str
    make: Callable[[random.Random], bytes]
    check: Callable[[bytes], None]
    memory_bytes: int
    steps: int
    share: int


# -- records ----------------------------------------------------------------------------------------------------------


def reseal(raw: bytes) -> bytes:
    """The same record under a right checksum, of a right length."""
    body = raw[: RECORD_BYTES - 4].ljust(RECORD_BYTES - 4, b"\0")
    return body + struct.pack("<I", crc32c.crc32c(body))


def make_record(kind: str) -> Callable[[random.Random], bytes]:
    return lambda rng: mutate(rng, corpus.records(kind))


def make_resealed(kind: str) -> Callable[[random.Random], bytes]:
    """Changes where they are looked at: behind magic and version, mostly within the first fields."""

    def make(rng: random.Random) -> bytes:
        raw = rng.choice(corpus.records(kind))
        changed = bytearray(mutate(rng, [raw[6 : rng.choice((40, 200, 700, 4092))]]))
        return reseal(raw[:6] + bytes(changed) + raw[6 + len(changed) :])

    return make


def check_record(kind: str, decode: Callable[[bytes], Any]) -> Callable[[bytes], None]:
    def check(raw: bytes) -> None:
        try:
            decode(raw)
        except DamagedRecord:
            return
        assert raw in corpus.records(kind), "a damaged record was taken as good"

    return check


def check_resealed(decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]) -> Callable[[bytes], None]:
    def check(raw: bytes) -> None:
        try:
            found = decode(raw)
        except (DamagedRecord, UnknownVersion):
            return
        assert decode(encode(found)) == found, "what is read can't be written as it is"

    return check


def decode_page(raw: bytes) -> tuple[int, list[int]]:
    """A page at its own place."""
    index = struct.unpack_from("<Q", raw.ljust(16, b"\0"), 8)[0]
    return index, decode_map_page(raw, index)


def decode_suspects(raw: bytes) -> tuple[int, list[int]]:
    index = struct.unpack_from("<Q", raw.ljust(16, b"\0"), 8)[0]
    return index, decode_suspects_page(raw, index)


def decode_unproven(raw: bytes) -> tuple[int, tuple[int, int]]:
    index = struct.unpack_from("<Q", raw.ljust(16, b"\0"), 8)[0]
    return index, decode_unproven_page(raw, index)


def make_copies(rng: random.Random) -> bytes:
    return b"".join(
        (
            mutate(rng, corpus.records("superblock"))
            if rng.random() < 0.7
            else rng.choice(corpus.records("superblock"))
        ).ljust(RECORD_BYTES, b"\0")[:RECORD_BYTES]
        for _ in range(2)
    )


def check_copies(raw: bytes) -> None:
    chosen = choose_superblock(raw[:RECORD_BYTES], raw[RECORD_BYTES:])
    assert (chosen.superblock is None) == (chosen.refusal is not None)
    if chosen.superblock is not None:
        sound = [decode_superblock(one) for one in corpus.records("superblock")]
        assert chosen.superblock in sound, "a damaged superblock was chosen"


# -- the log ring -----------------------------------------------------------------------------------------------------


def make_ring(rng: random.Random) -> bytes:
    """Which ring (one byte), and the ring with some of its records changed, swapped or sealed again."""
    number = rng.randrange(len(corpus.rings()))
    ring = split(corpus.rings()[number][0])
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(LOG_RING_RECORDS)
        match rng.randrange(5):
            case 0:
                other = rng.randrange(LOG_RING_RECORDS)
                ring[at], ring[other] = ring[other], ring[at]
            case 1:
                ring[at] = reseal(mutate(rng, [ring[at][:700]]))
            case _:
                ring[at] = mutate(rng, [ring[at]]).ljust(RECORD_BYTES, b"\0")[:RECORD_BYTES]
    return bytes((number,)) + b"".join(ring)


def split(raw: bytes) -> list[bytes]:
    return [raw[at : at + RECORD_BYTES] for at in range(0, len(raw), RECORD_BYTES)]


@cache
def sound_ring(number: int) -> tuple[list[bytes], Rebuilt, Rebuilt | DamagedLog, int]:
    """A ring, what it tells, what it told before its newest record, and that one's sequence."""
    raw, epoch = corpus.rings()[number]
    ring = split(raw)
    now = ActivityLog.rebuild(ring, epoch)
    assert isinstance(now, Rebuilt)
    newest = now.next_sequence - 1
    before = list(ring)
    before[ring_position(newest)] = bytes(RECORD_BYTES)
    return ring, now, ActivityLog.rebuild(before, epoch), newest


def check_ring(raw: bytes) -> None:
    number, ring = raw[0], split(raw[1:])
    sound, now, before, newest = sound_ring(number)
    found = ActivityLog.rebuild(ring, corpus.rings()[number][1])
    if isinstance(found, DamagedLog):
        return
    changed = [at for at in range(LOG_RING_RECORDS) if ring[at] != sound[at]]
    if all(is_damage(ring[at]) for at in changed):
        # A torn newest record was never believed; damage anywhere else must not pass for less than was there.
        is_torn = newest > 0 and changed == [ring_position(newest)]
        assert is_torn or changed in ([], [ring_position(newest + 1)]), "a damaged log was taken as good"
        known = before if is_torn else now
        assert isinstance(known, Rebuilt)
        assert found.extents == known.extents


def is_damage(raw: bytes) -> bool:
    try:
        decode_log_record(raw)
    except DamagedRecord:
        return True
    except UnknownVersion:
        pass
    return False


# -- a whole metadata file --------------------------------------------------------------------------------------------


def make_metadata(rng: random.Random) -> bytes:
    """Which file (one byte), and changes of some of its records."""
    number = rng.randrange(len(corpus.metadata_files()))
    whole = split(corpus.metadata_files()[number])
    for _ in range(rng.choice((1, 1, 2, 3))):
        # Superblocks, the map page and the first log records are the ones that matter.
        at = rng.choice((0, 1, len(whole) - 1, 2, 3, rng.randrange(len(whole))))
        if rng.random() < 0.3:
            head = 6 + len(whole[at][6:].rstrip(b"\0"))
            whole[at] = reseal(whole[at][:6] + mutate(rng, [whole[at][6 : min(head + 8, RECORD_BYTES - 4)]]))
        else:
            whole[at] = mutate(rng, [whole[at]]).ljust(RECORD_BYTES, b"\0")[:RECORD_BYTES]
    return bytes((number,)) + b"".join(whole)


def look_at(whole: bytes) -> None:
    """`inspect` and `status` of a replica that nothing serves: in words, whatever is there."""
    path = Path(scratch().name) / "inspected"
    path.mkdir(exist_ok=True)
    (path / "meta").write_bytes(whole)
    with (path / "data").open("wb") as file:
        file.truncate(8 * MIB)
    known = config.Config("vol")
    (path / config.FILE_NAME).write_text(config.render(known))
    for look in (lambda: inspect._look(path, served=False), lambda: offline.status(path, known)):
        try:
            look()
        except MirrorError:
            pass


def check_metadata(raw: bytes) -> None:
    number, whole = raw[0], raw[1:]
    sound = corpus.metadata_files()[number]
    look_at(whole)
    try:
        found = record.found_at_start(whole)
    except MirrorError:
        return
    changed = [at for at, (one, other) in enumerate(zip(split(whole), split(sound), strict=True)) if one != other]
    only_map = changed == [len(split(sound)) - 1]
    if only_map and decodes_not(split(whole)[-1]):
        expected = record.found_at_start(sound)
        assert blocks_of(found) >= blocks_of(expected), "damage made less dirty"


def decodes_not(page: bytes) -> bool:
    try:
        decode_map_page(page, 0)
    except DamagedRecord:
        return True
    return False


def blocks_of(found: dict[str, Any]) -> set[int]:
    return {at for offset, length in found["dirty"] for at in range(offset, offset + length, 4096)}


# -- the maps beside it -----------------------------------------------------------------------------------------------


def make_side_files(rng: random.Random) -> bytes:
    """A page of suspects and one of unproven extents, as a volume of two extents has them."""
    return make_side_page(rng, "suspects") + make_side_page(rng, "unproven")


def make_side_page(rng: random.Random, kind: str) -> bytes:
    bits = rng.choice((0, 1, 3, 5, 1 << 1024, 1 << 2047, 1 << 2048, rng.getrandbits(2048)))
    if kind == "suspects":
        page = encode_suspects_page(0, [bits % (1 << 1024), bits >> 1024 & ALL_BLOCKS, bits >> 2048 & ALL_BLOCKS])
    else:
        page = encode_unproven_page(0, bits % 8, bits % 9)
    if rng.random() < 0.5:
        page = mutate(rng, [page]).ljust(RECORD_BYTES, b"\0")[:RECORD_BYTES]
    return page


def check_side_files(raw: bytes) -> None:
    path = Path(scratch().name) / "beside"
    path.mkdir(exist_ok=True)
    block = decode_superblock(corpus.metadata_files()[-1][:RECORD_BYTES])
    (path / "meta").write_bytes(corpus.metadata_files()[-1])
    (path / "suspects").write_bytes(raw[:RECORD_BYTES])
    (path / "unproven").write_bytes(raw[RECORD_BYTES:])
    with (path / "data").open("wb") as file:
        file.truncate(block.size_bytes)
    opened, _ = open_replica(
        Runtime(),
        path,
        path / "data",
        name=block.name,
        protocol="C",
        log_slots=block.log_slots,
        tracked=True,
        memory_kept=False,
    )
    opened.store.close()
    suspects, unproven = (DirtyMap(block.size_bytes) for _ in range(2))
    try:
        for extent, bits in enumerate(decode_suspects_page(raw[:RECORD_BYTES], 0)):
            if bits:
                suspects.set_bits(extent, bits)
    except (DamagedRecord, UnknownVersion, ValueError):
        # Compared again; neither taken for suspect nor for sound.
        suspects.clear_all()
        unproven.mark_all()
    assert list(opened.suspects.found.runs()) == list(suspects.runs()), "not what the pages say"
    try:
        bits = decode_unproven_page(raw[RECORD_BYTES:], 0)[0]
    except (DamagedRecord, UnknownVersion):
        bits = 3
    for extent in range(2):
        if bits >> extent & 1 or bits > 3:
            unproven.mark_extent(extent)
    assert set(opened.unproven.extents()) >= set(unproven.extents()), "damage made less to be compared"


# -- volume.toml ------------------------------------------------------------------------------------------------------

CONFIG_BYTES = 96 * MIB


@cache
def directory() -> Path:
    """A scratch directory of this process."""
    path = Path(scratch().name) / "volume"
    path.mkdir()
    return path


@cache
def scratch() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="fuzz")


def check_config(raw: bytes) -> None:
    (directory() / config.FILE_NAME).write_bytes(raw)
    refusal = None
    try:
        found = config.load(directory())
    except config.ConfigError as error:
        refusal = error
    if refusal is None:
        assert config.parse(config.render(found), Path("again")) == found
    else:
        assert refusal.remedy
        assert len(str(refusal)) < 70 * KIB


# -- ZMTP and messages ------------------------------------------------------------------------------------------------


def through_a_socket(raw: bytes, use: Callable[[Stream], None]) -> None:
    """Let a stream read these bytes and then the end of its connection, from a real socket."""
    near, far = socket.socketpair()
    with near, far:
        far.setblocking(False)
        assert far.send(raw) == len(raw), "more than a socket's buffer holds"
        far.shutdown(socket.SHUT_WR)
        use(Stream(near, "fuzz"))


def make_connection(rng: random.Random) -> bytes:
    """A connection from its greeting on, changed in its first bytes above all."""
    raw = rng.choice(corpus.connections())
    start = rng.choice((64, 110, 110, len(raw)))
    return (mutate(rng, [raw[:start]]) + raw[start:])[: 64 * KIB]


def check_connection(raw: bytes) -> None:
    def use(stream: Stream) -> None:
        try:
            stream.greet()
            while True:
                stream.receive()
        except (LinkLost, ProtocolError):
            pass

    through_a_socket(raw, use)


def make_messages(rng: random.Random) -> bytes:
    return mutate(rng, [b"".join(corpus.messages())])


def check_messages(raw: bytes) -> None:
    taken: list[bytes] = []

    def use(stream: Stream) -> None:
        stream.session = record.SESSION
        try:
            while True:
                header, payload = stream.receive()
                taken.append(wire.encode_message(*header)[-HEADER_BYTES:] + bytes(payload))
        except (LinkLost, ProtocolError):
            pass

    through_a_socket(raw, use)
    sound = [one[-len(body) :] for one, body in zip(corpus.messages(), taken, strict=False)]
    assert taken == sound, "a damaged message was taken as good"


def make_sealed_messages(rng: random.Random) -> bytes:
    """Messages that are sound to the checksums of both header and payload, but say something else."""
    said = b""
    for number in range(1, rng.randrange(2, 5)):
        whole = rng.choice(corpus.messages())
        body = bytearray(whole[2:] if whole[0] == 0 else whole[9:])
        payload = bytes(body[HEADER_BYTES:])
        if rng.random() < 0.3:
            payload = mutate(rng, [payload])
        header = bytearray(mutate(rng, [bytes(body[: HEADER_BYTES - 4])])[: HEADER_BYTES - 4].ljust(HEADER_BYTES - 4))
        length = rng.choice((2**26, 2**26 + 1, 2**32 - 1)) if rng.random() < 0.05 else len(payload)
        struct.pack_into("<HBB", header, 0, 0x626E, 1, rng.choice((header[3], rng.randrange(1, 14))))
        struct.pack_into("<QQ", header, 8, record.SESSION, number)
        struct.pack_into("<II", header, 36, length, crc32c.crc32c(payload))
        sealed = bytes(header) + struct.pack("<I", crc32c.crc32c(header))
        said += wire.outgoing_prefix(HEADER_BYTES + length) if length <= REQUEST_BYTES_MAX else b"\x02" + bytes(8)
        said += sealed + payload
    return said[: 64 * KIB]


def check_sealed_messages(raw: bytes) -> None:
    def use(stream: Stream) -> None:
        stream.session, stream.payload_bytes_max = record.SESSION, REQUEST_BYTES_MAX
        number = 0
        try:
            while True:
                header, payload = stream.receive()
                number += 1
                assert (header.session, header.sequence) == (record.SESSION, number)
                assert len(payload) == header.payload_length
        except (LinkLost, ProtocolError):
            pass

    through_a_socket(raw, use)


def make_command(rng: random.Random) -> bytes:
    ready = wire.ready_command(b"DEALER")[2:]
    return mutate(rng, [ready, b"\x04PING\x00\x0acontext", b"\x04PONGcontext", b"\x05ERROR\x02no"])


def check_command(raw: bytes) -> None:
    for read in (wire.parse_ready, wire.answer_command):
        try:
            read(raw)
        except ProtocolError:
            pass


# -- JSON -------------------------------------------------------------------------------------------------------------


def make_hello(rng: random.Random) -> bytes:
    return mutate(rng, corpus.json_messages("HELLO", "HELLO_REPLY"))


def check_hello(raw: bytes) -> None:
    try:
        standing = handshake.parse_hello(raw)[0]
    except (ProtocolError, handshake.Refusal):
        return
    assert handshake.decode_standing(handshake.encode_standing(standing)) == standing


OPERATIONS = [
    b'{"op": "state", "role": "primary", "disk": "UpToDate"}',
    b'{"op": "sync_progress", "done_bytes": 1, "total_bytes": 2, "bytes_per_s": 3, "eta_s": null}',
    b'{"op": "sync_finished", "request": 1, "current": 5, "history": [4, 1], "result": {"seconds": 0.5}}',
    b'{"op": "primary_disk_failed", "request": 2, "generation": 77}',
    b'{"step": "prepare", "resync_generation": 9, "map": [[0, "f"], [1, "1"]]}',
    b'{"step": "prepared", "map": "all"}',
    b'{"op": "bye", "request": 3, "reason": "stopped"}',
]


def make_control(rng: random.Random) -> bytes:
    return mutate(rng, [*OPERATIONS, *corpus.json_messages("CONTROL", "REFUSED")])


@cache
def replica() -> Replica:
    """A replica of two extents, to be told of dirty maps."""
    path = Path(scratch().name) / "replica"
    create(path, 7000, 7001)
    return Volume.open(path, StartOptions(), Runtime(), lambda: None)._replica


LAST_RESYNC = {"dirty_bytes": 1 << 30, "seconds": 2.5, "bytes_per_s": 1 << 20}


def check_control(raw: bytes) -> None:
    try:
        message = wire.decode_object(raw, "a message")
    except ProtocolError:
        return
    for read in (
        handshake.live_state,
        handshake.progress,
        lambda said: handshake.finished_target(said, None),
        lambda said: handshake.finished_target(said, LAST_RESYNC),
        handshake.new_generation,
        handshake.generation_in,
    ):
        try:
            read(message)
        except ProtocolError:
            pass
    mine = handshake.standing(replica(), False, REFUSE_ALWAYS)
    plan = handshake.Plan(Outcome("behind", Action.SOURCE_BITMAP, ""), mine, mine, 7)
    try:
        handshake._select(replica(), plan, message)
    except ProtocolError:
        pass
    dirty = replica().dirty
    assert dirty.dirty_blocks == sum(dirty.bits(extent).bit_count() for extent in range(2)), "the map is damaged"
    dirty.clear_all()


def make_question(rng: random.Random) -> bytes:
    return mutate(rng, [*questions_told(), *corpus.json_messages("HELLO")])


@cache
def questions_told() -> list[bytes]:
    """What a replica asks, and what it answers."""
    said = questions.Said(handshake.standing(replica(), False, Policies()), {"protocol": "C"}, True, True)
    told = questions._encode(said)
    parts = ({"map_from": None}, {"map_from": 0}, {"map": [[0, "f"], [1, "1"]], "map_next": None}, {"map_next": 1})
    return [json.dumps({**told, **part}).encode() for part in parts]


def check_question(raw: bytes) -> None:
    try:
        message = wire.decode_object(raw, "a message")
        questions._decode(message)
    except (ProtocolError, handshake.Refusal):
        return
    for read in (
        lambda: questions._part(replica().dirty, message.get("map_from")),
        lambda: add_map(DirtyMap(8 * MIB), message.get("map"), "a dirty map", "no map"),
    ):
        try:
            read()
        except ProtocolError:
            pass


COMPARISONS = [
    b'{"op": "suspects_add", "extents": [[0, "f"], [1, "1"]]}',
    b'{"op": "suspects_clear", "extents": [[1, "ff"]]}',
    b'{"op": "suspects_get", "from_extent": 0}',
    b'{"op": "unproven_get"}',
    b'{"op": "proven", "runs": [[0, 1], [1, 1]]}',
    b'{"op": "proven", "runs": "all"}',
    b'{"op": "verify_note", "note": {"started": 1.5, "result": "equal"}}',
    b'{"op": "proof_state", "state": "running", "left_bytes": 4096, "rest_left_bytes": null, "reason": null}',
]


def check_comparison(raw: bytes) -> None:
    """What the side that compares may tell the other one."""
    try:
        message = wire.decode_object(raw, "a message")
    except ProtocolError:
        return
    if message.get("op") not in driven.OPERATIONS:
        return
    try:
        driven.Driven(replica()).answer(message)
    except ProtocolError:
        pass
    found = replica().suspects.found
    assert found.dirty_blocks == sum(found.bits(extent).bit_count() for extent in range(2)), "the suspects are damaged"
    assert set(replica().unproven.extents()) <= {0, 1}


USES = [
    b'{"processor": {"cores": 2, "own_cores": 0.25, "idle_percent": 3, "runnable": 7, "before": '
    b'[{"began_ago_s": 9.5, "ended_ago_s": 8.5, "own_cores": 0.9, "idle_percent": 0, "runnable": 7}]}}',
    b'{"processor": null}',
]


def check_use(raw: bytes) -> None:
    """How its processors were used, says the peer."""
    try:
        found = of_peer(wire.decode_object(raw, "a message").get("processor"))
    except ProtocolError:
        return
    if found is not None:
        stretches = [{key: found[key] for key in ("cores", *SAID)}, *found["before"]]
        assert all(0 <= number <= NUMBER_MAX for one in stretches for number in one.values())
        assert all(one["began_ago_s"] >= one["ended_ago_s"] for one in found["before"])


# -- parked writes ----------------------------------------------------------------------------------------------------

EPOCH = 7
SLOTS = [encode_slot(EPOCH, 4096, bytes(4096)), encode_slot(EPOCH, 2**40, b"x"), encode_slot(EPOCH, 0, bytes(32768))]
NEWS = [encode_news(News(3, ())), encode_news(News(2**64 - 1, (2, 3))), encode_news(News(40, tuple(range(25, 41))))]


def check_slot(raw: bytes) -> None:
    found = decode_slot(raw, EPOCH)
    if found is not None:
        assert any(raw.startswith(slot) for slot in SLOTS), "a damaged slot was taken as good"


def check_news(raw: bytes) -> None:
    try:
        found = decode_news(raw)
    except ProtocolError:
        return
    assert encode_news(found) == raw


# -- the control socket -----------------------------------------------------------------------------------------------

LINES = [
    b'{"command": "status"}\n',
    b'{"command": "promote", "force": true}\n',
    b'{"command": "connect", "discard_my_data": false}\n',
]


def command(request: dict[str, Any]) -> dict[str, Any]:
    """What stands behind the socket takes one word, and all that else is a wish."""
    if request["command"] not in ("status", "promote", "connect"):
        raise OperatorError(f"unknown command {request['command']!r}")
    return {"force": bool(request.get("force"))}


def check_line(raw: bytes) -> None:
    answer = ControlServer(Path("control.sock"), command, Runtime())._answer(raw)
    assert answer["ok"] in (True, False)
    assert answer["ok"] or answer["error"]["message"] != "the server failed"


_ROWS = (
    # name, make, check, memory_bytes, steps, share
    ("superblock", make_record("superblock"), check_record("superblock", decode_superblock), 64 * KIB, 1000, 40),
    (
        "superblock-resealed",
        make_resealed("superblock"),
        check_resealed(decode_superblock, encode_superblock),
        64 * KIB,
        2000,
        40,
    ),
    ("copies", make_copies, check_copies, 128 * KIB, 10_000, 10),
    ("log-record", make_record("log"), check_record("log", decode_log_record), 128 * KIB, 20_000, 30),
    (
        "log-record-resealed",
        make_resealed("log"),
        check_resealed(decode_log_record, encode_log_record),
        128 * KIB,
        40_000,
        30,
    ),
    ("map-page", make_record("map"), check_record("map", decode_page), 64 * KIB, 1000, 30),
    (
        "map-page-resealed",
        make_resealed("map"),
        check_resealed(decode_page, lambda page: encode_map_page(*page)),
        64 * KIB,
        2000,
        20,
    ),
    ("suspects", make_record("suspects"), check_record("suspects", decode_suspects), 64 * KIB, 1000, 20),
    ("unproven", make_record("unproven"), check_record("unproven", decode_unproven), 64 * KIB, 1000, 20),
    (
        "unproven-resealed",
        make_resealed("unproven"),
        check_resealed(decode_unproven, lambda page: encode_unproven_page(page[0], *page[1])),
        64 * KIB,
        2000,
        10,
    ),
    ("side-files", make_side_files, check_side_files, 4 * MIB, 1_000_000, 1),
    ("log-ring", make_ring, check_ring, 4 * MIB, 1_000_000, 5),
    ("metadata", make_metadata, check_metadata, 4 * MIB, 1_000_000, 1),
    ("volume-toml", lambda rng: mutate(rng, corpus.configurations()), check_config, CONFIG_BYTES, 2_000_000, 20),
    ("connection", make_connection, check_connection, RECEIVE_BUFFER_BYTES + 512 * KIB, 50_000, 30),
    ("messages", make_messages, check_messages, RECEIVE_BUFFER_BYTES + 512 * KIB, 50_000, 40),
    ("messages-resealed", make_sealed_messages, check_sealed_messages, REQUEST_BYTES_MAX + 512 * KIB, 50_000, 40),
    ("zmtp-command", make_command, check_command, 64 * KIB, 20_000, 30),
    ("hello", make_hello, check_hello, 4 * MIB, 10_000, 50),
    ("control-message", make_control, check_control, 4 * MIB, 20_000, 50),
    ("comparison", lambda rng: mutate(rng, COMPARISONS), check_comparison, 4 * MIB, 100_000, 10),
    ("use-of-processors", lambda rng: mutate(rng, USES), check_use, 4 * MIB, 50_000, 10),
    ("question", make_question, check_question, 4 * MIB, 20_000, 30),
    ("parked-slot", lambda rng: mutate(rng, SLOTS), check_slot, 256 * KIB, 1000, 10),
    ("parked-news", lambda rng: mutate(rng, NEWS), check_news, 64 * KIB, 1000, 10),
    ("control-socket", lambda rng: mutate(rng, LINES), check_line, 4 * MIB, 10_000, 30),
)
TARGETS = {name: Target(name, *rest) for name, *rest in _ROWS}

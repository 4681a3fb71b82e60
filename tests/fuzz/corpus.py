"""What the fuzzers start from: golden files of every version, and rings of a log that has been busy."""

import gzip
import json
import random
from functools import cache
from pathlib import Path

from mirror.core.activity_log import NEED_STABLE, ActivityLog, Transaction
from mirror.core.layout import Geometry, blank_log_record, encode_log_record
from mirror.core.limits import LOG_RING_RECORDS, RECORD_BYTES
from nbd_server.config import Address, Config, TcpEndpoint, UnixEndpoint, render
from tests.golden import by_docs

GOLDEN = Path(by_docs.__file__).parent


@cache
def records(kind: str) -> list[bytes]:
    """Golden records of a kind: superblock, log, map, suspects, unproven."""
    return [path.read_bytes() for path in sorted(GOLDEN.glob(f"*/{kind}-*.bin"))]


@cache
def metadata_files() -> list[bytes]:
    return [gzip.decompress(path.read_bytes()) for path in sorted(GOLDEN.glob("metadata-*/meta-*.gz"))]


@cache
def rings() -> list[tuple[bytes, int]]:
    """Rings and the epoch that counts in each: of golden files, and of logs after many transactions."""
    found = []
    for raw in metadata_files():
        start = Geometry.log_offset
        epoch = int(by_docs.superblock(raw[:RECORD_BYTES])["log_epoch"])
        found.append((raw[start : start + LOG_RING_RECORDS * RECORD_BYTES], epoch))
    found += [(busy_ring(slots, writes), 3) for slots, writes in ((1, 5), (64, 30), (64, 200), (400, 70), (8192, 130))]
    return found


def busy_ring(slots: int, writes: int) -> bytes:
    """The ring of a log of epoch 3 after so many records, over the leavings of epoch 2."""
    rng = random.Random(f"{slots} {writes}")
    ring = [blank_log_record()] * LOG_RING_RECORDS
    for epoch, count in ((2, 40), (3, writes)):
        log = ActivityLog(slots, epoch=epoch)
        for number in range(1, count + 1):
            first = rng.randrange(4 * slots)
            last = first + rng.randrange(min(log.range_max, 8))
            planned = log.plan([(first, last)])
            if planned is NEED_STABLE:
                log.stable_through(number)
                planned = log.plan([(first, last)])
            assert isinstance(planned, Transaction)
            if planned.record.changes:
                ring[planned.position] = encode_log_record(planned.record)
            log.commit(planned)
            log.release(first, last, number)
    return b"".join(ring)


@cache
def messages() -> list[bytes]:
    """The golden messages of one stream, each with its frame."""
    found = []
    for path in sorted(GOLDEN.glob("wire-*/messages.bin")):
        raw, at = path.read_bytes(), 0
        for _, body in by_docs.frames(raw):
            size = len(body) + (2 if raw[at] == 0 else 9)
            found.append(raw[at : at + size])
            at += size
        assert at == len(raw)
    return found


@cache
def connections() -> list[bytes]:
    """Either side of each connection of the golden sessions, greetings and all."""
    found: list[bytes] = []
    for path in sorted(GOLDEN.glob("wire-*/session.json.gz")):
        for one in json.loads(gzip.decompress(path.read_bytes())):
            found += [bytes.fromhex(said) for said in one.values()]
    return found


@cache
def json_messages(*kinds: str) -> list[bytes]:
    """What the golden sessions said in JSON, in messages of these types."""
    found: list[bytes] = []
    for raw in connections():
        told = [bytes.fromhex(one["payload"]) for one in by_docs.connection(raw) if one["type"] in kinds]
        found += [payload for payload in told if payload.startswith(b"{")]
    return list(dict.fromkeys(found))


@cache
def configurations() -> list[bytes]:
    near, far = Address("127.0.0.1", 7000), Address("::1", 7001)
    configs = [
        Config("vol"),
        Config("vol", "A", near, far, Path("/dev/disk"), UnixEndpoint(Path("/run/x")), True, 1.5, 2.5, 10.0, 64),
        Config("vol", "B", far, Address("node-1.example.com", 1), nbd=TcpEndpoint(near)),
    ]
    return [render(config).encode() for config in configs]

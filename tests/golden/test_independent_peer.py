"""A peer written from docs/protocol.md alone shakes hands with a real replica, writes to it, reads back, and leaves."""

import hashlib
import json
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mirror.core import wire
from tests.golden import by_docs
from tests.pair import SIZE_BYTES, create, free_port, peer_of, serve, stop

TIMEOUT_S = 10
SESSION = 0x1122334455667788
REPLICA = "c0ffee" + "00" * 12 + "01"
FIELDS = by_docs.fields("protocol.md", "Messages")
TYPES = {name: code for code, name in by_docs.codes("Messages", "code", "type").items()}
FORMATS = {"u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q", "i32": "<i"}


class Connection:
    """One connection of the independent peer, which dials."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
        self.session = 0
        self.sent = 0
        self._waiting = b""
        greeting = bytearray(64)
        greeting[0], greeting[9], greeting[10] = 255, 127, 3
        greeting[12:16] = b"NULL"
        self.socket.sendall(greeting)
        self._take(64)
        entries = [(b"Socket-Type", b"DEALER"), (b"Identity", b"")]
        ready = b"\x05READY" + b"".join(
            bytes((len(name),)) + name + struct.pack(">I", len(value)) + value for name, value in entries
        )
        self.socket.sendall(bytes((4, len(ready))) + ready)
        is_command, body = self._frame()
        assert is_command
        assert body.startswith(b"\x05READY")

    def send(self, kind: str, payload: bytes = b"", **values: int) -> None:
        self.sent += 1
        known = {
            "magic": 0x626E,
            "version": 1,
            "type": TYPES[kind],
            "session": self.session,
            "sequence": self.sent,
            "payload_length": len(payload),
            "payload_crc": by_docs.crc32c(payload) if payload else 0,
            **values,
        }
        header = bytearray(60)
        for row in FIELDS[:-1]:
            struct.pack_into(FORMATS[row.type], header, row.offset, known.get(row.field, 0))
        header[56:60] = struct.pack("<I", by_docs.crc32c(bytes(header[:56])))
        body = bytes(header) + payload
        # The long form is allowed for short bodies too.
        self.socket.sendall(b"\x02" + struct.pack(">Q", len(body)) + body)

    def say(self, kind: str, **message: Any) -> None:
        self.send(kind, json.dumps(message).encode())

    def hear(self) -> dict[str, Any]:
        """The next message, with `json` where it has some."""
        while True:
            is_command, body = self._frame()
            if not is_command:
                message = by_docs.message(body)
                raw = bytes.fromhex(message["payload"])
                return {**message, "raw": raw, "json": json.loads(raw) if raw.startswith(b"{") else None}

    def _frame(self) -> tuple[bool, bytes]:
        flags = self._take(1)[0]
        size = struct.unpack(">Q", self._take(8))[0] if flags & 2 else self._take(1)[0]
        return bool(flags & 4), self._take(size)

    def _take(self, count: int) -> bytes:
        while len(self._waiting) < count:
            piece = self.socket.recv(65536)
            assert piece, "the replica hung up"
            self._waiting += piece
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Where a new replica listens that waits for its peer."""
    listen = free_port()
    create(tmp_path / "replica", listen, free_port())
    volume = serve(tmp_path / "replica")
    yield listen
    peer_of(volume).end("the test is over")
    stop(volume)


def newest_version() -> int:
    return max(int(row["version"]) for row in by_docs.table("protocol.md", "Versions", "version"))


def standing(version: int) -> dict[str, Any]:
    """A new and empty replica that has just become primary."""
    told = {
        "replica_id": REPLICA,
        "volume_id": "00" * 16,
        "name": "vol",
        "size_bytes": SIZE_BYTES,
        "kind": "fresh",
        "role": "primary",
        "disk": "UpToDate",
        "current": 1,
        "base": 0,
        "history": [],
        "crashed_primary": False,
        "kept_memory": True,
        "dirty_blocks": 0,
        "met_peer": False,
        "discard_my_data": False,
    }
    return told if version < 3 else {**told, "policies": {}}


def shake_hands(port: int, version: int, connections: ExitStack) -> tuple[Connection, list[Connection]]:
    control = Connection(port)
    connections.enter_context(control.socket)
    features = {"protocol": "C", "can_fast_zero": False}
    mine = {"version": version, "version_min": version, "standing": standing(version), "features": features}
    control.say("HELLO", session=SESSION, **mine)
    reply = control.hear()
    assert reply["type"] == "HELLO_REPLY"
    assert reply["json"]["version_min"] <= version <= reply["json"]["version"] == newest_version()
    assert reply["json"]["standing"]["name"] == "vol"
    assert reply["json"]["rule"] == "adopt-fresh"
    control.say("CONTROL", step="prepare", resync_generation=77, map=None)
    assert control.hear()["json"]["step"] == "prepared"
    data = []
    for number in range(1, 37):
        one = Connection(port)
        connections.enter_context(one.socket)
        one.send("HELLO", offset=SESSION, number=number)
        one.session = SESSION
        data.append(one)
    control.say("CONTROL", step="go")
    assert control.hear()["json"]["step"] == "gone"
    control.session = SESSION
    return control, data


def ask(stream: Connection, kind: str, payload: bytes = b"", **values: int) -> dict[str, Any]:
    stream.send(kind, payload, **values)
    answer = stream.hear()
    assert answer["type"] == "ANSWER"
    assert answer["session"] == SESSION
    assert answer["code"] == 0
    return answer


@pytest.mark.parametrize("version", range(wire.SESSION_VERSION_MIN, newest_version() + 1))
def test_it_replicates_to_a_real_replica(port: int, tmp_path: Path, version: int) -> None:
    content = bytes(range(256)) * 32
    with ExitStack() as connections:
        control, data = shake_hands(port, version, connections)
        first, second = data[0], data[17]
        ask(first, "WRITE", content, offset=4096, length=len(content), flags=1)
        ask(first, "ZERO", offset=8192, length=4096, flags=2)
        ask(first, "FLUSH")
        expected = bytes(4096) + content[:4096] + bytes(4096)
        assert ask(first, "READ", offset=0, length=len(expected))["raw"] == expected
        digest = hashlib.sha256(content[:4096]).digest()[:16]
        assert ask(second, "SUMS", offset=0, length=8192, flags=16)["raw"] == bytes(16) + digest
        # 4 096 times "a" as an LZ4 block: its checksum stands in `number`.
        packed = b"\x1fa\x01\x00" + b"\xff" * 15 + bytes((4096 - 1 - 5 - 19 - 15 * 255,)) + b"\x50aaaaa"
        crc = by_docs.crc32c(b"a" * 4096)
        ask(second, "WRITE", packed, offset=12288, length=4096, flags=8 | 16, number=crc)
        control.send("HEARTBEAT", b"".join(struct.pack("<Q", one.sent) for one in data[:18]))
        control.say("CONTROL", op="are_you_there", request=1)
        while (heard := control.hear())["type"] == "HEARTBEAT" or "answer" not in heard["json"]:
            if heard["type"] == "HEARTBEAT":
                assert len(heard["raw"]) == 18 * 8
        assert heard["json"]["answer"] == 1
        control.say("CONTROL", op="bye", request=2, reason="that was all")
    found = (tmp_path / "replica" / "data").read_bytes()
    assert found[: len(expected) + 4096] == expected + b"a" * 4096


@pytest.mark.parametrize("versions", [(1, 1), (60000, 50000)])
def test_another_version_is_refused_by_name(port: int, versions: tuple[int, int]) -> None:
    newest, oldest = versions
    connection = Connection(port)
    with connection.socket:
        connection.say("HELLO", version=newest, version_min=oldest, anything="else")
        reply = connection.hear()
        assert reply["type"] == "HELLO_REPLY"
        assert reply["json"]["rule"] == ("peer-too-old" if newest == 1 else "peer-too-new")
        refused = connection.hear()
        assert refused["type"] == "REFUSED"
        assert "upgrade nbdmirror" in refused["json"]["reason"]

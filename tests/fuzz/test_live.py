"""Running replicas on a real loopback, fed with what was recorded and then changed: they live on, and stay small.

The kernel cuts what is sent into pieces as it likes, so a failure may need more than one try; the inputs are the same
in every run (NBDMIRROR_FUZZ_SEED=n makes others).
"""

import contextlib
import json
import logging
import random
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mirror import handshake, peer
from mirror.core import layout, wire
from mirror.core.limits import MIB
from mirror.core.wire import MessageType
from mirror.link import GREETINGS_MAX, RECEIVE_BUFFER_BYTES
from nbd_server.volume import Volume
from tests.fuzz import corpus, engine
from tests.fuzz.mutation import mutate
from tests.pair import create, free_port, pair, peer_of, serve, session_of, stop, wait_ended, wait_in_step

PATIENCE_S = 10
# 128 greetings with a buffer and a first message each; what threads, sockets and logs take comes on top.
STRANGERS_BYTES = GREETINGS_MAX * (RECEIVE_BUFFER_BYTES + 32 * 1024) + 4 * MIB

few_and_many = pytest.mark.parametrize("count", [40, pytest.param(5000, marks=pytest.mark.long)])


@contextmanager
def nothing_unhandled(bound_bytes: int) -> Iterator[None]:
    """No thread ends with an exception inside, and nobody takes more memory than this beyond what was there."""
    unhandled: list[Any] = []
    former, threading.excepthook = threading.excepthook, unhandled.append
    # pytest keeps what is logged, and that is no cost of theirs.
    logging.disable(logging.CRITICAL)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        threading.excepthook = former
        logging.disable(logging.NOTSET)
    assert not unhandled, unhandled
    assert peak < bound_bytes, f"{peak} bytes"


def say(port: int, raw: bytes) -> None:
    """Say it, hang up as far as sending goes, and wait until the other side does."""
    stranger = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    with stranger, contextlib.suppress(ConnectionError):
        stranger.sendall(raw)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(65536):
            pass


def port_of(volume: Volume) -> int:
    return peer_of(volume).settings.listen[1]


@few_and_many
def test_recorded_connections_that_were_changed_leave_a_session_alone(tmp_path: Path, count: int) -> None:
    rng = random.Random(f"live {engine.SEED}")
    with pair(tmp_path) as (first, second):
        sessions = session_of(first), session_of(second)
        with nothing_unhandled(STRANGERS_BYTES):
            for number in range(count):
                raw = mutate(rng, corpus.connections())
                say(port_of((first, second)[number % 2]), raw)
                first.write(memoryview(bytes([number % 256]) * 4096), number % 64 * 4096, False)
        assert (session_of(first), session_of(second)) == sessions
        assert not sessions[0].ended, sessions[0].reason
        first.flush()
        assert_equal(tmp_path)


@few_and_many
def test_a_replica_that_waits_for_its_peer_survives_whoever_says_to_be_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Handshakes with a right peer's standing in which something is changed: sealed, so they are read to the end."""
    # Those that are right to the end wait for data streams that never come.
    monkeypatch.setattr(peer, "HANDSHAKE_STEP_TIMEOUT_S", 0.05)
    rng = random.Random(f"hello {engine.SEED}")
    ports = free_port(), free_port()
    create(tmp_path / "a", ports[0], ports[1])
    create(tmp_path / "b", ports[1], ports[0])
    other = serve(tmp_path / "b")
    told = {
        **handshake.VERSIONS,
        "standing": handshake.encode_standing(peer_of(other).standing()),
        "features": peer_of(other)._features(),
        "session": 12345,
    }
    stop(other)
    volume = serve(tmp_path / "a")
    try:
        with nothing_unhandled(STRANGERS_BYTES):
            for number in range(count):
                say(ports[0], handshake_of(rng, told))
                assert volume.status(), f"input {number}"
        copies = volume._replica.store.read_superblock_copies()
        assert layout.decode_superblock(copies[0]) == layout.decode_superblock(copies[1])
    finally:
        assert stop(volume)


ANY_VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 2**63, 2**64, 1.5, "", "x", "0" * 32, [], [1], [[1, "1"]], {})


def handshake_of(rng: random.Random, told: dict[str, Any]) -> bytes:
    """Greeting, READY, and a handshake's messages, one value of which is another one, or one byte."""
    hello = json.loads(json.dumps(told))
    prepare: dict[str, Any] = {"step": "prepare", "resync_generation": 77, "map": [[0, "1"]]}
    where = rng.choice((hello, hello["standing"], hello["standing"], hello["features"], prepare))
    where[rng.choice(list(where))] = rng.choice(ANY_VALUES)
    payloads = [json.dumps(one).encode() for one in (hello, prepare, {"step": "go"})]
    if rng.random() < 0.2:
        number = rng.randrange(len(payloads))
        payloads[number] = mutate(rng, [payloads[number]])
    kinds = (MessageType.HELLO, MessageType.CONTROL, MessageType.CONTROL)
    return (
        wire.greeting()
        + wire.ready_command(b"DEALER")
        + b"".join(
            sealed(kind, 0, number, payload)
            for number, (kind, payload) in enumerate(zip(kinds, payloads, strict=True), 1)
        )
    )


def sealed(kind: MessageType, session: int, sequence: int, payload: bytes, offset: int = 0, length: int = 0) -> bytes:
    crc = wire.crc32c(payload)
    return wire.encode_message(kind, 0, session, sequence, offset, length, len(payload), crc, 0, 0) + payload


@pytest.mark.parametrize("rounds", [8, pytest.param(400, marks=pytest.mark.long)])
def test_changed_messages_inside_a_session_end_it_and_damage_nothing(tmp_path: Path, rounds: int) -> None:
    rng = random.Random(f"session {engine.SEED}")
    content = rng.randbytes(8192)
    with pair(tmp_path) as (first, second):
        with nothing_unhandled(32 * MIB):
            for number in range(rounds):
                first.write(memoryview(content), 0, False)
                sessions = session_of(first), session_of(second)
                stream = rng.choice((sessions[0].control, *sessions[0].outgoing, *sessions[0].sync_outgoing))
                stream._socket.sendall(damaged(rng, stream.session, stream.sent + 1, content))
                # Of some damage nothing comes, such as a longer frame that is waited for: then it is ended from here.
                first.disconnect()
                for volume, session in zip((first, second), sessions, strict=True):
                    assert wait_ended(volume, session), f"round {number}"
                first.connect(False)
                wait_in_step(first)
                wait_in_step(second)
        first.flush()
        assert_equal(tmp_path)
        assert (tmp_path / "b" / "data").read_bytes()[:8192] == content


def damaged(rng: random.Random, session: int, sequence: int, content: bytes) -> bytes:
    """Some messages that would do no harm, and then changes in them."""
    choices = [
        sealed(MessageType.WRITE, session, sequence, content[:4096], 0, 4096),
        sealed(MessageType.WRITE, session, sequence, content, 0, 8192),
        sealed(MessageType.CONTROL, session, sequence, b'{"op": "are_you_there", "request": 9}'),
        sealed(MessageType.HEARTBEAT, session, sequence, bytes(8 * 18)),
        sealed(MessageType.FLUSH, session, sequence, b""),
        sealed(MessageType.READ, session, sequence, b"", 0, 4096),
        sealed(MessageType.SUMS, session, sequence, b"", 0, 8192),
        sealed(MessageType.ANSWER, session, sequence, b""),
    ]
    raw = rng.choice(choices)
    changed = mutate(rng, [raw])
    return changed if changed != raw else raw[:-1]


def assert_equal(directory: Path) -> None:
    assert (directory / "a" / "data").read_bytes() == (directory / "b" / "data").read_bytes()

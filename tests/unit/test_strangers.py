"""Whoever comes to the mirror's port and is not the peer: it learns why, an operator finds it, and that is all."""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mirror import handshake
from mirror.core import wire
from mirror.core.errors import LinkLost, ProtocolError
from mirror.core.generation import Kind
from mirror.core.states import ConnectionState, Role
from mirror.core.wire import SESSION_VERSION, SESSION_VERSION_MIN, MessageType
from mirror.link import dial
from mirror.runtime import Runtime
from mirror.strangers import AGAIN_AFTER_S, SAID_MAX, SAID_OF_HOST_MAX, Strangers
from nbd_server.volume import Volume
from tests.pair import PATIENCE_S, create, free_port, pair, peer_of, serve, session_of, stop, wait_in_step

# What a HELLO says, from what a sound one of the peer would say; and a word of the reason that a stranger is told.
STRANGERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "of another volume": (lambda hello: hello["standing"].update(volume_id="ab" * 16), "different volumes"),
    "of another volume, with a failed disk": (
        lambda hello: hello["standing"].update(volume_id="ab" * 16, disk="Failed"),
        "different volumes",
    ),
    "created anew, of another size": (
        lambda hello: hello["standing"].update(
            volume_id="00" * 16, kind="fresh", met_peer=False, size_bytes=1 << 20, current=0, base=0, history=[]
        ),
        "created as a new volume",
    ),
    "of another name": (lambda hello: hello["standing"].update(name="other"), "name-differs"),
    "a copy of this replica": (lambda hello: hello["standing"].update(copy=True), "same-replica"),
    "without a version": (lambda hello: (hello.pop("version"), hello.pop("version_min")), "peer-too-old"),
    "of a later version": (
        lambda hello: hello.update(version=SESSION_VERSION + 1, version_min=SESSION_VERSION + 1),
        "peer-too-new",
    ),
    "of impossible versions": (lambda hello: hello.update(version=0), "versions"),
    "with a line feed": (lambda hello: hello["standing"].update(replica_id="1\nERROR"), "1\\nERROR"),
    "with a blank identifier": (lambda hello: hello["standing"].update(replica_id=" " * 32), "identifier"),
    "without a standing": (lambda hello: hello.pop("standing"), "without a standing"),
}
GREETING = wire.greeting() + wire.ready_command(b"DEALER")
FRAME = wire.outgoing_prefix(wire.HEADER_BYTES)


def address_of(volume: Volume) -> tuple[str, int]:
    return peer_of(volume).settings.listen


def say_hello(volume: Volume, change: Callable[[dict[str, Any]], object]) -> tuple[str, str]:
    """Dial a replica that knows its volume as a changed stand-in of its peer; from which address, and why refused."""
    mine = handshake.encode_standing(peer_of(volume).standing())
    hello: dict[str, Any] = {
        "version": SESSION_VERSION,
        "version_min": SESSION_VERSION_MIN,
        "standing": {**mine, "replica_id": "cd" * 16, "role": Role.PRIMARY.value},
        "features": {"protocol": "C", "asked_by_operator": True},
        "session": 77,
    }
    change(hello)
    if hello.get("standing", {}).pop("copy", False):
        hello["standing"]["replica_id"] = mine["replica_id"]
    stream = dial(address_of(volume), PATIENCE_S)
    try:
        host, port = stream._socket.getsockname()
        stream.set_timeout(PATIENCE_S)
        stream.send(MessageType.HELLO, payload=json.dumps(hello).encode())
        while True:
            header, payload = stream.receive()
            if header.type is MessageType.REFUSED:
                return f"{host}:{port}", json.loads(bytes(payload))["reason"]
    finally:
        stream.close()


def wait_logged(caplog: pytest.LogCaptureFixture, text: str) -> logging.LogRecord:
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        for record in list(caplog.records):
            if text in record.getMessage():
                return record
        assert time.monotonic() < deadline_s, (text, caplog.messages)
        os.sched_yield()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[tuple[Volume, Path]]:
    """A replica of a volume of its own, whose peer has not come yet; and where that one is."""
    ports = free_port(), free_port()
    create(tmp_path / "a", ports[0], ports[1])
    create(tmp_path / "b", ports[1], ports[0])
    first = serve(tmp_path / "a")
    try:
        first._replica.update(volume_id=b"\x11" * 16, kind=Kind.ESTABLISHED, met_peer=True, current=5)
        yield first, tmp_path / "b"
    finally:
        stop(first)


@pytest.fixture
def living(tmp_path: Path) -> Iterator[tuple[Volume, Volume]]:
    with pair(tmp_path) as both:
        yield both


@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_changes_nothing_towards_the_peer(
    alone: tuple[Volume, Path], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = alone
    change, why = STRANGERS[what]
    peer = peer_of(first)
    peer.retry.failed("a plan that failed, for the test")
    with caplog.at_level(logging.INFO):
        address, told = say_hello(first, change)
        assert why in told
        record = wait_logged(caplog, why)
    assert address in record.getMessage()
    assert record.levelno == logging.WARNING
    assert peer._may_dial()
    assert peer.state is ConnectionState.CONNECTING
    assert why not in peer.reason
    assert peer.seen is None, "it passes for no word of the peer's at a start as primary"
    assert peer.outcome is None
    assert not peer.decided
    assert peer.retry.backoff.failures == 1


@pytest.mark.parametrize("what", ["of another name", "without a version"])
def test_the_peer_is_still_dialled_after_a_stranger(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = free_port(), free_port()
    create(tmp_path / "a", ports[0], ports[1])
    create(tmp_path / "b", ports[1], ports[0])
    first = serve(tmp_path / "a")
    try:
        say_hello(first, STRANGERS[what][0])
        really = type(peer_of(first))._may_dial
        monkeypatch.setattr(type(peer_of(first)), "_may_dial", lambda peer: peer is peer_of(first) and really(peer))
        second = serve(tmp_path / "b")
        try:
            wait_in_step(first)
        finally:
            stop(second)
    finally:
        stop(first)


def test_the_volumes_other_half_is_still_refused_for_good(
    alone: tuple[Volume, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """It may be the peer, so this side stays apart until somebody mends it."""
    first, _ = alone
    with caplog.at_level(logging.INFO):
        address, told = say_hello(first, lambda hello: hello["standing"].update(size_bytes=4096))
        assert "size-differs" in told
        assert address in wait_logged(caplog, "size-differs").getMessage()
    peer = peer_of(first)
    with peer.changed:
        assert peer.changed.wait_for(lambda: peer.state is ConnectionState.STANDALONE, PATIENCE_S)
    assert not peer._may_dial()
    assert peer.seen is not None


@pytest.mark.parametrize("what", STRANGERS)
def test_in_a_session_a_stranger_is_told_who_it_is(living: tuple[Volume, Volume], what: str) -> None:
    change, why = STRANGERS[what]
    for volume in living:
        session = session_of(volume)
        assert why in say_hello(volume, change)[1]
        assert session_of(volume) is session
        assert not session.ended


def test_in_a_session_a_third_replica_of_the_volume_is_told_that_there_is_one(living: tuple[Volume, Volume]) -> None:
    session = session_of(living[0])
    assert "another replica" in say_hello(living[0], lambda hello: None)[1]
    assert not session.ended


def test_a_stranger_is_told_who_it_is_also_where_the_operator_disconnected(alone: tuple[Volume, Path]) -> None:
    first, _ = alone
    first.disconnect()
    for change, why in STRANGERS.values():
        assert why in say_hello(first, change)[1]
    assert peer_of(first).seen is None
    assert "disconnected" in say_hello(first, lambda hello: None)[1]


# What is said before this side gives up on it, whether the stranger hangs up then, and what the log says of it.
BROKEN_OFF: dict[str, tuple[bytes, bool, str]] = {
    "nothing": (b"", False, "silent for 0.2 s before its greeting"),
    "half a greeting": (GREETING[:20], False, "silent for 0.2 s within its greeting"),
    "half a greeting, then the end": (GREETING[:20], True, "it hung up within its greeting"),
    "no READY": (GREETING[:64], False, "silent for 0.2 s before its READY command"),
    "half a READY": (GREETING[:70], False, "silent for 0.2 s within its READY command"),
    "nothing after READY": (GREETING, False, "silent for 0.2 s before its first message"),
    "a torn frame": (GREETING + FRAME + b"nb", False, "silent for 0.2 s within its first message"),
    "a torn frame, then the end": (GREETING + FRAME + b"nb", True, "it hung up within its first message"),
}


@pytest.mark.parametrize("what", BROKEN_OFF)
def test_who_breaks_off_is_named(
    alone: tuple[Volume, Path], what: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.link.GREETING_TIMEOUT_S", 0.2)
    said, hangs_up, why = BROKEN_OFF[what]
    with caplog.at_level(logging.INFO):
        for attempt in range(3):
            with socket.create_connection(address_of(alone[0]), timeout=PATIENCE_S) as stranger:
                port = stranger.getsockname()[1]
                stranger.sendall(said)
                if hangs_up:
                    stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):
                    pass
            record = wait_logged(caplog, why)
            if not attempt:
                assert f"127.0.0.1:{port}: {why}" in record.getMessage()
    assert record.levelno == logging.INFO
    assert sum(why in message for message in caplog.messages) == 1


def test_who_leaves_between_two_steps_is_not_named(
    alone: tuple[Volume, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """So does a peer that was reached while it dialled, and whoever looks whether the port is open."""
    with caplog.at_level(logging.INFO):
        with socket.create_connection(address_of(alone[0]), timeout=PATIENCE_S):
            pass
        dial(address_of(alone[0]), PATIENCE_S).close()
        say_hello(alone[0], STRANGERS["of another name"][0])
        wait_logged(caplog, "name-differs")
    assert sum("turned away" in message for message in caplog.messages) == 1


class Clock(Runtime):
    time_s = 1000.0

    def now_s(self) -> float:
        return self.time_s


def test_the_same_of_one_host_is_said_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    strangers = Strangers(clock)

    def come(address: str, why: str) -> int:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            strangers.turned_away(address, ProtocolError(why))
        return len(caplog.records)

    assert come("10.0.0.1:1000", "a message of 9 bytes from 10.0.0.1:1000") == 1
    assert come("10.0.0.1:1001", "a message of 9 bytes from 10.0.0.1:1001") == 0
    assert come("10.0.0.2:1001", "a message of 9 bytes from 10.0.0.2:1001") == 1
    assert come("10.0.0.1:1002", "no READY command") == 1
    assert come("fe80::1:1003", "no READY command") == 1
    clock.time_s += AGAIN_AFTER_S
    assert come("10.0.0.1:1004", "no READY command") == 1


def test_many_strangers_fill_neither_log_nor_memory(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    strangers = Strangers(clock)
    with caplog.at_level(logging.INFO):
        for number in range(1000):
            strangers.turned_away(f"10.0.{number // 250}.{number % 250}:99", LinkLost("it hung up"))
        assert len(caplog.records) == SAID_MAX + 1
        assert "more than are named" in caplog.messages[-1]
        assert len(strangers._said_at_s) == SAID_MAX + 1
        clock.time_s += AGAIN_AFTER_S
        # One that says something else each time takes no places from others.
        for number in range(1000):
            strangers.turned_away("10.0.7.7:99", ProtocolError(f"a message of type {number}"))
        assert sum("10.0.7.7" in message for message in caplog.messages[SAID_MAX + 1 :]) == SAID_OF_HOST_MAX + 1
        strangers.turned_away("10.0.9.9:99", LinkLost("it hung up"))
        assert "10.0.9.9:99" in caplog.messages[-1]

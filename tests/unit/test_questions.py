"""What replicas tell each other without a session: whole maps in parts, and nothing that a hostile word can break."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mirror import handshake, questions
from mirror.core import map_message
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import MirrorError, ProtocolError
from mirror.core.limits import BLOCK_BYTES, EXTENT_BYTES
from mirror.core.wire import Header, MessageType
from mirror.handshake import Wait
from mirror.link import Listener, Stream, dial
from mirror.questions import Said
from mirror.runtime import Runtime
from nbd_server.volume import Volume
from tests.pair import free_port, pair, peer_of

TIMEOUT_S = 10.0


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Volume, Volume]]:
    with pair(tmp_path) as volumes:
        yield volumes


def said(volume: Volume) -> Said:
    return peer_of(volume).said(False)


def question(volume: Volume, **changes: Any) -> bytes:
    mine = said(volume)
    return json.dumps(
        {
            **handshake.VERSIONS,
            "standing": handshake.encode_standing(mine.standing),
            "features": mine.features,
            "connected": False,
            "wanted": True,
            "map_from": None,
            **changes,
        }
    ).encode()


def test_a_question_ends_no_session_and_tells_the_map(two: tuple[Volume, Volume]) -> None:
    first, second = two
    session = peer_of(first).session
    first.write(memoryview(bytes(BLOCK_BYTES)), EXTENT_BYTES, False)
    _, answer = peer_of(second).questions.ask(False, with_map=True)
    assert answer.said.standing == said(first).standing
    assert answer.said.connected
    assert answer.said.wanted
    assert answer.dirty is not None
    assert answer.dirty.is_dirty(EXTENT_BYTES, BLOCK_BYTES), "not stable on both yet"
    assert peer_of(second).questions.ask(False, with_map=False)[1].dirty is None
    assert peer_of(first).session is session
    assert session is not None
    assert not session.ended


def test_a_large_map_comes_in_parts(two: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two
    peer_of(second).disconnect()
    replica = first._replica
    with replica.books:
        replica.dirty.mark_all()
    monkeypatch.setattr(map_message, "MAP_EXTENTS_SENT_MAX", 1)
    assert first.size_bytes > EXTENT_BYTES, "more than one part"
    dirty = peer_of(second).questions.ask(False, with_map=True)[1].dirty
    assert dirty is not None
    assert dirty.dirty_bytes == first.size_bytes


HOSTILE: dict[str, Callable[[Volume], bytes]] = {
    "nothing": lambda volume: b"",
    "no JSON": lambda volume: b"{",
    "no standing": lambda volume: question(volume, standing=None),
    "no features": lambda volume: question(volume, features=[]),
    "versions of another time": lambda volume: question(volume, version=99, version_min=98),
    "a map from nowhere": lambda volume: question(volume, map_from="0"),
    "a map from a flag": lambda volume: question(volume, map_from=True),
    "a policy that is none": lambda volume: question(
        volume,
        standing={**handshake.encode_standing(said(volume).standing), "policies": {"no_primary": "discard-secondary"}},
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_question_is_refused(two: tuple[Volume, Volume], what: str) -> None:
    first, second = two
    stream = dial(peer_of(second).settings.peer, TIMEOUT_S)
    try:
        stream.set_timeout(TIMEOUT_S)
        stream.send(MessageType.QUESTION, payload=HOSTILE[what](second))
        header, _ = stream.receive()
        assert header.type is MessageType.REFUSED
    finally:
        stream.close()
    # The next one is answered, and the session goes on.
    assert peer_of(second).questions.ask(False, with_map=True)[1].said.connected
    assert peer_of(first).session is not None


def told(volume: Volume, **changes: Any) -> bytes:
    return question(volume, **{"map": [[0, "f"]], "map_next": None, **changes})


ANSWERS: dict[str, Callable[[Volume], tuple[MessageType, bytes]]] = {
    "another type": lambda volume: (MessageType.CONTROL, told(volume)),
    "no JSON": lambda volume: (MessageType.TOLD, b"["),
    "no map": lambda volume: (MessageType.TOLD, told(volume, map=None)),
    "a map of another shape": lambda volume: (MessageType.TOLD, told(volume, map=[[0, "f", 1]])),
    "blocks behind the volume": lambda volume: (MessageType.TOLD, told(volume, map=[[1 << 40, "f"]])),
    "a part that does not go on": lambda volume: (MessageType.TOLD, told(volume, map_next=0)),
    "a part behind the volume": lambda volume: (MessageType.TOLD, told(volume, map_next=1 << 40)),
    "for ever the same part": lambda volume: (MessageType.TOLD, told(volume, map_next=1)),
}


def asked(volume: Volume, kind: MessageType, payload: bytes) -> None:
    """Ask somebody who answers everything with this."""

    def answer(stream: Stream, _header: Header, _payload: bytes) -> None:
        try:
            while True:
                stream.send(kind, payload=payload)
                stream.receive()
        except MirrorError:
            stream.close()

    port = free_port()
    listener = Listener(Runtime(), ("127.0.0.1", port), answer, lambda *_: None)
    stream = dial(("127.0.0.1", port), TIMEOUT_S)
    try:
        stream.set_timeout(TIMEOUT_S)
        questions.ask(stream, said(volume), with_map=True)
    finally:
        stream.close()
        listener.close()


@pytest.mark.parametrize("what", ANSWERS)
def test_a_hostile_answer_is_no_map(two: tuple[Volume, Volume], what: str) -> None:
    kind, payload = ANSWERS[what](two[0])
    with pytest.raises(ProtocolError):
        asked(two[0], kind, payload)


def test_a_refused_question_tells_why(two: tuple[Volume, Volume]) -> None:
    with pytest.raises(Wait, match="busy"):
        asked(two[0], MessageType.REFUSED, b'{"reason": "busy"}')


def test_a_map_of_another_size_is_not_read(two: tuple[Volume, Volume]) -> None:
    first, _ = two
    standing = {**handshake.encode_standing(said(first).standing), "size_bytes": 1 << 62}
    port_answer = told(first, standing=standing, map=[[1 << 39, "f"]])
    asked(first, MessageType.TOLD, port_answer)
    assert DirtyMap(first.size_bytes).dirty_bytes == 0

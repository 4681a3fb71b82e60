"""What a replica may ask the other without a session, though they refuse each other: who are you, what did you change?

The question changes nothing on either side: no state, nothing durable, no running session. So the plan can be shown
before the act (`connect --dry-run`), and a split brain be listed before anybody discards anything (`diff`).

    QUESTION {versions, "standing", "features", "map_from": extent or null}
    TOLD     {versions, "standing", "features", "connected", "wanted",
              "map": [[extent, bits]...], "map_next": extent or null}

A large map comes in parts, one a question, all on one stream; the parts are of one moment.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mirror import handshake
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import LinkLost, MirrorError, ProtocolError
from mirror.core.generation import Standing
from mirror.core.map_message import add_map, encode_part
from mirror.core.wire import MessageType, decode_object, words
from mirror.handshake import Conversation
from mirror.link import Stream, dial
from mirror.replica import Replica

# What an error names.
MESSAGE = "a question or its answer"
# A host that is there answers a connection within a round trip, one retransmission (1 s) included.
DIAL_TIMEOUT_S = 2.0
# No step waits for a disk, but for a lock over the maps, and 4 MiB of map on a slow link.
STEP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Said:
    """What a side says of itself when it is asked."""

    standing: Standing
    features: dict[str, Any]
    # It has a session, with whomever.
    connected: bool
    # It takes part in handshakes: its operator did not disconnect it.
    wanted: bool


@dataclass(frozen=True)
class Answer:
    """What the peer said; `dirty` is None where its map was not asked for, or is of another size."""

    said: Said
    dirty: DirtyMap | None


class Questions:
    """Asks the peer at `address`, and answers it; `say` tells what this side says of itself, with that word."""

    def __init__(self, replica: Replica, address: tuple[str, int], say: Callable[[bool | None], Said]) -> None:
        self._replica = replica
        self._address = address
        self._say = say
        # One at a time: a map may be large, and nobody waits long for another's.
        self._answering = replica.runtime.lock()

    def ask(self, discard_my_data: bool, with_map: bool) -> tuple[Said, Answer]:
        """What this side said of itself, as if it had this word, and what the peer answered. Raises PeerError."""
        stream = dial(self._address, DIAL_TIMEOUT_S)
        try:
            stream.set_timeout(STEP_TIMEOUT_S)
            mine = self._say(discard_my_data)
            return mine, ask(stream, mine, with_map)
        finally:
            stream.close()

    def serve(self, stream: Stream, payload: bytes) -> None:
        """Answer on a stream that began with a question."""
        talk = Conversation(stream)
        if not self._answering.acquire(timeout=STEP_TIMEOUT_S):
            talk.refuse("this replica is busy with other questions")
            return
        try:
            stream.set_timeout(STEP_TIMEOUT_S)
            answer(stream, payload, self._replica, lambda: self._say(None))
        except LinkLost:
            stream.close()  # it knows what it wanted to know
        except MirrorError as error:
            talk.refuse(str(error))
        finally:
            self._answering.release()


def ask(stream: Stream, mine: Said, with_map: bool) -> Answer:
    """Ask the peer on a new stream. Raises LinkLost, Wait or ProtocolError."""
    question: dict[str, Any] = _encode(mine)
    told = _ask_once(stream, {**question, "map_from": 0 if with_map else None})
    said = _decode(told)
    if not with_map or said.standing.size_bytes != mine.standing.size_bytes:
        return Answer(said, None)
    dirty = DirtyMap(mine.standing.size_bytes)
    _add_part(dirty, told)
    position = 0
    while (following := told.get("map_next")) is not None:
        # Each part lies behind the former one, so that this ends whatever the peer says.
        if not isinstance(following, int) or not position < following < dirty.extent_count:
            raise ProtocolError(f"a part of a dirty map that begins at {words(following)}")
        position = following
        told = _ask_once(stream, {**question, "map_from": position})
        _add_part(dirty, told)
    return Answer(said, dirty)


def _add_part(dirty: DirtyMap, told: dict[str, Any]) -> None:
    add_map(dirty, told.get("map"), "a dirty map", "the peer did not say what it changed")


def _ask_once(stream: Stream, question: dict[str, Any]) -> dict[str, Any]:
    stream.send(MessageType.QUESTION, payload=json.dumps(question).encode())
    header, payload = stream.receive()
    told = decode_object(payload, MESSAGE)
    if header.type is MessageType.REFUSED:
        raise handshake.Wait(words(told.get("reason")))
    if header.type is not MessageType.TOLD:
        raise ProtocolError(f"a {header.type.name} message in answer to a question")
    return told


def answer(stream: Stream, payload: bytes | memoryview, replica: Replica, say: Callable[[], Said]) -> None:
    """Answer questions on this stream until the peer hangs up; `payload` is the first one. Raises PeerErrors."""
    dirty: DirtyMap | None = None
    while True:
        question = decode_object(payload, MESSAGE)
        _decode(question)
        told = _encode(say())
        start = question.get("map_from")
        if start is not None:
            if dirty is None:
                dirty = replica.own_map()
            told["map"], told["map_next"] = _part(dirty, start)
        stream.send(MessageType.TOLD, payload=json.dumps(told).encode())
        header, payload = stream.receive()
        if header.type is not MessageType.QUESTION:
            raise ProtocolError(f"a {header.type.name} message where a question was due")


def _part(dirty: DirtyMap, start: object) -> tuple[list[list[object]], int | None]:
    if not isinstance(start, int) or isinstance(start, bool):
        raise ProtocolError(f"{words(start)} where an extent's number was due")
    return encode_part(dirty, start)


def _encode(said: Said) -> dict[str, Any]:
    return {
        **handshake.VERSIONS,
        "standing": handshake.encode_standing(said.standing),
        "features": said.features,
        "connected": said.connected,
        "wanted": said.wanted,
    }


def _decode(message: dict[str, Any]) -> Said:
    handshake.check_versions(message)
    return Said(
        handshake.decode_standing(message.get("standing")),
        handshake.features_in(message),
        message.get("connected") is True,
        message.get("wanted") is True,
    )

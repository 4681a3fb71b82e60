"""The side that is compared: keeps what the driving side (mirror.verify) finds, and tells what it knows itself."""

from collections.abc import Callable
from typing import Any

from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import ProtocolError
from mirror.core.layout import is_note
from mirror.core.limits import MAP_EXTENTS_SENT_MAX
from mirror.core.map_message import encode_map, encode_part
from mirror.core.wire import words
from mirror.replica import Replica
from mirror.session import Session
from mirror.suspects import decode_extents
from mirror.unproven import decode_runs, encode_runs

Message = dict[str, Any]
# The peer makes some pages of a map durable, on a busy disk.
REQUEST_TIMEOUT_S = 20.0


class Driven:
    """Answers for one replica. `proof` is what a connected primary says of its proof."""

    def __init__(self, replica: Replica) -> None:
        self.proof: Message | None = None
        self._replica = replica

    def answer(self, message: Message) -> Message | None:
        """Raises ProtocolError, DeviceError."""
        return _ANSWERS[str(message.get("op"))](self, message)

    def _suspects_get(self, message: Message) -> Message:
        from_extent = message.get("from_extent")
        if type(from_extent) is not int:
            raise ProtocolError(f"{words(from_extent)} where an extent was due")
        with self._replica.books:
            extents, further = encode_part(self._replica.suspects.found, from_extent)
        return {"extents": extents, "next": further}

    def _suspects_add(self, message: Message) -> None:
        runs = decode_extents(message.get("extents"), self._replica.size_bytes)
        with self._replica.books:
            self._replica.suspects.add(runs)
        self._replica.suspects.persist()

    def _suspects_clear(self, message: Message) -> None:
        runs = decode_extents(message.get("extents"), self._replica.size_bytes)
        with self._replica.books:
            self._replica.suspects.clear(runs)
        self._replica.suspects.persist()

    def _unproven_get(self, _: Message) -> Message:
        with self._replica.books:
            return {"runs": encode_runs(self._replica.unproven.extents())}

    def _proven(self, message: Message) -> None:
        extents = decode_runs(message.get("runs"), self._replica.unproven.extent_count)
        with self._replica.books:
            self._replica.unproven.proven_by_peer(extents)
        self._replica.unproven.persist()

    def _verify_note(self, message: Message) -> None:
        note = message.get("note")
        if not is_note(note):
            raise ProtocolError("a note on a verify that can't be kept")
        self._replica.update(last_verify=note)

    def _proof_state(self, message: Message) -> None:
        proof: Message = {"state": words(message.get("state"))}
        for key in ("left_bytes", "rest_left_bytes"):
            value = message.get(key)
            proof[key] = value if type(value) is int else None
        reason = message.get("reason")
        proof["reason"] = None if reason is None else words(reason)
        self.proof = proof


_ANSWERS: dict[str, Callable[[Driven, Message], Message | None]] = {
    "suspects_get": Driven._suspects_get,
    "suspects_add": Driven._suspects_add,
    "suspects_clear": Driven._suspects_clear,
    "unproven_get": Driven._unproven_get,
    "proven": Driven._proven,
    "verify_note": Driven._verify_note,
    "proof_state": Driven._proof_state,
}
OPERATIONS = tuple(_ANSWERS)


def say_extents(session: Session, operation: str, blocks: DirtyMap) -> None:
    """Name blocks to the driven side, a bounded part at a time. Raises MirrorError."""
    extents = blocks.extents()
    for at in range(0, len(extents), MAP_EXTENTS_SENT_MAX):
        some = encode_map(blocks, extents[at : at + MAP_EXTENTS_SENT_MAX])
        session.request(operation, REQUEST_TIMEOUT_S, extents=some)

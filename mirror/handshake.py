"""What two replicas say to each other before a session, and what each makes durable for it.

Both sides exchange their Standing and decide by the same pure table; the dialler checks that both decided alike. Then
each side makes its part of the plan durable: a target is Inconsistent before anything lands on it (invariant
inconsistent-first), a source has every block in its dirty map that may differ. Everything here can be done again
after an interruption at any point.

What is said is JSON in CONTROL messages, a step each: HELLO, HELLO_REPLY, prepare, prepared, go, gone.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from mirror.core import generation
from mirror.core.errors import OperatorError, PeerError, ProtocolError
from mirror.core.generation import Action, Kind, Outcome, Standing
from mirror.core.limits import MAP_EXTENTS_SENT_MAX
from mirror.core.states import DiskState, Role
from mirror.core.wire import MessageType, decode_object
from mirror.link import Stream
from mirror.replica import Replica

SOURCE = (Action.SOURCE_BITMAP, Action.SOURCE_FULL)
TARGET = (Action.TARGET_BITMAP, Action.TARGET_FULL)
# In place of a rule: the side that answers stays apart by its operator's word.
DISCONNECTED = "disconnected"
# How an error names what was said.
MESSAGE = "a handshake message"


class Wait(PeerError):
    """No session now, but trying again soon makes sense."""


class Refusal(OperatorError):
    """No session until somebody does something about it."""

    def __init__(self, outcome: Outcome) -> None:
        kind = "split brain" if outcome.action is Action.SPLIT_BRAIN else "no connection"
        super().__init__(f"{kind} ({outcome.rule}): {outcome.reason}", remedy=outcome.remedy)
        self.outcome = outcome


@dataclass
class Plan:
    """An agreed outcome. `resync_generation` names the state of a target whose copy is built from nothing."""

    outcome: Outcome
    mine: Standing
    theirs: Standing
    resync_generation: int
    expected_current: int = 0


class Conversation:
    """The steps of a handshake on a control stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def hello(self, mine: Standing, features: dict[str, Any], number: int) -> None:
        message = {"standing": encode_standing(mine), "features": features, "session": number}
        self.stream.send(MessageType.HELLO, payload=json.dumps(message).encode())

    def hello_back(self, mine: Standing, features: dict[str, Any], rule: str) -> None:
        message = {"standing": encode_standing(mine), "features": features, "rule": rule}
        self.stream.send(MessageType.HELLO_REPLY, payload=json.dumps(message).encode())

    def hear_hello(self) -> tuple[Standing, dict[str, Any], str]:
        header, payload = self.stream.receive()
        message = decode_object(payload, MESSAGE)
        if header.type is MessageType.REFUSED:
            raise Wait(str(message.get("reason")))
        if header.type is not MessageType.HELLO_REPLY:
            raise ProtocolError(f"a {header.type.name} message in answer to HELLO")
        return decode_standing(message.get("standing")), _features(message), str(message.get("rule"))

    def say(self, step: str, **arguments: Any) -> None:
        self.stream.send(MessageType.CONTROL, payload=json.dumps({"step": step, **arguments}).encode())

    def hear(self, step: str) -> dict[str, Any]:
        header, payload = self.stream.receive()
        message = decode_object(payload, MESSAGE)
        if header.type is MessageType.REFUSED:
            raise Wait(str(message.get("reason")))
        if header.type is not MessageType.CONTROL or message.get("step") != step:
            raise ProtocolError(f"a {header.type.name} message where the handshake's step {step!r} was due")
        return message

    def refuse(self, reason: str) -> None:
        """Say why there is no session now, and hang up."""
        try:
            self.stream.send(MessageType.REFUSED, payload=json.dumps({"reason": reason}).encode())
        except PeerError:
            pass  # it has hung up already, so it knows
        self.stream.close()


def parse_hello(payload: bytes) -> tuple[Standing, dict[str, Any], int]:
    """The first message of a dialler: its standing, its features, the session's number."""
    message = decode_object(payload, MESSAGE)
    return decode_standing(message.get("standing")), _features(message), _number(message.get("session"))


def generation_in(message: dict[str, Any]) -> int:
    return _number(message.get("resync_generation"))


def _features(message: dict[str, Any]) -> dict[str, Any]:
    features = message.get("features")
    if not isinstance(features, dict):
        raise ProtocolError("a handshake without features")
    return features


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ProtocolError(f"{value!r} where a number of 64 bits was due")
    return value


def encode_standing(standing: Standing) -> dict[str, Any]:
    fields = dataclasses.asdict(standing)
    for name in ("replica_id", "volume_id"):
        fields[name] = fields[name].hex()
    for name in ("kind", "role", "disk"):
        fields[name] = fields[name].value
    fields["history"] = list(fields["history"])
    return fields


def decode_standing(fields: object) -> Standing:
    """Raises ProtocolError on anything that `encode_standing` does not write."""
    if not isinstance(fields, dict):
        raise ProtocolError("a handshake without a standing")
    try:
        values = dict(fields)
        for name in ("replica_id", "volume_id"):
            values[name] = bytes.fromhex(values[name])
            if len(values[name]) != 16:
                raise ValueError(f"{name} of {len(values[name])} bytes")
        values["kind"] = Kind(values["kind"])
        values["role"] = Role(values["role"])
        values["disk"] = DiskState(values["disk"])
        values["history"] = tuple(_number(value) for value in values["history"])
        for name in ("size_bytes", "current", "base", "dirty_blocks"):
            _number(values[name])
        return Standing(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"a standing that can't be read: {error}") from error


# Deciding


def standing(replica: Replica, discard_my_data: bool) -> Standing:
    known = replica.superblock
    with replica.books:
        dirty_blocks = replica.not_in_step().dirty_blocks
    return Standing(
        replica_id=known.replica_id,
        volume_id=known.volume_id,
        name=known.name,
        size_bytes=known.size_bytes,
        kind=known.kind,
        role=replica.role,
        disk=replica.disk_state(connected=False),
        current=known.current,
        base=known.base,
        history=known.history,
        crashed_primary=replica.crashed_primary,
        kept_memory=replica.kept_memory,
        dirty_blocks=dirty_blocks,
        met_peer=known.met_peer,
        discard_my_data=discard_my_data,
    )


def check_same(outcome: Outcome, rule: str) -> None:
    if outcome.rule != rule:
        raise Refusal(
            Outcome(
                "decided-differently",
                Action.REFUSE,
                f"this replica decided {outcome.rule}, the peer {rule}",
                "run the same release on both nodes; if you do, please report this",
            )
        )


def check_protocols(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    if mine["protocol"] != theirs.get("protocol"):
        raise Refusal(
            Outcome(
                "protocol-differs",
                Action.REFUSE,
                f"this replica is set to protocol {mine['protocol']}, the peer to {theirs.get('protocol')}",
                "set the same `protocol` in both volume.toml and restart",
            )
        )


# Making it durable


def own_map(replica: Replica, plan: Plan) -> list[Any] | str | None:
    """What the target tells the source of its own differences: [extent, bits in hex], or "all"."""
    if plan.outcome.action is not Action.TARGET_BITMAP:
        return None
    with replica.books:
        union = replica.not_in_step()
    extents = union.extents()
    if len(extents) > MAP_EXTENTS_SENT_MAX:
        return "all"
    return [[extent, f"{union.bits(extent):x}"] for extent in extents]


def prepare(replica: Replica, plan: Plan, their_map: object) -> None:
    """Make this side's part of the plan durable (duties g2 and g3). Raises DeviceError, ProtocolError."""
    known = replica.superblock
    changes: dict[str, Any] = {"kind": Kind.ESTABLISHED, "volume_id": _volume_id(plan)}
    action = plan.outcome.action
    if action in TARGET:
        replica.persist_map()
        changes["disk"] = DiskState.INCONSISTENT
        if action is Action.TARGET_FULL:
            changes.update(generation.full_target(plan.resync_generation)._asdict())
    elif action in SOURCE:
        if action is Action.SOURCE_FULL:
            with replica.books:
                replica.dirty.mark_all()
            moved = generation.full_source(known, plan.resync_generation, replica.runtime.random_number())
            changes.update(moved._asdict())
        else:
            _merge(replica, their_map)
        replica.persist_map()
        changes["peer_disk"] = DiskState.INCONSISTENT
    replica.update(**changes)
    plan.expected_current = replica.superblock.current


def check_unchanged(replica: Replica, plan: Plan) -> None:
    """What the plan rests on still holds; call while no request runs. Raises Wait."""
    if replica.superblock.current != plan.expected_current or replica.role is not plan.mine.role:
        raise Wait("this replica moved on during the handshake")


def _volume_id(plan: Plan) -> bytes:
    """The source's volume, else whichever is known; two new replicas name theirs after one of them."""
    mine, theirs = plan.mine, plan.theirs
    first, second = (theirs, mine) if plan.outcome.action in TARGET else (mine, theirs)
    for known in (first.volume_id, second.volume_id):
        if known != generation.NO_VOLUME:
            return known
    return min(mine.replica_id, theirs.replica_id)


def _merge(replica: Replica, their_map: object) -> None:
    with replica.books:
        if their_map == "all":
            replica.dirty.mark_all()
            return
        if not isinstance(their_map, list) or len(their_map) > MAP_EXTENTS_SENT_MAX:
            raise ProtocolError("the target did not say what it changed")
        try:
            for extent, bits in their_map:
                merged = int(bits, 16) | replica.dirty.bits(extent)
                replica.dirty.set_bits(extent, merged)
        except (TypeError, ValueError, IndexError) as error:
            raise ProtocolError(f"a dirty map that can't be read: {error}") from error


def finished_target(message: dict[str, Any]) -> dict[str, Any]:
    """What a target records when the source says that it has everything."""
    history = message.get("history")
    if not isinstance(history, list):
        raise ProtocolError("the end of a resync without a history")
    result = message.get("result")
    return {
        "disk": DiskState.UP_TO_DATE,
        "current": _number(message.get("current")),
        "history": tuple(_number(value) for value in history),
        "last_resync": result if isinstance(result, dict) else None,
    }


def become_only_copy(replica: Replica, new_generation: int) -> None:
    """The primary's disk is Failed: from now on only this copy moves, and whatever returns later needs all of it."""
    with replica.books:
        replica.dirty.mark_all()
    replica.persist_map()
    replica.move_on(DiskState.FAILED, current=new_generation)

"""What two replicas say to each other before a session, and what each makes durable for it.

Both sides exchange their Standing and decide by the same pure table; the dialler checks that both decided alike. Then
each side makes its part of the plan durable: a target is Inconsistent before anything lands on it (invariant
inconsistent-first), a source has every block in its dirty map that may differ. Everything here can be done again
after an interruption at any point.

What is said is JSON in CONTROL messages, a step each: HELLO, HELLO_REPLY, prepare, prepared, go, gone.
"""

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from mirror.core import generation
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import OperatorError, PeerError, ProtocolError
from mirror.core.forecast import noted
from mirror.core.generation import Action, Kind, Outcome, Standing
from mirror.core.layout import IDENTIFIER_BYTES, Note, is_name, is_note
from mirror.core.limits import HISTORY_MAX, MAP_EXTENTS_SENT_MAX, PARKED_MAX
from mirror.core.map_message import add_map, encode_map
from mirror.core.parked import News
from mirror.core.policy import ALLOWED, Policies, Policy
from mirror.core.selection import GivenUp, both, select_all, select_changed
from mirror.core.sizes import agreed_size
from mirror.core.states import DiskEvent, DiskState, Role, disk_after
from mirror.core.wire import SESSION_VERSION, SESSION_VERSION_MIN, MessageType, decode_object, words
from mirror.link import Stream
from mirror.replica import Replica

log = logging.getLogger(__name__)

SOURCE = (Action.SOURCE_BITMAP, Action.SOURCE_FULL)
TARGET = (Action.TARGET_BITMAP, Action.TARGET_FULL)
# In place of a rule: the side that answers stays apart by its operator's word.
DISCONNECTED = "disconnected"
# What either side's first message says of the protocol; no other message of a session is ever read before it.
VERSIONS = {"version": SESSION_VERSION, "version_min": SESSION_VERSION_MIN}
# No release will ever count so far; a larger number is damage.
VERSION_MAX = 65535
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
    """An agreed outcome. `resync_generation` names the state of a target whose copy is built from nothing.

    `their_suspects`: what its target says, where this side is the source.
    """

    outcome: Outcome
    mine: Standing
    theirs: Standing
    resync_generation: int
    expected_current: int = 0
    expected_disk: DiskState = DiskState.INCONSISTENT
    their_suspects: DirtyMap | None = None


class Conversation:
    """The steps of a handshake on a control stream, `number` that of the session to come, once it is known.

    Each message bears it, so that one of a former handshake is not taken for an answer in this one.
    """

    def __init__(self, stream: Stream, number: int = 0) -> None:
        self.stream = stream
        self.number = number

    def hello(self, mine: Standing, features: dict[str, Any]) -> None:
        message = {**VERSIONS, "standing": encode_standing(mine), "features": features, "session": self.number}
        self.stream.send(MessageType.HELLO, payload=json.dumps(message).encode())

    def hello_back(self, mine: Standing, features: dict[str, Any], rule: str) -> None:
        message = {**VERSIONS, "standing": encode_standing(mine), "features": features, "rule": rule}
        if self.number:
            message["session"] = self.number
        self.stream.send(MessageType.HELLO_REPLY, payload=json.dumps(message).encode())

    def hear_hello(self) -> tuple[Standing, dict[str, Any], str]:
        header, payload = self.stream.receive()
        message = decode_object(payload, MESSAGE)
        if header.type is MessageType.REFUSED:
            raise Wait(words(message.get("reason")))
        if header.type is not MessageType.HELLO_REPLY:
            raise ProtocolError(f"a {header.type.name} message in answer to HELLO")
        check_versions(message)
        self._check_number(message)
        return decode_standing(message.get("standing")), features_in(message), words(message.get("rule"))

    def say(self, step: str, **arguments: Any) -> None:
        message = {"step": step, "session": self.number, **arguments}
        self.stream.send(MessageType.CONTROL, payload=json.dumps(message).encode())

    def hear(self, step: str) -> dict[str, Any]:
        header, payload = self.stream.receive()
        message = decode_object(payload, MESSAGE)
        if header.type is MessageType.REFUSED:
            raise Wait(words(message.get("reason")))
        if header.type is not MessageType.CONTROL or message.get("step") != step:
            raise ProtocolError(f"a {header.type.name} message where the handshake's step {step!r} was due")
        self._check_number(message)
        return message

    def _check_number(self, message: dict[str, Any]) -> None:
        # Session protocol 3 before this was written did not say it.
        if message.get("session", self.number) != self.number:
            raise ProtocolError("a message of another handshake")

    def refuse(self, reason: str) -> None:
        """Say why there is no session now, and hang up."""
        try:
            self.stream.send(MessageType.REFUSED, payload=json.dumps({"reason": reason}).encode())
        except PeerError:
            pass  # it has hung up already, so it knows
        self.stream.close()


class Hello(NamedTuple):
    """The first message of a dialler."""

    theirs: Standing
    features: dict[str, Any]
    number: int


def parse_hello(payload: bytes) -> Hello:
    message = decode_object(payload, MESSAGE)
    check_versions(message)
    return Hello(decode_standing(message.get("standing")), features_in(message), _number(message.get("session")))


def check_versions(message: dict[str, Any]) -> None:
    """Whether there is a version that both sides speak; before anything else of a first message is believed."""
    newest, oldest = message.get("version", 1), message.get("version_min", 1)
    if type(newest) is not int or type(oldest) is not int or not 1 <= oldest <= newest <= VERSION_MAX:
        raise ProtocolError(f"a handshake of versions {words(oldest)} to {words(newest)}")
    rule, upgrade = "", ""
    if newest < SESSION_VERSION_MIN:
        rule, upgrade = "peer-too-old", "upgrade nbdmirror on the peer's node"
    elif oldest > SESSION_VERSION:
        rule, upgrade = "peer-too-new", "upgrade nbdmirror on this node"
    if rule:
        reason = (
            f"the peer speaks versions {oldest} to {newest} of the session protocol, "
            f"this replica {SESSION_VERSION_MIN} to {SESSION_VERSION}"
        )
        raise Refusal(Outcome(rule, Action.REFUSE, reason, upgrade))


def generation_in(message: dict[str, Any]) -> int:
    return _generation(message.get("resync_generation"))


def features_in(message: dict[str, Any]) -> dict[str, Any]:
    features = message.get("features")
    if not isinstance(features, dict):
        raise ProtocolError("a handshake without features")
    return features


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ProtocolError(f"{words(value)} where a number of 64 bits was due")
    return value


def _generation(value: object) -> int:
    number = _number(value)
    if not number:
        raise ProtocolError("0 where a generation was due")
    return number


def _history(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > HISTORY_MAX:
        raise ProtocolError("no list of generations where a history was due")
    return tuple(_generation(one) for one in value)


def _identifier(value: object) -> bytes:
    # fromhex() skips blanks.
    if not isinstance(value, str) or len(value) != 2 * IDENTIFIER_BYTES or not value.isalnum():
        raise ProtocolError(f"{words(value)} where an identifier was due")
    return bytes.fromhex(value)


def _name(value: object) -> str:
    if not isinstance(value, str) or not is_name(value):
        raise ProtocolError(f"{words(value)} where a volume's name was due")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ProtocolError(f"{words(value)} where true or false was due")
    return value


def _policies(value: object) -> Policies:
    """What is not named is refused; a policy that this release does not know can't be decided by."""
    if not isinstance(value, dict):
        raise ProtocolError(f"{words(value)} where policies were due")
    named = {name: Policy(value.get(name, Policy.REFUSE)) for name in Policies._fields}
    for name, policy in named.items():
        if policy not in ALLOWED[name]:
            raise ProtocolError(f"the policy {policy.value} for {name}")
    return Policies(**named)


# Every key of a standing and how it is read. What a newer release adds is passed over; the versions say if that may be.
_STANDING: dict[str, Callable[[Any], Any]] = {
    "replica_id": _identifier,
    "volume_id": _identifier,
    "name": _name,
    "size_bytes": _number,
    "next_size_bytes": _number,
    "kind": Kind,
    "role": Role,
    "disk": DiskState,
    "current": _number,
    "base": _number,
    "history": _history,
    "crashed_primary": _flag,
    "kept_memory": _flag,
    "dirty_blocks": _number,
    "met_peer": _flag,
    "discard_my_data": _flag,
    "policies": _policies,
}
assert list(_STANDING) == [field.name for field in dataclasses.fields(Standing)]


def encode_standing(standing: Standing) -> dict[str, Any]:
    fields = dataclasses.asdict(standing)
    for name in ("replica_id", "volume_id"):
        fields[name] = fields[name].hex()
    for name in ("kind", "role", "disk"):
        fields[name] = fields[name].value
    fields["history"] = list(fields["history"])
    fields["policies"] = {name: policy.value for name, policy in standing.policies._asdict().items()}
    return fields


def decode_standing(fields: object) -> Standing:
    """Raises ProtocolError on anything that can't be right."""
    if not isinstance(fields, dict):
        raise ProtocolError("a handshake without a standing")
    try:
        named = {"policies": {}, "next_size_bytes": 0, **fields}
        return Standing(**{name: read(named[name]) for name, read in _STANDING.items()})
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"a standing that can't be read: {words(str(error))}") from error


# Deciding


def standing(replica: Replica, discard_my_data: bool, policies: Policies, counted: bool = True) -> Standing:
    """`counted`: with the blocks that are not in step, which takes some ms of the books for each 100 GiB; or none."""
    known = replica.superblock
    dirty_blocks = 0
    if counted:
        with replica.books:
            dirty_blocks = replica.not_in_step().dirty_blocks
    return Standing(
        replica_id=known.replica_id,
        volume_id=known.volume_id,
        name=known.name,
        size_bytes=known.size_bytes,
        next_size_bytes=known.next_size_bytes,
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
        policies=policies,
    )


def check_no_stranger(mine: Standing, theirs: Standing) -> None:
    """Raises Refusal for what can't be the other half of this volume, with the row that says why."""
    outcome = generation.stranger(mine, theirs)
    if outcome is not None:
        raise Refusal(outcome)


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


def learn(replica: Replica, outcome: Outcome) -> None:
    """Outdated as soon as it may be known: the peer moved on, whatever comes of this handshake. Raises DeviceError.

    Call while no role changes.
    """
    if outcome.rule in generation.PEER_MOVED_ON and outcome.action in TARGET:
        disk = disk_after(DiskEvent.PEER_MOVED_ON, replica.superblock.disk)
        if disk is not replica.superblock.disk:
            replica.update(disk=disk)


# Making it durable


def own_maps(replica: Replica, plan: Plan) -> dict[str, Any]:
    """What a target tells the source: `map`, its own differences, and `suspects`; a map too large to send is "all"."""
    if plan.outcome.action not in TARGET:
        return {"map": None}
    with replica.books:
        suspects = _sent(replica.suspects.found)
        changed = _sent(replica.not_in_step()) if plan.outcome.action is Action.TARGET_BITMAP else None
    return {"map": changed, "suspects": suspects}


def _sent(blocks: DirtyMap) -> list[Any] | str:
    extents = blocks.extents()
    return "all" if len(extents) > MAP_EXTENTS_SENT_MAX else encode_map(blocks, extents)


def make_source_stable(replica: Replica, plan: Plan) -> None:
    """Before its target becomes Inconsistent, which may be the only one to remember what is not flushed here.

    A power cut of the source in the middle of the resync would lose that, though both had acknowledged it.
    """
    if plan.outcome.action in SOURCE:
        replica.flush()


def prepare(replica: Replica, plan: Plan, message: dict[str, Any]) -> None:
    """Make this side's part of the plan durable (duties g2 and g3). `message`: the peer's, with its maps if any.

    Raises MirrorError.
    """
    settle_size(replica, plan)
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
            moved = generation.full_source(known, plan.resync_generation, replica.runtime.random_number())
            changes.update(moved._asdict())
        _select(replica, plan, message)
        changes["peer_disk"] = DiskState.INCONSISTENT
    replica.update(**changes)
    # Not what it is by now: the primary may have gone on alone since it said how it stands.
    plan.expected_current = int(changes.get("current", plan.mine.current))
    plan.expected_disk = replica.superblock.disk


def _select(replica: Replica, plan: Plan, message: dict[str, Any]) -> None:
    """From now on the source's map names what is copied, durably, and its suspects are those that are not."""
    size_bytes = replica.size_bytes
    their_suspects = DirtyMap(size_bytes)
    # An older release does not say.
    _add(their_suspects, message.get("suspects", []), "suspects", "the peer did not say what it suspects")
    if plan.outcome.action is Action.SOURCE_FULL:
        with replica.books:
            selection = select_all(replica.suspects.found)
            replica.dirty = selection.copied
    else:
        theirs = DirtyMap(size_bytes)
        _add(theirs, message.get("map"), "a dirty map", "the peer did not say what it changed")
        with replica.books:
            found = replica.suspects.found
            selection = select_changed(replica.dirty, found, theirs, their_suspects, _given_up(plan.outcome.rule))
            replica.dirty = selection.copied
    plan.their_suspects = their_suspects
    for what, blocks in (("here", selection.dropped), ("by the peer", both(their_suspects, selection.copied))):
        if blocks.dirty_bytes:
            log.warning("%s: %d bytes suspected %s are copied too", plan.outcome.rule, blocks.dirty_bytes, what)
    # What is no suspect any more is durably dirty before.
    replica.persist_map()
    with replica.books:
        replica.suspects.clear(list(selection.dropped.runs()))
    replica.suspects.persist()


def _given_up(rule: str) -> GivenUp:
    if rule in generation.DISCARD_RULES:
        return GivenUp.ITS_DATA
    return GivenUp.ITS_CHANGES if rule.startswith(generation.POLICY_RULES) else GivenUp.NOTHING


def _add(blocks: DirtyMap, said: object, what: str, missing: str) -> None:
    if said == "all":
        blocks.mark_all()
    else:
        add_map(blocks, said, what, missing)


def settle_size(replica: Replica, plan: Plan) -> None:
    """End a resize that was broken off; before a map of the other side is read, which may be of the larger volume."""
    known, size_bytes = replica.superblock, agreed_size(plan.mine, plan.theirs)
    assert size_bytes is not None, "the table lets no two sizes pass"
    if (known.size_bytes, known.next_size_bytes) != (plan.mine.size_bytes, plan.mine.next_size_bytes):
        raise Wait("this replica was resized during the handshake")
    if known.next_size_bytes:
        outcome = "undone" if size_bytes == known.size_bytes else "finished"
        log.info("a resize to %d bytes that was broken off is %s", known.next_size_bytes, outcome)
    replica.settle_size(size_bytes)


def check_unchanged(replica: Replica, plan: Plan) -> None:
    """What the plan rests on still holds; call while no request runs. Raises Wait."""
    with replica.books:
        left_dirty = plan.outcome.action is Action.NONE and replica.dirty.dirty_blocks > 0
    known = replica.superblock
    if known.current != plan.expected_current or replica.role is not plan.mine.role or left_dirty:
        raise Wait("this replica moved on during the handshake")
    if known.disk is not plan.expected_disk:
        raise Wait(f"this replica became {known.disk.value} during the handshake")


def _volume_id(plan: Plan) -> bytes:
    """The source's volume, else whichever is known; two new replicas name theirs after one of them."""
    mine, theirs = plan.mine, plan.theirs
    first, second = (theirs, mine) if plan.outcome.action in TARGET else (mine, theirs)
    for known in (first.volume_id, second.volume_id):
        if known != generation.NO_VOLUME:
            return known
    return min(mine.replica_id, theirs.replica_id)


def finished_target(message: dict[str, Any], former: Note | None) -> dict[str, Any]:
    """What a target records when the source says that it has everything; `former`: its own note of the last resync."""
    result = message.get("result")
    if result is not None and not is_note(result):
        raise ProtocolError("the end of a resync with a result that can't be kept")
    return {
        "disk": DiskState.UP_TO_DATE,
        "current": _generation(message.get("current")),
        "history": _history(message.get("history")),
        "last_resync": None if result is None else _noted(result, former),
    }


def _noted(result: Note, former: Note | None) -> Note:
    note = noted(result, former)
    return note if is_note(note) else result


def live_state(message: dict[str, Any]) -> dict[str, Any]:
    """The role and the disk state that the peer says it has now."""
    try:
        return {"role": Role(message.get("role")), "disk": DiskState(message.get("disk"))}
    except ValueError as error:
        raise ProtocolError(f"a state that can't be read: {words(str(error))}") from error


def parked_news(message: dict[str, Any]) -> News:
    """Which parked writes may be applied by now, says the peer."""
    still_open = message.get("open")
    if not isinstance(still_open, list) or len(still_open) > PARKED_MAX:
        raise ProtocolError("no list of parked writes that are still open")
    return News(_number(message.get("through")), tuple(map(_number, still_open)))


def progress(message: dict[str, Any]) -> dict[str, int | None]:
    """How far the source says that the resync is; None for what it does not know."""
    found = {key: message.get(key) for key in ("done_bytes", "total_bytes", "bytes_per_s", "eta_s")}
    return {key: None if value is None else _number(value) for key, value in found.items()}


def new_generation(message: dict[str, Any]) -> int:
    return _generation(message.get("generation"))


def become_only_copy(replica: Replica, new_generation: int) -> None:
    """The primary's disk is Failed: from now on only this copy moves, and whatever returns later needs all of it."""
    with replica.books:
        replica.dirty.mark_all()
    replica.persist_map()
    replica.move_on(DiskState.FAILED, current=new_generation)

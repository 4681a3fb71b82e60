"""Generations, and the handshake table that two replicas decide by.

A **generation** is a random number that names a data history. A replica has a `current` one. When it goes on alone it
takes a new one, and `base` becomes the one that it shared with its peer: from then on its dirty map holds **all** its
changes since `base`. Back in step, `base` is 0 again. `history` lists the former ones, newest first.

The table answers who copies what to whom. Both sides read it with the same two standings, in the order of the replicas'
identifiers, so that both find the same row by construction and their actions mirror each other. First match wins; each
row names the story that leads to it. What makes the table safe rests on duties of those who act on it:

 g1  A new generation is durable before the first write that the peer lacks is acknowledged (record-before-ack-alone),
     and again after every session, also one that ended within a resync: the target may have finished it.
 g2  Before a resync begins the source's map durably holds both sides' differences (all blocks for a full one), and the
     target durably is Inconsistent (inconsistent-first), of kind ESTABLISHED and of the source's volume. The target
     keeps its own map until it is UpToDate again.
 g3  A full resync gives its target a new generation which becomes the source's base, so that its map can resume it;
     and the source another new one as current, so that a copy which shared the old one is never taken for equal later.
 g4  At the end the target first: durably UpToDate, with the source's current and history. Then the source. Either has
     base 0 from then on: its map no longer reaches further back.
 g5  `met_peer` is set only when both sides have durably recorded the same volume, and before the first block travels.
 g6  A promotion makes a FRESH or BACKING replica ESTABLISHED, with a volume of its own.
 g7  Who serves without keeping a map (no peer configured) first takes `untracked` generations.
 g8  `invalidate` leaves no former generation and no base behind; a FRESH or BACKING replica becomes JOINING by it.
 g9  That a replica crashed as primary, or lost its memory, stays known over further starts until it is in step again,
     or the source of a resync whose target is durably Inconsistent: what that one remembered counts no more. It is
     forgotten durably before the target is UpToDate, which may answer writes, and lose them, before g4 ends.

A policy (mirror.core.policy) or the operator's word is the only way by which acknowledged data may go; each has a rule
of its own.

What lost: counters (two sides count to the same number alone), timestamps (clocks), DRBD's flags in the identifiers'
low bits and its two functions of mirrored `if`s, in which every row had to be written twice.
"""

import enum
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mirror.core.limits import HISTORY_MAX
from mirror.core.policy import REFUSE_ALWAYS, Policies, Policy
from mirror.core.sizes import agreed_size
from mirror.core.states import DiskState, Role

# The generation of every replica that `create` made of a new sparse file: all of them hold the same zeroes.
DAY0 = 1
# No volume yet.
NO_VOLUME = bytes(16)


class Kind(enum.Enum):
    """Where a replica's contents came from."""

    # A sparse file of `create`: never written, never met a peer.
    FRESH = "fresh"
    # As new, but with contents of its own.
    BACKING = "backing"
    # `create --join`: always the target.
    JOINING = "joining"
    # Has been primary, or in step, or a target.
    ESTABLISHED = "established"


class Action(enum.Enum):
    """What a replica does after the handshake."""

    NONE = "nothing: both are equal"
    # The blocks of both sides' dirty maps.
    SOURCE_BITMAP = "send the changed blocks"
    TARGET_BITMAP = "receive the changed blocks"
    SOURCE_FULL = "send all blocks that differ"
    TARGET_FULL = "receive all blocks that differ"
    # No session now; trying again is of use, because something may change by itself or by an operator elsewhere.
    WAIT = "wait"
    # No session until somebody mends something.
    REFUSE = "stay apart"
    # No session until the operator says whose changes go.
    SPLIT_BRAIN = "stay apart: split brain"


_MIRRORED = {
    Action.SOURCE_BITMAP: Action.TARGET_BITMAP,
    Action.TARGET_BITMAP: Action.SOURCE_BITMAP,
    Action.SOURCE_FULL: Action.TARGET_FULL,
    Action.TARGET_FULL: Action.SOURCE_FULL,
}


def mirror(action: Action) -> Action:
    """What the other side does when this side does `action`."""
    return _MIRRORED.get(action, action)


# -- generations ------------------------------------------------------------------------------------------------------


class Known(Protocol):
    """Whatever carries generations: a superblock, a standing, the result of a function here."""

    @property
    def current(self) -> int: ...
    @property
    def base(self) -> int: ...
    @property
    def history(self) -> tuple[int, ...]: ...


class Generations(NamedTuple):
    """A replica's generations, 0 for none. A base that is set is in the history."""

    current: int
    base: int
    history: tuple[int, ...]


def moved_on(known: Known, new: int) -> Generations:
    """Begin a history of one's own (invariant record-before-ack-alone)."""
    base = known.base or known.current
    return Generations(new, base, with_history(known.current, known.history, base))


def full_source(known: Known, resync_generation: int, new: int) -> Generations:
    """Begin to send everything to a target that is at `resync_generation` from now on (duty g3)."""
    older = with_history(known.current, known.history)
    # The base goes first: what is older than it is not covered by the map, which tells what that target alone lacks.
    return Generations(new, resync_generation, with_history(resync_generation, older))


def full_target(resync_generation: int) -> Generations:
    """Begin to receive everything, or become void by the operator's word: nothing of the former contents counts."""
    return Generations(resync_generation, 0, ())


def in_step(known: Known) -> Generations:
    """Both sides have everything: the source's generations after a resync, and whoever shares its current one."""
    return Generations(known.current, 0, known.history)


def untracked(known: Known, new: int) -> Generations:
    """Go on without keeping a map: whoever shared a generation before will need everything (duty g7)."""
    return Generations(new, 0, with_history(known.current, known.history))


def with_history(newest: int, older: tuple[int, ...], base: int = 0) -> tuple[int, ...]:
    """A history that begins with `newest`; when it is too long its oldest go, but never `base`."""
    history = (*((newest,) if newest else ()), *(one for one in older if one != newest))
    kept = history[:HISTORY_MAX]
    if base and base in history and base not in kept:
        kept = (*kept[:-1], base)
    return kept


def covered(known: Known) -> Set[int]:
    """The former generations whose holder lacks nothing but what the map names: the base, and what followed it."""
    if not known.base:
        return frozenset()
    if known.base not in known.history:
        return frozenset((known.base,))
    return frozenset(known.history[: known.history.index(known.base) + 1])


def shared_ground(one: Known, other: Known) -> bool:
    """Whether the two maps together name all differences: there is a generation since which both kept everything."""
    grounds = [{known.current, *covered(known)} - {0} for known in (one, other)]
    return not grounds[0].isdisjoint(grounds[1])


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """What a replica says of itself in the handshake. `disk` is the live state; `dirty_blocks` counts its own map."""

    replica_id: bytes
    volume_id: bytes
    name: str
    size_bytes: int
    next_size_bytes: int
    kind: Kind
    role: Role
    disk: DiskState
    current: int
    base: int
    history: tuple[int, ...]
    crashed_primary: bool
    kept_memory: bool
    dirty_blocks: int
    met_peer: bool
    discard_my_data: bool
    policies: Policies = REFUSE_ALWAYS


@dataclass(frozen=True)
class Outcome:
    """What one side does, by which row, and how that is said to people."""

    rule: str
    action: Action
    reason: str
    remedy: str = ""


# What the rules of policies (mirror.core.policy) begin with.
POLICY_RULES = "policy-discard-"
# By these the operator has said whose data goes.
DISCARD_RULES = ("discard-bitmap", "discard-full")
# By these the peer is known to hold acknowledged writes that this side lacks, whether a session comes of it or not.
PEER_MOVED_ON = ("behind", "far-behind")


class Row(NamedTuple):
    """One row. `fits(it, other)` is tried with the replica of the lower identifier as `it`, then the other way round.

    `action` is what `it` does. `reason` and `remedy` are for people: {it} and {other} become "this replica" and "the
    peer", {a} and {b} are the standings of the two.
    """

    rule: str
    story: str
    fits: Callable[[Standing, Standing], bool]
    action: Action | Callable[[Standing, Standing], Action]
    reason: str
    remedy: str = ""


def stranger(local: Standing, dialler: Standing) -> Outcome | None:
    """Why whoever dials can't be the other half of this volume, so that nothing it says may count. None: it may be.

    Two that started alone may be: each named a volume of its own before they met.
    """
    if local.replica_id == dialler.replica_id:
        rule = "same-replica"
    elif local.name != dialler.name:
        rule = "name-differs"
    elif dialler.kind in _UNUSED and local.met_peer:
        rule = "needs-join"
    elif (
        NO_VOLUME not in (local.volume_id, dialler.volume_id)
        and not _same_volume(local, dialler)
        and not _both_started_alone(local, dialler)
    ):
        rule = "unrelated"
    else:
        return None
    return _outcome(next(row for row in TABLE if row.rule == rule), dialler, local, False)


def decide(local: Standing, peer: Standing) -> Outcome:
    """The row that fits the two, from the local replica's side. `decide(peer, local)` finds the same row, mirrored."""
    first, second = (local, peer) if local.replica_id <= peer.replica_id else (peer, local)
    for row in TABLE:
        for it, other in ((first, second), (second, first)):
            if row.fits(it, other):
                return _outcome(row, it, other, it is local)
    raise AssertionError("the last row fits everything")


def _outcome(row: Row, it: Standing, other: Standing, it_is_local: bool) -> Outcome:
    action = row.action if isinstance(row.action, Action) else row.action(it, other)
    names = ("this replica", "the peer") if it_is_local else ("the peer", "this replica")
    words = {"it": names[0], "other": names[1], "a": it, "b": other}
    return Outcome(
        row.rule,
        action if it_is_local else mirror(action),
        row.reason.format(**words),
        row.remedy.format(**words),
    )


_UNUSED = (Kind.FRESH, Kind.BACKING)


def _is_primary(one: Standing) -> bool:
    return one.role is Role.PRIMARY


def _is_void(one: Standing) -> bool:
    """Its contents are of no moment, so it can only be a target."""
    return one.kind is Kind.JOINING or one.disk is DiskState.INCONSISTENT


def _joins(one: Standing, other: Standing) -> bool:
    """It has never had a volume's contents; or it began to receive them from this very peer, which forgot that."""
    if one.kind is Kind.ESTABLISHED:
        return _is_void(one) and not one.met_peer and other.kind in _UNUSED
    return _is_void(one)


def _started_alone(one: Standing) -> bool:
    """It became primary before it ever met a peer."""
    return not one.met_peer and (one.kind is Kind.ESTABLISHED or _is_primary(one))


def _waits_for_contents(one: Standing) -> bool:
    return one.kind in _UNUSED and not _is_primary(one)


def _same_volume(one: Standing, other: Standing) -> bool:
    return one.volume_id == other.volume_id


def _both_started_alone(one: Standing, other: Standing) -> bool:
    return not _same_volume(one, other) and not one.met_peer and not other.met_peer


# Generations are compared within one volume only: two volumes may both have begun at DAY0.


def _is_ahead(one: Standing, other: Standing) -> bool:
    """It moved on from where the other one is, and the other one did not move on from where it is."""
    return (
        _same_volume(one, other)
        and other.current != 0
        and other.current in one.history
        and one.current not in other.history
    )


def _equal(one: Standing, other: Standing) -> bool:
    return _same_volume(one, other) and one.current == other.current != 0


def _maps_tell_all(one: Standing, other: Standing) -> bool:
    return _same_volume(one, other) and shared_ground(one, other)


def _nothing_open(one: Standing) -> bool:
    return not one.dirty_blocks and not one.crashed_primary


def _by_ground(it: Standing, other: Standing) -> Action:
    return Action.SOURCE_BITMAP if _maps_tell_all(it, other) else Action.SOURCE_FULL


def _by_day0(it: Standing, other: Standing) -> Action:
    # The base alone counts, not an equal current: who never kept a map may be at DAY0 with contents.
    return Action.SOURCE_BITMAP if other.current in covered(it) else Action.SOURCE_FULL


def _have_common_generation(one: Standing, other: Standing) -> bool:
    return not {one.current, *one.history}.isdisjoint({other.current, *other.history} - {0})


def _policy(it: Standing, other: Standing) -> Policy:
    """What `it` is configured to do about a split brain with this many primaries."""
    return it.policies[_is_primary(it) + _is_primary(other)]


def _gives_way_by(policy: Policy, it: Standing, other: Standing) -> bool:
    """Whether this policy is the one that holds, and what would go is known to the block and not being served."""
    return _policy(it, other) is policy and _maps_tell_all(it, other) and not _is_primary(other)


_DISCARD = (
    "decide whose changes shall go; there: `nbdmirror demote DIR` if it is primary, "
    "then `nbdmirror connect DIR --discard-my-data`"
)
_JOIN = "if its contents may go: `nbdmirror create DIR --join` anew there"

TABLE = (
    # What can't be the other half of this volume.
    Row(
        "same-replica",
        "The peer's address is one's own, or a replica's directory was copied.",
        lambda it, other: it.replica_id == other.replica_id,
        Action.REFUSE,
        "both replicas bear the same identifier: the peer's address is this replica's own, or the directory is a copy",
        "correct `peer` in volume.toml, or make the copy anew with `nbdmirror create DIR --join`",
    ),
    Row(
        "name-differs",
        "An address of another volume.",
        lambda it, other: it.name != other.name,
        Action.REFUSE,
        "{it} is of volume {a.name!r}, {other} of volume {b.name!r}",
        "correct `peer` or `name` in volume.toml",
    ),
    Row(
        "size-differs",
        "Created with another size. Two that a resize left with different sizes agree on one (mirror.core.sizes).",
        lambda it, other: agreed_size(it, other) is None,
        Action.REFUSE,
        "{it} has {a.size_bytes} bytes, {other} {b.size_bytes}",
        "create the wrong one anew with the other one's size and --join",
    ),
    Row(
        "failed-disk",
        "A device refused a read, a write or a flush and was not replaced yet.",
        lambda it, _: it.disk is DiskState.FAILED,
        Action.REFUSE,
        "the disk of {it} is Failed",
        "after its repair: `nbdmirror invalidate DIR` there, so that it is resynced whole",
    ),
    Row(
        "bad-primary",
        "Can't be (invariant no-bad-primary); a bug of ours must not spread.",
        lambda it, _: _is_primary(it) and _is_void(it),
        Action.REFUSE,
        "{it} is primary on an Inconsistent copy, which can't be",
        "stop it, and report this with its log",
    ),
    # First contacts.
    Row(
        "both-joining",
        "Both were created with --join.",
        lambda it, other: it.kind is other.kind is Kind.JOINING,
        Action.REFUSE,
        "both replicas were created with --join, so neither has contents",
        "create one of them anew without --join",
    ),
    Row(
        "no-good-source",
        "Both are Inconsistent: a source was lost in the middle of a resync, or the operator declared both void.",
        lambda it, other: _is_void(it) and _is_void(other),
        Action.REFUSE,
        "neither replica is a sound copy: both are Inconsistent",
        "bring back the replica that was the resync's source, or create the volume anew and restore a backup",
    ),
    Row(
        "join-unrelated",
        "A replacement that already belongs to another volume.",
        lambda it, other: (
            it.kind is Kind.JOINING and NO_VOLUME not in (it.volume_id, other.volume_id) and not _same_volume(it, other)
        ),
        Action.REFUSE,
        "{it} was made to join another volume than that of {other}",
        "correct `peer` in volume.toml",
    ),
    Row(
        "outdated-source",
        "The newer copy was declared void, or is being replaced; the only sound one is known to be older.",
        lambda it, other: (
            _is_void(it) and other.disk is DiskState.OUTDATED and (it.kind is Kind.JOINING or _same_volume(it, other))
        ),
        Action.WAIT,
        "the only sound copy, on {other}, is Outdated: acknowledged writes are missing from it",
        "if the newer copy is lost: `nbdmirror promote DIR --force` on {other}",
    ),
    Row(
        "join",
        "A replacement meets the replica that is left.",
        lambda it, other: _joins(other, it),
        Action.SOURCE_FULL,
        "{other} joins: all its blocks are brought up to those of {it}",
    ),
    Row(
        "adopt-fresh",
        "Two new sparse files: both hold nothing but zeroes.",
        lambda it, other: it.kind is other.kind is Kind.FRESH,
        Action.NONE,
        "both replicas are new and empty",
    ),
    Row(
        "backing-undecided",
        "Two new replicas, at least one with contents of its own, and nobody has said whose count.",
        lambda it, other: _waits_for_contents(it) and _waits_for_contents(other),
        Action.WAIT,
        "at least one replica was created with contents of its own, and neither is primary yet",
        "`nbdmirror promote DIR` the one whose contents count",
    ),
    Row(
        "first-contact",
        "A replica that was primary alone so far meets the new sparse file of its peer.",
        lambda it, other: _started_alone(it) and _waits_for_contents(other) and other.kind is Kind.FRESH,
        _by_day0,
        "{it} was primary alone so far, {other} is new and empty",
    ),
    Row(
        "backing-first",
        "The first primary meets a peer that was created with contents of its own.",
        lambda it, other: _started_alone(it) and _waits_for_contents(other),
        Action.SOURCE_FULL,
        "{it} became primary first, so its contents count and those of {other} go",
    ),
    Row(
        "needs-join",
        "Somebody created a replica anew, without --join, for a volume that already has two.",
        lambda it, other: it.kind in _UNUSED and (other.met_peer or _is_void(other)),
        Action.REFUSE,
        "{it} was created as a new volume, but {other} belongs to one that already had two replicas",
        "`nbdmirror create DIR --join` makes a replacement",
    ),
    Row(
        "unrelated",
        "Two volumes of the same name and size.",
        lambda it, other: not _same_volume(it, other) and not _both_started_alone(it, other),
        Action.REFUSE,
        "the replicas belong to different volumes of the same name",
        "correct `peer` in volume.toml. " + _JOIN,
    ),
    # One volume from here on, but for two that started alone.
    Row(
        "both-primary",
        "Both were promoted while apart.",
        lambda it, other: _is_primary(it) and _is_primary(other),
        Action.SPLIT_BRAIN,
        "both replicas are primary",
        "`nbdmirror demote DIR` on one; if both have moved on by then, `nbdmirror connect DIR --discard-my-data` there",
    ),
    Row(
        "inconsistent-target",
        "A resync was interrupted, or the operator declared a copy void.",
        lambda _, other: _is_void(other),
        _by_ground,
        "{other} is Inconsistent: its resync goes on",
    ),
    # Equal generations: in step when they parted, and nobody acknowledged anything alone.
    Row(
        "equal-outdated",
        "The primary told its peer to stay behind and then had nothing to write alone.",
        lambda it, other: (
            _equal(it, other)
            and other.disk is DiskState.OUTDATED
            and it.disk is not DiskState.OUTDATED
            and not _is_primary(other)
        ),
        Action.SOURCE_BITMAP,
        "{other} is Outdated",
    ),
    Row(
        "equal",
        "They parted in step, with nothing on the way.",
        lambda it, other: _equal(it, other) and _nothing_open(it) and _nothing_open(other),
        Action.NONE,
        "both replicas are equal",
    ),
    Row(
        "equal-primary",
        "The link was lost and is back before anything was acknowledged alone; or the secondary was restarted.",
        lambda it, other: _equal(it, other) and _is_primary(it),
        Action.SOURCE_BITMAP,
        "nothing was acknowledged by {it} alone, but writes were on the way",
    ),
    Row(
        "equal-memory",
        "One lost power, the other one did not: only that one has all that was acknowledged (invariant memory-counts).",
        lambda it, other: _equal(it, other) and it.kept_memory and not other.kept_memory,
        Action.SOURCE_BITMAP,
        "{other} lost its memory, {it} did not",
    ),
    Row(
        "equal-crashed",
        "Both were killed, or both lost power: the primary's copy has all that it acknowledged.",
        lambda it, other: _equal(it, other) and it.crashed_primary and not other.crashed_primary,
        Action.SOURCE_BITMAP,
        "{it} was primary when it crashed",
    ),
    Row(
        "equal-dirty",
        "A primary left in order while its peer was away, with writes that the peer may have forgotten.",
        lambda it, other: _equal(it, other) and it.dirty_blocks > 0 and not other.dirty_blocks,
        Action.SOURCE_BITMAP,
        "{it} knows of blocks that {other} may lack",
    ),
    Row(
        "equal-tie",
        "Either copy will do, as long as both take the same.",
        lambda it, other: _equal(it, other) and it.replica_id < other.replica_id,
        Action.SOURCE_BITMAP,
        "both replicas know of open blocks and either may be taken; that of {it} is",
    ),
    # One moved on.
    Row(
        "behind",
        "The usual return: one went on alone, and its map names all that the other one lacks.",
        lambda it, other: _is_ahead(it, other) and other.current in covered(it) and not _is_primary(other),
        Action.SOURCE_BITMAP,
        "{it} moved on alone, {other} did not",
    ),
    Row(
        "far-behind",
        "A copy that was in step long ago: since then the other one was in step with a third, or kept no map.",
        lambda it, other: _is_ahead(it, other) and not _is_primary(other),
        Action.SOURCE_FULL,
        "{other} is so far behind that {it} no longer knows what it lacks",
    ),
    # Both moved on, or a primary would have to give way: only by the operator's word (invariant split-brain-found).
    Row(
        "discard-both",
        "The operator said --discard-my-data on both sides.",
        lambda it, other: it.discard_my_data and other.discard_my_data,
        Action.REFUSE,
        "both sides were told to discard their data",
        "`nbdmirror connect DIR` on the one whose data shall stay, then --discard-my-data on the other one alone",
    ),
    Row(
        "discard-on-primary",
        "The side that shall give way is serving clients.",
        lambda it, _: it.discard_my_data and _is_primary(it),
        Action.REFUSE,
        "{it} was told to discard its data, but it is primary",
        "`nbdmirror demote DIR` there first",
    ),
    Row(
        "discard-bitmap",
        "The operator chose, and both maps reach back to a common generation.",
        lambda it, other: other.discard_my_data and _maps_tell_all(it, other),
        Action.SOURCE_BITMAP,
        "the changes of {other} are discarded, by the operator's word",
    ),
    Row(
        "discard-full",
        "The operator chose, and nobody knows what differs.",
        lambda _, other: other.discard_my_data,
        Action.SOURCE_FULL,
        "the contents of {other} are discarded, by the operator's word",
    ),
    Row(
        "both-started-alone",
        "Both new replicas were made primary before they met.",
        _both_started_alone,
        Action.SPLIT_BRAIN,
        "both replicas were primary before they first met, so each has a history of its own",
        _DISCARD,
    ),
    Row(
        "primary-behind",
        "A primary came back that the other one has overtaken since; it has acknowledged nothing alone.",
        lambda it, other: _is_ahead(it, other) and _is_primary(other),
        Action.SPLIT_BRAIN,
        "{other} is primary, but {it} has moved on since they were in step",
        "`nbdmirror demote DIR` on {other}, which then receives what it lacks",
    ),
    Row(
        "policies-differ",
        "Both moved on, and volume.toml of one says what to do about it, that of the other says something else.",
        lambda it, other: _maps_tell_all(it, other) and _policy(it, other) is not _policy(other, it),
        Action.SPLIT_BRAIN,
        "both replicas moved on since they were in step, and they are configured to resolve that differently",
        "set the same split_brain_... keys in both volume.toml and restart; or " + _DISCARD,
    ),
    Row(
        "policy-discard-zero-changes",
        "Both were promoted while apart, but one of them was not written to: nothing is lost when it follows.",
        # Who lost its memory may lack what both had acknowledged: the other one has it, and its map does not say so.
        lambda it, other: (
            _gives_way_by(Policy.DISCARD_ZERO_CHANGES, it, other) and not other.dirty_blocks and it.kept_memory
        ),
        Action.SOURCE_BITMAP,
        "split brain: {other} changed nothing since, so it follows, by the policy discard-zero-changes",
    ),
    Row(
        "policy-discard-least-changes",
        "Both moved on, neither is primary, and volume.toml says that the one with fewer changed blocks gives way.",
        lambda it, other: (
            _gives_way_by(Policy.DISCARD_LEAST_CHANGES, it, other)
            and (other.dirty_blocks < it.dirty_blocks or not it.dirty_blocks)
        ),
        Action.SOURCE_BITMAP,
        "split brain: the {b.dirty_blocks} changed blocks of {other} are discarded, by the policy "
        "discard-least-changes ({it} changed {a.dirty_blocks})",
    ),
    Row(
        "policy-discard-secondary",
        "Both moved on, one is primary, and volume.toml says that the other one gives way.",
        lambda it, other: _gives_way_by(Policy.DISCARD_SECONDARY, it, other) and _is_primary(it),
        Action.SOURCE_BITMAP,
        "split brain: the {b.dirty_blocks} changed blocks of {other} are discarded, by the policy discard-secondary",
    ),
    Row(
        "split-brain",
        "Both were promoted while apart, and both moved on.",
        _have_common_generation,
        Action.SPLIT_BRAIN,
        "both replicas moved on since they were in step",
        _DISCARD,
    ),
    Row(
        "unrelated-histories",
        "Apart for so long that no common generation is remembered, or restored from a backup.",
        lambda _it, _other: True,
        Action.REFUSE,
        "the replicas are of one volume but share no known generation",
        _DISCARD,
    ),
)

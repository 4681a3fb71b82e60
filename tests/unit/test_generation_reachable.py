"""The handshake table over every pair of standings that two replicas can come to within so many events.

A breadth-first walk over a small model of two replicas with two blocks: not random lives (test_generation_lives.py has
those, longer ones and of three replicas), but each event in each state, every interruption between two durable steps
included. States that differ only in the names of generations are one. The model knows which copy holds acknowledged
writes that the other one lacks, and in which blocks the copies differ.

At each pair, whoever is told to discard and whatever the policies: both sides decide alike, mirrored; no sync
overwrites newer acknowledged data but by the operator's word or a policy that both name; who is in step is equal.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from mirror.core import generation
from mirror.core.generation import (
    DAY0,
    NO_VOLUME,
    PEER_MOVED_ON,
    POLICY_RULES,
    TABLE,
    Action,
    Generations,
    Kind,
    Outcome,
    Standing,
    decide,
    full_source,
    full_target,
    in_step,
    mirror,
    moved_on,
    stranger,
    untracked,
)
from mirror.core.policy import REFUSE_ALWAYS, Policies, Policy
from mirror.core.states import DiskState, Role

U, O, I = DiskState.UP_TO_DATE, DiskState.OUTDATED, DiskState.INCONSISTENT  # noqa: E741
PRIMARY, SECONDARY = Role.PRIMARY, Role.SECONDARY
ALL = 0b11
BLOCKS = (0b01, 0b10)
SOURCES = (Action.SOURCE_BITMAP, Action.SOURCE_FULL)
APART = (Action.WAIT, Action.REFUSE, Action.SPLIT_BRAIN)
NONE, SOFT, HARD = 0, 1, 2

CHOICES = [
    Policies(Policy.DISCARD_ZERO_CHANGES, Policy.DISCARD_ZERO_CHANGES),
    Policies(Policy.DISCARD_LEAST_CHANGES, Policy.DISCARD_SECONDARY),
]


class Node(NamedTuple):
    """A replica. `dirty` and `unstable` are bits, one a block; `alone`: it recorded that it goes on alone.

    `used`, which it can't tell of itself: blocks that may hold something else than zeroes.
    """

    kind: Kind
    current: int
    base: int = 0
    history: tuple[int, ...] = ()
    volume: int = 0
    disk: DiskState = U
    met: bool = False
    crashed: bool = False
    kept: bool = True
    role: Role = SECONDARY
    alone: bool = False
    discard: bool = False
    dirty: int = 0
    unstable: int = 0
    used: int = 0

    def at(self, generations: Generations) -> "Node":
        return self._replace(**generations._asdict())


class World(NamedTuple):
    """Two replicas and what only a demon knows.

    `differ`: blocks in which the copies differ. `fresh`: blocks written by both and flushed by neither. `lead`: whether
    a side holds acknowledged writes that the other one lacks; a SOFT one it may still lose with its power.
    `source`: while a resync runs, its source.
    """

    nodes: tuple[Node, Node]
    linked: bool = False
    source: int | None = None
    differ: int = 0
    fresh: int = 0
    lead: tuple[int, int] = (NONE, NONE)

    def with_node(self, side: int, node: Node) -> "World":
        return self._replace(nodes=(node, self.nodes[1]) if side == 0 else (self.nodes[0], node))

    def change(self, side: int, **changes: object) -> "World":
        return self.with_node(side, self.nodes[side]._replace(**changes))

    def leading(self, side: int, lead: int) -> "World":
        return self._replace(lead=(lead, self.lead[1]) if side == 0 else (self.lead[0], lead))

    def new_number(self) -> int:
        return 1 + max(max(node.current, node.base, node.volume, *node.history, 0) for node in self.nodes)


class Broken(Exception):
    """An invariant does not hold."""


def renamed(world: World) -> World:
    """The same with generations and volumes numbered in the order in which they appear."""
    names = {0: 0, DAY0: DAY0}
    volumes = {0: 0}
    nodes = []
    for node in world.nodes:
        for number in (node.current, node.base, *node.history):
            names.setdefault(number, len(names) + 1)
        volumes.setdefault(node.volume, len(volumes))
        nodes.append(
            node._replace(
                current=names[node.current],
                base=names[node.base],
                history=tuple(names[number] for number in node.history),
                volume=volumes[node.volume],
            )
        )
    return world._replace(nodes=(nodes[0], nodes[1]))


def standing(side: int, node: Node, policies: Policies = REFUSE_ALWAYS) -> Standing:
    return Standing(
        replica_id=bytes([side + 1]) * 16,
        volume_id=node.volume.to_bytes(16, "big") if node.volume else NO_VOLUME,
        name="vol",
        size_bytes=2 * 4096,
        next_size_bytes=0,
        kind=node.kind,
        role=node.role,
        disk=node.disk,
        current=node.current,
        base=node.base,
        history=node.history,
        crashed_primary=node.crashed,
        kept_memory=node.kept,
        dirty_blocks=(node.dirty | node.unstable).bit_count(),
        met_peer=node.met,
        discard_my_data=node.discard,
        policies=policies,
    )


# What the outside does, and every way in which it may end


def cut(world: World) -> World:
    """The session ends: what the peer may have lost is dirty (unstable-is-dirty)."""
    if not world.linked:
        return world
    nodes = [node._replace(dirty=node.dirty | node.unstable, unstable=0) for node in world.nodes]
    return world._replace(nodes=(nodes[0], nodes[1]), linked=False, source=None)


def died(world: World, side: int, power: bool) -> Iterator[World]:
    """It is started again as secondary, with what it remembers; its log may name more than was open."""
    world = cut(world)
    node = world.nodes[side]
    crashed = node.crashed or node.role is PRIMARY
    after = world.change(
        side, crashed=crashed, kept=node.kept and not power, role=SECONDARY, alone=False, discard=False
    )
    found = [after]
    if power:
        lost = after
        if world.lead[side] == SOFT:
            lost = lost.leading(side, NONE)
        if world.fresh:
            other = 1 - side
            lost = lost._replace(differ=lost.differ | world.fresh, fresh=0)
            lost = lost.leading(other, max(lost.lead[other], SOFT))
        found.append(lost)
    for one in found:
        yield one
        if crashed:
            yield one.change(side, dirty=ALL)


def writes(world: World, side: int) -> Iterator[World]:
    node = world.nodes[side]
    for block in BLOCKS:
        if world.linked:
            begun = world.change(side, unstable=node.unstable | block)
            done = begun._replace(fresh=begun.fresh | block)
            # A block that both wrote is equal, also in the middle of a resync.
            yield used(done, block)._replace(differ=done.differ & ~block)
            yield cut(used(begun, block)._replace(differ=begun.differ | block))
            continue
        marked = world.change(side, dirty=node.dirty | block, used=node.used | block)
        marked = marked._replace(differ=world.differ | block)
        if not node.alone:
            yield marked  # it died before the record, and the answer
            after = marked.nodes[side].at(moved_on(node, world.new_number()))
            marked = marked.with_node(side, after._replace(alone=True))
        yield marked.leading(side, HARD)


def used(world: World, block: int) -> World:
    """Both hold something there."""
    for side in (0, 1):
        world = world.change(side, used=world.nodes[side].used | block)
    return world


def flushed(world: World) -> World:
    nodes = [node._replace(unstable=0) for node in world.nodes]
    return world._replace(nodes=(nodes[0], nodes[1]), fresh=0)


def promoted(world: World, side: int) -> Iterator[World]:
    node, other = world.nodes[side], world.nodes[1 - side]
    if node.role is PRIMARY or node.disk is I or world.source is not None:
        return
    if world.linked:
        if other.role is not PRIMARY:
            yield world.change(side, role=PRIMARY, alone=False)
        return
    # A promotion begins with a flush of its own disk, and a history of its own, by force where it is Outdated.
    world = world.leading(side, HARD if world.lead[side] else NONE)
    volume = node.volume or world.new_number()
    after = node.at(moved_on(node, world.new_number()))
    yield world.with_node(side, after._replace(role=PRIMARY, alone=True, disk=U, kind=Kind.ESTABLISHED, volume=volume))


def outdated(world: World, side: int) -> World:
    """Disconnected, or stopped in order, while the other one is primary."""
    if world.nodes[side].disk is U:
        world = world.change(side, disk=O)
    return cut(world)


def invalidated(world: World, side: int) -> World:
    node = world.nodes[side]
    kind = Kind.ESTABLISHED if node.kind is Kind.ESTABLISHED else Kind.JOINING
    void = node.at(full_target(world.new_number()))._replace(kind=kind, disk=I, dirty=0, used=ALL)
    return gave_up(world.with_node(side, void), side)


def gave_up(world: World, side: int) -> World:
    """What it held counts no more; the other one alone holds what there is."""
    return world._replace(differ=ALL, fresh=0).leading(side, NONE).leading(1 - side, HARD)


def served_untracked(world: World, side: int) -> World:
    node = world.nodes[side]
    volume = node.volume or world.new_number()
    after = node.at(untracked(node, world.new_number()))
    after = after._replace(kind=Kind.ESTABLISHED, volume=volume, dirty=0, used=ALL)
    return world.with_node(side, after)._replace(differ=ALL).leading(side, HARD)


def replaced(world: World, side: int) -> Iterator[World]:
    """A new replica in its place, with --join, or by mistake without it."""
    yield gave_up(world.with_node(side, Node(Kind.JOINING, 0, disk=I)), side)
    new = world.with_node(side, Node(Kind.FRESH, DAY0))
    used = world.nodes[1 - side].used
    yield gave_up(new, side)._replace(differ=used) if used else new._replace(differ=0, fresh=0, lead=(NONE, NONE))


# Handshake and resync


def met(world: World) -> Iterator[World]:
    """They meet: nothing comes of it, or each way in which it may be interrupted, or a session."""
    one, other = (standing(side, node) for side, node in enumerate(world.nodes))
    outcome = decide(one, other)
    if outcome.action in APART:
        return
    if outcome.rule in PEER_MOVED_ON:
        behind = 0 if outcome.action not in SOURCES else 1
        if world.nodes[behind].disk is U:
            yield world.change(behind, disk=O)
    if outcome.action is Action.NONE:
        yield from adopted(world)
        return
    yield from prepared(world, 0 if outcome.action in SOURCES else 1, outcome)


def adopted(world: World) -> Iterator[World]:
    volume = max(node.volume for node in world.nodes) or world.new_number()
    ready = world
    for side in (0, 1):
        yield world.change(side, kind=Kind.ESTABLISHED, volume=volume)
        ready = ready.change(side, kind=Kind.ESTABLISHED, volume=volume)
    yield ready
    # The records that end it come one after the other.
    for side in (0, 1):
        yield settled(ready, side)
    yield ended_in_step(ready._replace(linked=True))


def prepared(world: World, source: int, outcome: Outcome) -> Iterator[World]:
    target = 1 - source
    full = outcome.action in (Action.SOURCE_FULL, Action.TARGET_FULL)
    volume = world.nodes[source].volume or world.nodes[target].volume or world.new_number()
    number = world.new_number() + 1
    sender = world.nodes[source]._replace(kind=Kind.ESTABLISHED, volume=volume)
    receiver = world.nodes[target]._replace(kind=Kind.ESTABLISHED, volume=volume, disk=I)
    if full:
        sender = sender.at(full_source(sender, number, number + 1))._replace(dirty=ALL)
        receiver = receiver.at(full_target(number))
    else:
        sender = sender._replace(dirty=sender.dirty | receiver.dirty)
    yield world.with_node(source, sender)
    begun = overwritten(world.with_node(target, receiver), target)
    yield begun
    ready = begun.with_node(source, sender)
    yield ready
    session = ready._replace(linked=True, source=source)
    for side in (0, 1):
        kept = world.nodes[side].kept or side == source
        crashed = world.nodes[side].crashed and side != source
        yield ready.change(side, met=True, kept=kept, crashed=crashed)
        session = session.change(side, met=True, kept=kept, crashed=crashed, alone=False, discard=False)
    yield session


def overwritten(world: World, target: int) -> World:
    """Whatever the target held counts for nothing from now on."""
    return world._replace(fresh=0).leading(target, NONE).leading(1 - target, HARD)


def copied(world: World) -> Iterator[World]:
    source = world.source
    assert source is not None
    node = world.nodes[source]
    for block in BLOCKS:
        if node.dirty & block:
            after = world.change(source, dirty=node.dirty & ~block, unstable=node.unstable | block)
            other = after.nodes[1 - source]
            after = after.change(1 - source, used=(other.used & ~block) | (node.used & block))
            yield after._replace(differ=after.differ & ~block)
    if node.dirty:
        return
    stable = flushed(world)
    if stable.differ:
        raise Broken(f"the copies differ after a resync: {stable}")
    ended = in_step(node)
    finished = stable.change(1 - source, disk=U, dirty=0, unstable=0).with_node(
        1 - source, stable.nodes[1 - source].at(ended)._replace(disk=U, dirty=0, unstable=0)
    )
    finished = finished._replace(lead=(NONE, NONE))
    # The target's last word, before the source's.
    yield cut(finished)
    yield cut(settled(finished, 1 - source))
    yield ended_in_step(finished)


def settled(world: World, side: int) -> World:
    node = world.nodes[side]
    return world.with_node(
        side, node.at(in_step(node))._replace(dirty=0, crashed=False, kept=True, met=True, disk=U, discard=False)
    )


def ended_in_step(world: World) -> World:
    if world.differ:
        raise Broken(f"said to be equal, but they differ: {world}")
    if HARD in world.lead:
        raise Broken(f"said to be equal, but one lacks what the other acknowledged: {world}")
    for side in (0, 1):
        world = settled(world, side).change(side, alone=False)
    return world._replace(source=None, lead=(NONE, NONE))


def events(world: World) -> Iterator[World]:
    """Everything that may come next."""
    if world.linked:
        yield cut(world)
        yield flushed(world)
        if world.source is not None:
            yield from copied(world)
    else:
        yield from met(world)
    for side, node in enumerate(world.nodes):
        other = world.nodes[1 - side]
        if node.role is PRIMARY:
            yield from writes(world, side)
            after = flushed(world) if world.linked else world
            yield after.change(side, role=SECONDARY, alone=False)
        else:
            if world.linked and other.role is PRIMARY and world.source is None:
                yield outdated(world, side)
            if not world.linked:
                yield invalidated(world, side)
                yield from replaced(world, side)
                if node.disk is U:
                    yield served_untracked(world, side)
                if not node.discard:
                    yield world.change(side, discard=True)
        yield from promoted(world, side)
        yield from died(world, side, power=False)
        yield from died(world, side, power=True)


# What must hold at every pair


def check(world: World) -> set[str]:
    """Every word and every policy; the rules that were met."""
    rules = set()
    nodes = world.nodes
    words = [(nodes[0].discard, nodes[1].discard)]
    if DiskState.INCONSISTENT not in (nodes[0].disk, nodes[1].disk):
        words = list(itertools.product((False, True), repeat=2))
    for word in words:
        told = [node._replace(discard=own) for node, own in zip(nodes, word, strict=True)]
        for policies in (REFUSE_ALWAYS, *CHOICES):
            outcome = check_once(world, *(standing(side, node, policies) for side, node in enumerate(told)))
            rules.add(outcome.rule)
            if outcome.rule not in ("split-brain", "policies-differ") and not outcome.rule.startswith(POLICY_RULES):
                break  # the policies are not looked at
        else:
            mixed = [standing(side, node, own) for side, (node, own) in enumerate(zip(told, CHOICES, strict=True))]
            outcome = check_once(world, *mixed)
            rules.add(outcome.rule)
    return rules


def check_once(world: World, one: Standing, other: Standing) -> Outcome:
    mine, theirs = decide(one, other), decide(other, one)
    if (mine.rule, mine.action) != (theirs.rule, mirror(theirs.action)):
        raise Broken(f"decided differently: {mine} and {theirs} in {world}")
    if mine.action in APART:
        return mine
    if stranger(one, other) or stranger(other, one):
        raise Broken(f"{mine.rule}: a peer that it needs is turned away as a stranger: {world}")
    if mine.action is Action.NONE:
        if world.differ or HARD in world.lead:
            raise Broken(f"{mine.rule}: nothing is to be done, but the copies are not equal: {world}")
        return mine
    target = 1 if mine.action in SOURCES else 0
    loser, winner = (one, other) if target == 0 else (other, one)
    if loser.role is PRIMARY or winner.disk is I or winner.kind is Kind.JOINING:
        raise Broken(f"{mine.rule}: a primary gives way, or a void copy is the source: {world}")
    by_word = mine.rule in ("discard-bitmap", "discard-full") and loser.discard_my_data
    primaries = (one.role is PRIMARY) + (other.role is PRIMARY)
    named = one.policies[primaries] is other.policies[primaries] is not Policy.REFUSE
    by_policy = mine.rule.startswith(POLICY_RULES) and named
    if by_policy and one.policies[primaries] is not Policy.DISCARD_ZERO_CHANGES:
        return mine
    established = loser.disk is not I and loser.kind is Kind.ESTABLISHED
    if established and world.lead[target] == HARD and not by_word:
        raise Broken(f"{mine.rule} overwrites what was acknowledged: {world}")
    bitmap = mine.action in (Action.SOURCE_BITMAP, Action.TARGET_BITMAP)
    if bitmap and world.differ & ~(world.nodes[0].dirty | world.nodes[1].dirty):
        raise Broken(f"{mine.rule}: the maps do not name all that differs: {world}")
    return mine


def created(one: Kind, other: Kind) -> World:
    nodes = [
        Node(kind, DAY0) if kind is Kind.FRESH else Node(kind, 2 + side, used=ALL)
        for side, kind in enumerate((one, other))
    ]
    return World((nodes[0], nodes[1]), differ=nodes[0].used | nodes[1].used)


IN_STEP = World(
    (
        Node(Kind.ESTABLISHED, 2, volume=1, met=True, role=PRIMARY, used=ALL),
        Node(Kind.ESTABLISHED, 2, volume=1, met=True, used=ALL),
    ),
    linked=True,
)
STARTS = {
    "new": created(Kind.FRESH, Kind.FRESH),
    "backing": created(Kind.FRESH, Kind.BACKING),
    "in step": IN_STEP,
}


def walk(start: World, depth: int) -> tuple[int, set[str]]:
    """How many states there are within `depth` events, and the rules met in them."""
    seen = {renamed(start)}
    edge = list(seen)
    rules: set[str] = set()
    for _ in range(depth + 1):
        following = []
        for world in edge:
            if not world.linked:
                rules |= check(world)
            for after in events(world):
                name = renamed(after)
                if name not in seen:
                    seen.add(name)
                    following.append(name)
        edge = following
    return len(seen), rules


# Rows about what no event here leads to: foreign directories and addresses, broken disks, our own bugs, and histories
# longer than this walk; test_generation.py has their stories.
NOT_HERE = {
    "same-replica",
    "name-differs",
    "size-differs",
    "failed-disk",
    "bad-primary",
    "join-unrelated",
    "unrelated-histories",
}


def walk_all(depth: int) -> tuple[int, set[str]]:
    found = [walk(start, depth) for start in STARTS.values()]
    return sum(count for count, _ in found), set().union(*(rules for _, rules in found))


def test_no_pair_within_four_events_breaks_an_invariant() -> None:
    states, rules = walk_all(4)
    assert states > 50_000
    assert len(rules) > 25


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_pair_within_six_events_breaks_an_invariant() -> None:
    states, rules = walk_all(6)
    assert states > 400_000
    assert rules == {row.rule for row in TABLE} - NOT_HERE


def broken(rule: str, **changes: object) -> tuple[generation.Row, ...]:
    return tuple(row._replace(**changes) if row.rule == rule else row for row in TABLE)


def _without_memory(it: Standing, other: Standing) -> bool:
    """The policy as it was first written: whoever lost its memory could be the source."""
    zero = Policy.DISCARD_ZERO_CHANGES
    named = it.policies[(it.role is PRIMARY) + (other.role is PRIMARY)] is zero
    known = it.volume_id == other.volume_id and generation.shared_ground(it, other)
    return named and known and other.role is not PRIMARY and not other.dirty_blocks


# What is wrong with the table, from where and after how many events that comes to light.
FAULTS = {
    "far behind, and only the map's blocks are copied": (
        broken("far-behind", action=Action.SOURCE_BITMAP),
        "in step",
        4,
    ),
    "the one that is behind is the source": (broken("behind", action=Action.TARGET_BITMAP), "in step", 2),
    "a split brain is resolved by itself": (broken("split-brain", action=Action.SOURCE_BITMAP), "in step", 4),
    "a discarded side is the source": (broken("discard-bitmap", action=Action.TARGET_BITMAP), "in step", 4),
    "a joining replica is the source": (broken("join", action=Action.TARGET_FULL), "in step", 2),
    "a first contact by the map, where none was kept": (
        broken("first-contact", action=Action.SOURCE_BITMAP),
        "new",
        2,
    ),
    "a resync of an Inconsistent copy by the map alone": (
        broken("inconsistent-target", action=Action.SOURCE_BITMAP),
        "in step",
        3,
    ),
    "equal, whatever is open": (broken("equal", fits=lambda it, other: it.current == other.current), "in step", 2),
    "nothing to do for two that started alone": (broken("both-started-alone", action=Action.NONE), "new", 4),
    "a new replica of an old volume is taken for its peer": (broken("needs-join", action=Action.NONE), "in step", 2),
    "a primary gives way": (broken("primary-behind", action=Action.SOURCE_BITMAP), "in step", 4),
    "whoever lost its memory is the source of a policy": (
        broken("policy-discard-zero-changes", fits=_without_memory),
        "in step",
        5,
    ),
    "the policy takes the side with changes": (
        broken("policy-discard-zero-changes", action=Action.TARGET_BITMAP),
        "in step",
        4,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_table_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, start, depth = FAULTS[fault]
    monkeypatch.setattr(generation, "TABLE", table)
    with pytest.raises(Broken):
        walk(STARTS[start], depth)

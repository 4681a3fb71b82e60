"""The handshake table over all combinations of standings; test_generation_lives.py has random lives that act on it."""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest

from mirror.core import generation
from mirror.core.generation import (
    DAY0,
    NO_VOLUME,
    POLICY_RULES,
    TABLE,
    Action,
    Generations,
    Kind,
    Outcome,
    Row,
    Standing,
    covered,
    decide,
    full_source,
    full_target,
    in_step,
    mirror,
    moved_on,
    shared_ground,
    untracked,
    with_history,
)
from mirror.core.limits import HISTORY_MAX
from mirror.core.policy import ALLOWED, Policies, Policy
from mirror.core.states import DiskState, Role

SOURCES = (Action.SOURCE_BITMAP, Action.SOURCE_FULL)
TARGETS = (Action.TARGET_BITMAP, Action.TARGET_FULL)
APART = (Action.WAIT, Action.REFUSE, Action.SPLIT_BRAIN)
VOLUME = b"v" * 16


IN_STEP = Generations(7, 0, ())


def standing(replica: str, generations: Generations = IN_STEP, **changes: object) -> Standing:
    """An established secondary in good order."""
    plain = Standing(
        replica_id=replica.encode().ljust(16, b"\0"),
        volume_id=VOLUME,
        name="vol",
        size_bytes=1 << 20,
        next_size_bytes=0,
        kind=Kind.ESTABLISHED,
        role=Role.SECONDARY,
        disk=DiskState.CONSISTENT,
        current=generations.current,
        base=generations.base,
        history=generations.history,
        crashed_primary=False,
        kept_memory=True,
        dirty_blocks=0,
        met_peer=True,
        discard_my_data=False,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


# -- generations ------------------------------------------------------------------------------------------------------


def test_moving_on_keeps_the_base_and_covers_all_since() -> None:
    known = moved_on(Generations(5, 0, (4,)), 6)
    assert known == (6, 5, (5, 4))
    known = moved_on(known, 7)
    assert known == (7, 5, (6, 5, 4))
    assert covered(known) == {6, 5}
    assert in_step(known) == (7, 0, (6, 5, 4))


def test_a_full_source_covers_its_target_alone() -> None:
    known = full_source(Generations(6, 5, (5, 4)), 100, 7)
    assert known == (7, 100, (100, 6, 5, 4))
    assert covered(known) == {100}
    # Whoever finished that resync may be at a later generation of ours.
    assert covered(moved_on(known, 8)) == {7, 100}
    assert full_target(100) == (100, 0, ())


def test_who_kept_no_map_covers_nobody() -> None:
    assert untracked(Generations(6, 5, (5,)), 9) == (9, 0, (6, 5))
    assert not covered(untracked(Generations(6, 5, (5,)), 9))


def test_a_long_history_forgets_its_oldest_but_never_the_base() -> None:
    known = Generations(100, 0, (99, 98))
    for new in range(101, 101 + 3 * HISTORY_MAX):
        known = moved_on(known, new)
        assert known.base == 100
        assert known.base in known.history
        assert len(known.history) <= HISTORY_MAX
        assert known.history[0] == new - 1
        assert covered(known) <= set(range(100, new))
    assert with_history(3, (2, 3, 1)) == (3, 2, 1)
    assert with_history(0, (2, 1)) == (2, 1)


# -- the table over all combinations ----------------------------------------------------------------------------------

# Pairs of generations as lives lead to them: (name, one, other).
PAIRS = {
    "equal": (Generations(7, 0, (6,)), Generations(7, 0, (6,))),
    "equal, source forgot the end": (Generations(7, 6, (6,)), Generations(7, 0, (6,))),
    "behind": (Generations(8, 7, (7, 6)), Generations(7, 0, (6,))),
    "behind, later than the base": (Generations(9, 7, (8, 7)), Generations(8, 0, (7,))),
    "behind, with a base of its own": (Generations(9, 8, (8, 7)), Generations(8, 7, (7,))),
    "far behind": (Generations(9, 8, (8, 7)), Generations(7, 0, ())),
    "behind a full source": (Generations(9, 100, (100, 8, 7)), Generations(8, 0, (7,))),
    "target of a full source": (Generations(9, 100, (100, 8, 7)), Generations(100, 0, ())),
    "both moved on": (Generations(8, 7, (7,)), Generations(9, 7, (7,))),
    "both moved on, after different syncs": (Generations(9, 7, (8, 7)), Generations(10, 8, (8, 7))),
    "both moved on, one without a map": (Generations(8, 0, (7,)), Generations(9, 7, (7,))),
    "each remembers the other": (Generations(8, 0, (7,)), Generations(7, 0, (8,))),
    "strangers": (Generations(8, 7, (7,)), Generations(20, 19, (19,))),
}
LIVE_DISKS = (DiskState.UP_TO_DATE, DiskState.CONSISTENT, DiskState.OUTDATED, DiskState.INCONSISTENT)


def established_pairs() -> Iterator[tuple[Standing, Standing]]:
    """Every reachable pair of one volume that met, but for what the other tests look at."""
    sides = list(itertools.product(LIVE_DISKS, Role, (False, True), (False, True), (0, 3), (False, True)))
    sides = [s for s in sides if not (s[1] is Role.PRIMARY and s[0] is not DiskState.UP_TO_DATE)]
    yield from with_policies()
    made: dict[tuple[str, Generations], list[Standing]] = {}
    for pair in PAIRS.values():
        for replica, generations in zip("ab", pair, strict=True):
            made[replica, generations] = [
                standing(
                    replica,
                    generations,
                    disk=disk,
                    role=role,
                    crashed_primary=crashed,
                    kept_memory=kept,
                    dirty_blocks=dirty,
                    discard_my_data=discard,
                )
                for disk, role, crashed, kept, dirty, discard in sides
            ]
    for one, other in PAIRS.values():
        yield from itertools.product(made["a", one], made["b", other])


# The choices of policies that differ in a table: what is set for other numbers of primaries is not looked at.
POLICIES = [Policies(*chosen) for chosen in itertools.product(*ALLOWED.values())]


def with_policies() -> Iterator[tuple[Standing, Standing]]:
    """Every pair of policies on either side, over all that these look at."""
    sides = list(itertools.product(Role, (0, 2, 3), (False, True)))
    for one, other in PAIRS.values():
        for mine, theirs in itertools.product(sides, repeat=2):
            pair = [
                standing(
                    replica, generations, disk=DiskState.UP_TO_DATE, role=role, dirty_blocks=dirty, discard_my_data=word
                )
                for replica, generations, (role, dirty, word) in (("a", one, mine), ("b", other, theirs))
            ]
            for policies in itertools.product(POLICIES, repeat=2):
                a, b = (dataclasses.replace(side, policies=own) for side, own in zip(pair, policies, strict=True))
                yield a, b


def check_pair(one: Standing, other: Standing) -> Outcome:
    """What must hold for any two standings."""
    mine, theirs = decide(one, other), decide(other, one)
    assert mine.rule == theirs.rule
    assert mine.action is mirror(theirs.action)
    if mine.action in SOURCES:
        source, target = one, other
    elif mine.action in TARGETS:
        source, target = other, one
    else:
        return mine
    assert source.disk not in (DiskState.INCONSISTENT, DiskState.FAILED), mine
    assert source.kind is not Kind.JOINING, mine
    assert target.disk is not DiskState.FAILED, mine
    assert target.role is Role.SECONDARY, mine
    return mine


def test_every_pair_decides_alike_on_both_sides_and_never_from_a_bad_source() -> None:
    seen = set()
    for one, other in established_pairs():
        outcome = check_pair(one, other)
        seen.add(outcome.rule)
        in_danger = DiskState.INCONSISTENT not in (one.disk, other.disk)
        moved = (one.current not in (other.current, *other.history), other.current not in (one.current, *one.history))
        if in_danger and outcome.action not in APART and all(moved):
            target = other if outcome.action in SOURCES else one
            by_word = target.discard_my_data and outcome.rule in ("discard-bitmap", "discard-full")
            primaries = sum(side.role is Role.PRIMARY for side in (one, other))
            named = one.policies[primaries] is other.policies[primaries] is not Policy.REFUSE
            by_policy = named and outcome.rule.startswith(POLICY_RULES)
            assert by_word or by_policy, f"{outcome.rule} threw away a side that moved on"
            if outcome.rule == "policy-discard-zero-changes":
                assert not target.dirty_blocks
        if outcome.action is Action.NONE:
            assert one.current == other.current
            assert not one.dirty_blocks
            assert not other.dirty_blocks
    assert len(seen) > 15


def newcomers() -> list[tuple[str, dict[str, object], Generations]]:
    """Kinds of replicas at a first contact: (name, changes, generations)."""
    fresh = {"kind": Kind.FRESH, "volume_id": NO_VOLUME, "met_peer": False, "disk": DiskState.UP_TO_DATE}
    alone = {"volume_id": b"w" * 16, "met_peer": False, "disk": DiskState.UP_TO_DATE}
    void = {"disk": DiskState.INCONSISTENT}
    return [
        ("fresh", fresh, Generations(DAY0, 0, ())),
        ("fresh void", fresh | void, Generations(50, 0, ())),
        ("backing", fresh | {"kind": Kind.BACKING}, Generations(51, 0, ())),
        ("joining", fresh | void | {"kind": Kind.JOINING}, Generations(0, 0, ())),
        ("joining elsewhere", fresh | void | {"kind": Kind.JOINING, "volume_id": b"x" * 16}, Generations(0, 0, ())),
        ("alone", alone, Generations(60, DAY0, (DAY0,))),
        ("alone primary", alone | {"role": Role.PRIMARY}, Generations(60, DAY0, (DAY0,))),
        ("alone unwritten", alone, Generations(DAY0, 0, ())),
        ("alone void", alone | void, Generations(62, 0, ())),
        ("alone untracked", alone, Generations(63, 0, (DAY0,))),
        ("first target, source forgot", alone | void | {"volume_id": VOLUME}, Generations(DAY0, 0, ())),
        ("in a pair", {"volume_id": VOLUME}, Generations(64, DAY0, (DAY0,))),
        ("outdated", {"volume_id": VOLUME, "disk": DiskState.OUTDATED}, Generations(64, 0, (DAY0,))),
        ("inconsistent", {"volume_id": VOLUME} | void, Generations(64, 0, (DAY0,))),
    ]


FIRST_CONTACTS = {
    ("fresh", "fresh"): ("adopt-fresh", Action.NONE),
    ("fresh", "fresh void"): ("join", Action.SOURCE_FULL),
    ("fresh", "backing"): ("backing-undecided", Action.WAIT),
    ("backing", "backing"): ("backing-undecided", Action.WAIT),
    ("fresh", "joining"): ("join", Action.SOURCE_FULL),
    ("backing", "joining"): ("join", Action.SOURCE_FULL),
    ("joining", "joining"): ("both-joining", Action.REFUSE),
    ("in a pair", "joining"): ("join", Action.SOURCE_FULL),
    ("in a pair", "joining elsewhere"): ("join-unrelated", Action.REFUSE),
    ("inconsistent", "joining"): ("no-good-source", Action.REFUSE),
    ("outdated", "joining"): ("outdated-source", Action.WAIT),
    ("outdated", "inconsistent"): ("outdated-source", Action.WAIT),
    ("alone", "fresh"): ("first-contact", Action.SOURCE_BITMAP),
    ("alone primary", "fresh"): ("first-contact", Action.SOURCE_BITMAP),
    ("alone untracked", "fresh"): ("first-contact", Action.SOURCE_FULL),
    ("alone unwritten", "fresh"): ("first-contact", Action.SOURCE_FULL),
    ("alone", "backing"): ("backing-first", Action.SOURCE_FULL),
    ("alone", "joining"): ("join", Action.SOURCE_FULL),
    ("alone void", "joining"): ("no-good-source", Action.REFUSE),
    ("alone void", "fresh"): ("join", Action.TARGET_FULL),
    ("alone void", "alone"): ("inconsistent-target", Action.TARGET_FULL),
    ("first target, source forgot", "backing"): ("join", Action.TARGET_FULL),
    ("alone", "alone primary"): ("both-started-alone", Action.SPLIT_BRAIN),
    ("alone primary", "alone primary"): ("both-primary", Action.SPLIT_BRAIN),
    ("in a pair", "fresh"): ("needs-join", Action.REFUSE),
    ("in a pair", "backing"): ("needs-join", Action.REFUSE),
    ("inconsistent", "fresh"): ("needs-join", Action.REFUSE),
    ("in a pair", "alone"): ("unrelated", Action.REFUSE),
}


def test_first_contacts() -> None:
    made = {}
    for name, changes, generations in newcomers():
        for replica in "ab":
            made[name, replica] = standing(replica, generations, **changes)
    # Two that started alone are of two volumes.
    for name in ("alone", "alone primary", "alone unwritten", "alone untracked", "alone void"):
        made[name, "b"] = dataclasses.replace(made[name, "b"], volume_id=b"z" * 16)
    for (one, other), (rule, action) in FIRST_CONTACTS.items():
        for first, second in (("a", "b"), ("b", "a")):
            outcome = check_pair(made[one, first], made[other, second])
            assert (outcome.rule, outcome.action) == (rule, action), (one, other)
    for one, other in itertools.product(newcomers(), repeat=2):
        outcome = check_pair(made[one[0], "a"], made[other[0], "b"])
        assert outcome.rule != "bad-primary"
        if "void" not in one[0] + other[0] and "alone" in one[0] and "alone" in other[0]:
            assert outcome.action is Action.SPLIT_BRAIN


def test_two_that_started_alone_need_the_operators_word_and_all_blocks() -> None:
    one = standing("a", Generations(60, DAY0, (DAY0,)), volume_id=b"x" * 16, met_peer=False)
    other = standing("b", Generations(DAY0, 0, ()), volume_id=b"y" * 16, met_peer=False)
    assert decide(one, other).rule == "both-started-alone"
    outcome = decide(one, dataclasses.replace(other, discard_my_data=True))
    assert (outcome.rule, outcome.action) == ("discard-full", Action.SOURCE_FULL)


def test_an_interrupted_first_contact_goes_on_as_one_volume() -> None:
    one = standing("a", Generations(60, DAY0, (DAY0,)), met_peer=False, disk=DiskState.UP_TO_DATE)
    other = standing("b", Generations(DAY0, 0, ()), met_peer=False, disk=DiskState.INCONSISTENT)
    assert check_pair(one, other).action is Action.SOURCE_BITMAP
    # Both recorded the volume, neither recorded that they met.
    one = standing("a", Generations(DAY0, 0, ()), met_peer=False)
    other = standing("b", Generations(DAY0, 0, ()), met_peer=False)
    assert check_pair(one, other).rule == "equal"


ZERO: dict[str, object] = {"policies": Policies(Policy.DISCARD_ZERO_CHANGES, Policy.DISCARD_ZERO_CHANGES)}
LEAST: dict[str, object] = {"policies": Policies(no_primary=Policy.DISCARD_LEAST_CHANGES)}
SECOND: dict[str, object] = {"policies": Policies(one_primary=Policy.DISCARD_SECONDARY)}

CASES = [
    # rule, action of a, generations, changes of a, changes of b
    ("same-replica", Action.REFUSE, "equal", {}, {"replica_id": b"a".ljust(16, b"\0")}),
    ("name-differs", Action.REFUSE, "equal", {"name": "x"}, {}),
    ("size-differs", Action.REFUSE, "equal", {"size_bytes": 4096}, {}),
    ("failed-disk", Action.REFUSE, "behind", {}, {"disk": DiskState.FAILED}),
    ("bad-primary", Action.REFUSE, "behind", {}, {"disk": DiskState.INCONSISTENT, "role": Role.PRIMARY}),
    ("both-primary", Action.SPLIT_BRAIN, "behind", {"role": Role.PRIMARY}, {"role": Role.PRIMARY}),
    ("no-good-source", Action.REFUSE, "equal", {"disk": DiskState.INCONSISTENT}, {"disk": DiskState.INCONSISTENT}),
    ("inconsistent-target", Action.SOURCE_BITMAP, "behind", {}, {"disk": DiskState.INCONSISTENT}),
    ("inconsistent-target", Action.SOURCE_BITMAP, "equal", {}, {"disk": DiskState.INCONSISTENT}),
    ("inconsistent-target", Action.SOURCE_FULL, "far behind", {}, {"disk": DiskState.INCONSISTENT}),
    ("inconsistent-target", Action.SOURCE_FULL, "behind a full source", {}, {"disk": DiskState.INCONSISTENT}),
    ("inconsistent-target", Action.SOURCE_BITMAP, "target of a full source", {}, {"disk": DiskState.INCONSISTENT}),
    # A discarded side goes on as target without being told again.
    ("inconsistent-target", Action.TARGET_BITMAP, "both moved on", {"disk": DiskState.INCONSISTENT}, {}),
    ("equal-outdated", Action.TARGET_BITMAP, "equal", {"disk": DiskState.OUTDATED}, {}),
    ("equal", Action.NONE, "equal", {}, {"kept_memory": False}),
    ("equal-primary", Action.TARGET_BITMAP, "equal", {}, {"role": Role.PRIMARY, "dirty_blocks": 1}),
    ("equal-primary", Action.TARGET_BITMAP, "equal", {"dirty_blocks": 1}, {"role": Role.PRIMARY}),
    ("equal-memory", Action.TARGET_BITMAP, "equal", {"kept_memory": False, "crashed_primary": True}, {}),
    ("equal-crashed", Action.TARGET_BITMAP, "equal", {"dirty_blocks": 2}, {"crashed_primary": True}),
    ("equal-dirty", Action.TARGET_BITMAP, "equal", {}, {"dirty_blocks": 2}),
    ("equal-tie", Action.SOURCE_BITMAP, "equal", {"dirty_blocks": 1}, {"dirty_blocks": 2}),
    ("behind", Action.SOURCE_BITMAP, "behind", {"role": Role.PRIMARY}, {"crashed_primary": True}),
    ("behind", Action.SOURCE_BITMAP, "behind, later than the base", {}, {}),
    ("behind", Action.SOURCE_BITMAP, "behind, with a base of its own", {}, {"dirty_blocks": 5}),
    ("far-behind", Action.SOURCE_FULL, "far behind", {}, {}),
    ("far-behind", Action.SOURCE_FULL, "behind a full source", {}, {}),
    # The operator's word is not needed here, and does not turn it round.
    ("behind", Action.SOURCE_BITMAP, "behind", {"discard_my_data": True}, {}),
    ("primary-behind", Action.SPLIT_BRAIN, "behind", {}, {"role": Role.PRIMARY}),
    ("discard-bitmap", Action.TARGET_BITMAP, "behind", {"discard_my_data": True}, {"role": Role.PRIMARY}),
    ("split-brain", Action.SPLIT_BRAIN, "both moved on", {}, {"role": Role.PRIMARY}),
    ("split-brain", Action.SPLIT_BRAIN, "both moved on", {"met_peer": False}, {"met_peer": False}),
    ("split-brain", Action.SPLIT_BRAIN, "each remembers the other", {}, {}),
    ("discard-bitmap", Action.TARGET_BITMAP, "both moved on", {"discard_my_data": True}, {}),
    ("discard-bitmap", Action.SOURCE_BITMAP, "both moved on, after different syncs", {}, {"discard_my_data": True}),
    ("discard-full", Action.SOURCE_FULL, "both moved on, one without a map", {}, {"discard_my_data": True}),
    ("discard-both", Action.REFUSE, "both moved on", {"discard_my_data": True}, {"discard_my_data": True}),
    ("discard-on-primary", Action.REFUSE, "both moved on", {"discard_my_data": True, "role": Role.PRIMARY}, {}),
    ("unrelated-histories", Action.REFUSE, "strangers", {}, {}),
    ("policy-discard-zero-changes", Action.SOURCE_BITMAP, "both moved on", ZERO | {"dirty_blocks": 3}, ZERO),
    ("policy-discard-zero-changes", Action.TARGET_BITMAP, "both moved on", ZERO, ZERO | {"dirty_blocks": 3}),
    ("policy-discard-zero-changes", Action.SOURCE_BITMAP, "both moved on", ZERO, ZERO),
    ("policy-discard-zero-changes", Action.SOURCE_BITMAP, "both moved on", ZERO | {"role": Role.PRIMARY}, ZERO),
    # Who forgot what both had acknowledged is no source, though the other one changed nothing since.
    (
        "split-brain",
        Action.SPLIT_BRAIN,
        "both moved on",
        ZERO | {"dirty_blocks": 3, "kept_memory": False},
        ZERO,
    ),
    # Never a primary, and never where the maps do not tell all.
    ("split-brain", Action.SPLIT_BRAIN, "both moved on", ZERO | {"dirty_blocks": 3}, ZERO | {"role": Role.PRIMARY}),
    ("split-brain", Action.SPLIT_BRAIN, "both moved on, one without a map", ZERO | {"dirty_blocks": 3}, ZERO),
    ("split-brain", Action.SPLIT_BRAIN, "both moved on", ZERO | {"dirty_blocks": 3}, ZERO | {"dirty_blocks": 2}),
    ("policy-discard-least-changes", Action.SOURCE_BITMAP, "both moved on", LEAST | {"dirty_blocks": 3}, LEAST),
    (
        "policy-discard-least-changes",
        Action.TARGET_BITMAP,
        "both moved on",
        LEAST | {"dirty_blocks": 1},
        LEAST | {"dirty_blocks": 3},
    ),
    ("split-brain", Action.SPLIT_BRAIN, "both moved on", LEAST | {"dirty_blocks": 2}, LEAST | {"dirty_blocks": 2}),
    ("policy-discard-secondary", Action.TARGET_BITMAP, "both moved on", SECOND, SECOND | {"role": Role.PRIMARY}),
    ("split-brain", Action.SPLIT_BRAIN, "both moved on", SECOND, SECOND),
    ("primary-behind", Action.SPLIT_BRAIN, "behind", SECOND, SECOND | {"role": Role.PRIMARY}),
    ("both-primary", Action.SPLIT_BRAIN, "both moved on", SECOND | {"role": Role.PRIMARY}, {"role": Role.PRIMARY}),
    ("policies-differ", Action.SPLIT_BRAIN, "both moved on", ZERO | {"dirty_blocks": 3}, {}),
    ("policies-differ", Action.SPLIT_BRAIN, "both moved on", ZERO, LEAST),
    # The operator's word comes before any policy, and a policy for another number of primaries is not looked at.
    (
        "discard-bitmap",
        Action.TARGET_BITMAP,
        "both moved on",
        ZERO | {"discard_my_data": True, "dirty_blocks": 3},
        ZERO,
    ),
    ("split-brain", Action.SPLIT_BRAIN, "both moved on", SECOND, {}),
    ("behind", Action.SOURCE_BITMAP, "behind", LEAST, ZERO | {"dirty_blocks": 9}),
    ("discard-full", Action.SOURCE_FULL, "strangers", {}, {"discard_my_data": True}),
]


@pytest.mark.parametrize(("rule", "action", "pair", "one", "other"), CASES)
def test_each_story_finds_its_row(
    rule: str, action: Action, pair: str, one: dict[str, object], other: dict[str, object]
) -> None:
    generations = PAIRS[pair]
    a = standing("a", generations[0], disk=DiskState.UP_TO_DATE)
    b = standing("b", generations[1], disk=DiskState.UP_TO_DATE)
    outcome = check_pair(dataclasses.replace(a, **one), dataclasses.replace(b, **other))  # type: ignore[arg-type]
    assert (outcome.rule, outcome.action) == (rule, action)


def test_every_row_is_reached_and_says_what_to_do() -> None:
    reached = {case[0] for case in CASES} | {rule for rule, _ in FIRST_CONTACTS.values()}
    assert reached == {row.rule for row in TABLE}
    assert len({row.rule for row in TABLE}) == len(TABLE)
    for row in TABLE:
        assert row.story.endswith(".")
        if row.action in APART:
            assert row.remedy, row.rule


def test_a_row_that_fits_both_ways_round_is_still_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("either", "Any two.", lambda _it, _other: True, Action.SOURCE_FULL, "{it} is the source")
    monkeypatch.setattr(generation, "TABLE", (row,))
    outcome = check_pair(standing("a"), standing("b"))
    assert (outcome.action, outcome.reason) == (Action.SOURCE_FULL, "this replica is the source")


def test_reasons_speak_from_the_side_that_reads_them() -> None:
    ahead = standing("a", PAIRS["behind"][0])
    behind = standing("b", PAIRS["behind"][1])
    assert decide(ahead, behind).reason == "this replica moved on alone, the peer did not"
    assert decide(behind, ahead).reason == "the peer moved on alone, this replica did not"
    differs = decide(ahead, dataclasses.replace(behind, size_bytes=4096))
    assert "1048576" in differs.reason
    assert "4096" in differs.reason


def test_shared_ground_wants_a_map_that_reaches_back() -> None:
    for name, (one, other) in PAIRS.items():
        expected = name not in (
            "far behind",
            "behind a full source",
            "both moved on, one without a map",
            "each remembers the other",
            "strangers",
        )
        assert shared_ground(one, other) is shared_ground(other, one) is expected, name
    assert not shared_ground(Generations(0, 0, ()), Generations(0, 0, ()))

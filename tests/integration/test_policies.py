"""What volume.toml says about a split brain: by the number of primaries when the replicas meet again."""

import random
from dataclasses import dataclass

import pytest

from tests.integration.cluster import PEER_LOST, Cluster, Replica, assert_equal_copies, different_blocks, write

MIB = 1 << 20
SPLIT = PEER_LOST + "|split.brain|discard|promot|primary|outdated|policy"


def part(cluster: Cluster, rng: random.Random, a_mib: int, b_mib: int, **policies: str) -> tuple[Replica, Replica]:
    """Both primary and apart, each with a history of its own and so many MiB changed: a at 0, b at 2 MiB."""
    a, b = cluster.pair(**policies)
    for replica in (a, b):
        replica.allow(SPLIT)
    a.command("disconnect")
    b.wait_status(disk="Outdated")
    # A start as primary begins a history of its own, also where nothing is written.
    a.demote()
    a.promote()
    b.promote("--force")
    for replica, count, offset in ((a, a_mib, 0), (b, b_mib, 2 * MIB)):
        if count:
            write(replica, rng.randbytes(count * MIB), offset)
    return a, b


def meet(a: Replica, b: Replica, *primaries: Replica) -> None:
    """End what keeps them apart, with these as primaries."""
    for replica in (a, b):
        if replica not in primaries:
            replica.demote()
    a.command("connect", check=False)


@dataclass(frozen=True)
class Case:
    """Who is primary when they meet, how many MiB each changed, what is configured, and who must win by which rule."""

    primary: str
    a_mib: int
    b_mib: int
    policies: dict[str, str]
    rule: str
    winner: str = ""


ZERO = {"split_brain_no_primary": "discard-zero-changes", "split_brain_one_primary": "discard-zero-changes"}
LEAST = {"split_brain_no_primary": "discard-least-changes"}
SECONDARY = {"split_brain_one_primary": "discard-secondary"}

CASES = [
    Case("", 0, 1, {}, "split-brain"),
    Case("", 0, 1, ZERO, "policy-discard-zero-changes", "b"),
    Case("", 1, 2, ZERO, "split-brain"),
    Case("", 1, 2, LEAST, "policy-discard-least-changes", "b"),
    Case("", 1, 1, LEAST, "split-brain"),
    Case("", 1, 2, SECONDARY, "split-brain"),
    Case("a", 1, 0, ZERO, "policy-discard-zero-changes", "a"),
    Case("a", 0, 1, ZERO, "split-brain"),
    Case("a", 1, 2, LEAST, "split-brain"),
    Case("a", 1, 2, SECONDARY, "policy-discard-secondary", "a"),
    Case("ab", 1, 0, ZERO | SECONDARY, "both-primary"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.primary or 'nobody'}-{case.rule}-{case.winner}")
def test_policy(cluster: Cluster, rng: random.Random, case: Case) -> None:
    a, b = part(cluster, rng, case.a_mib, case.b_mib, **case.policies)
    names = {"a": a, "b": b}
    contents = {name: replica.data_path.read_bytes() for name, replica in names.items()}
    meet(a, b, *(names[name] for name in case.primary))
    for replica in (a, b):
        replica.wait_status(plan=lambda plan: plan is not None and plan["rule"] == case.rule)
    if not case.winner:
        for replica in (a, b):
            replica.wait_log("split.brain")
        assert {name: replica.data_path.read_bytes() for name, replica in names.items()} == contents
        return
    for replica in (a, b):
        replica.wait_in_step()
        assert any(case.rule in line and "WARNING" in line for line in replica.log().splitlines()), "said loudly"
        assert replica.status()["last_resync"]["rule"] == case.rule, "and kept"
    assert_equal_copies(a, b)
    assert a.data_path.read_bytes() == contents[case.winner]
    assert names["b" if case.winner == "a" else "a"].status()["role"] == "secondary"


def test_policies_that_differ_resolve_nothing_and_are_told_before(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.created_pair()
    for replica in (a, b):
        replica.allow(SPLIT)
    b.configure(**ZERO)
    b.serve()
    a.serve("--primary")
    for replica in (a, b):
        replica.wait_in_step()
        assert any("split_brain_" in warning for warning in replica.status()["warnings"]), "told while all is well"
    a.command("disconnect")
    b.wait_status(disk="Outdated")
    write(a, rng.randbytes(MIB), 0)
    b.promote("--force")
    meet(a, b)
    for replica in (a, b):
        replica.wait_status(plan=lambda plan: plan["rule"] == "policies-differ")
        replica.wait_log("policies-differ.*split_brain_")
    assert different_blocks(a.data_path, b.data_path)

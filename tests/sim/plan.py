"""What a seed makes happen: the operations of the client and the events of one life, drawn before anything runs."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.sim import small  # isort: skip  the limits come before the product

from mirror.core.limits import EXTENT_BYTES
from tests.sim.disk import SECTOR_BYTES

assert small.SMALL
NAMES = ("n0", "n1")
EXTENTS = 10
SIZE_BYTES = EXTENTS * EXTENT_BYTES
SECTORS = SIZE_BYTES // SECTOR_BYTES
# The client comes back to a few places, so that operations overlap and blocks are written again.
PLACES_PER_LIFE = 8


@dataclass(frozen=True)
class ClientOperation:
    kind: str
    first: int = 0
    count: int = 0
    fua: bool = False
    delay_s: float = 0.0


@dataclass(frozen=True)
class Event:
    at_s: float
    kind: str
    machine: str
    number: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.machine} {self.number:.3g}"


@dataclass(frozen=True)
class Plan:
    """Everything that is drawn before the life begins."""

    seed: int
    protocol: str
    log_slots: int
    preempt: float
    workers: int
    operations: tuple[ClientOperation, ...]
    events: tuple[Event, ...]
    join_at_start: bool
    # Names of the split-brain policies with none and with one primary.
    policies: tuple[str, str]
    # The volume chooses the size of its log.
    log_by_goal: bool


# The first one is the default.
POLICIES = (
    ("refuse", "refuse"),
    ("discard-zero-changes", "discard-zero-changes"),
    ("discard-least-changes", "discard-secondary"),
)

# What can happen, and how often beside the others.
EVENTS = {
    "kill": 5, "kill-nbdkit": 5, "power": 6, "power-both": 2, "stop": 2, "pause": 3,
    "cut": 6, "cut-one-way": 3, "heal": 6, "drop": 6, "corrupt": 3, "stall": 4, "stray": 1, "reset": 3, "slow-link": 1,
    "fail-flush": 1, "fail-write": 1, "fail-read": 1, "full": 1, "stall-disk": 2, "slow-disk": 1, "stick-write": 2,
    "promote": 4, "force-promote": 2, "demote": 3, "switch": 4, "disconnect": 2, "connect": 3, "replace": 1,
    "flip": 1, "verify": 1, "resize": 2, "log-size": 3, "strike-parked": 2,
    # Where it is asked for: much else can go wrong beside a flipped bit.
    "strike-suspect": 0,
    # What some planted faults need at one moment, which chance hardly brings about.
    "strike-source": 0, "strike-late": 0, "strike-flush": 0, "strike-settled": 0,
}  # fmt: skip


def draw_plan(seed: int, wanted: tuple[str, ...] = (), protocols: str = "CCCCCCBBAA", narrow: bool = False) -> Plan:
    """The life of this seed; at least every other event is one of those `wanted`, if any are.

    `narrow`: several threads of the client press on two places without a pause.
    """
    draw = random.Random(f"plan {seed}")
    places = [draw.randrange(SECTORS - 64) // 8 * 8 for _ in range(2 if narrow else PLACES_PER_LIFE)]
    count = 150 if narrow else draw.choice((40, 80, 120))
    operations = [_draw_operation(draw, places) for _ in range(count)]
    length_s = draw.choice((1.0,) if narrow else (1.5, 4.0, 8.0))
    eventful = draw.choice((4, 8, 12) if wanted else (1, 3, 6, 12))
    kinds = list(EVENTS)
    events = [
        Event(
            draw.uniform(0.05, length_s),
            draw.choice(wanted) if wanted and draw.random() < 0.8 else draw.choices(kinds, list(EVENTS.values()))[0],
            draw.choice(NAMES),
            draw.choice((0.01, 0.1, 0.5, 1.5, 4.0)) * draw.uniform(0.5, 1.0),
        )
        for _ in range(eventful)
    ]
    pace_s = length_s / len(operations)
    workers = draw.choice((3, 4) if narrow else (1, 2, 3, 4))
    plan = Plan(
        seed=seed,
        protocol=draw.choice(protocols),
        log_slots=draw.choice((3, 4, 8)),
        preempt=draw.choice((0.02, 0.1, 0.3)),
        workers=workers,
        operations=tuple(
            replace(one, delay_s=draw.expovariate(1 / pace_s) * workers * 0.8 if draw.random() < 0.7 else 0.0)
            for one in operations
        ),
        events=tuple(sorted(events, key=lambda event: event.at_s)),
        join_at_start=draw.random() < 0.1,
        policies=draw.choice(POLICIES) if draw.random() < 0.3 else POLICIES[0],
        log_by_goal=draw.random() < 0.3,
    )
    if draw.random() < 0.2:
        plan = replace(plan, operations=tuple(_with_commits(plan.operations)))
    return plan


def _with_commits(operations: tuple[ClientOperation, ...]) -> Iterator[ClientOperation]:
    """A client that flushes each of its writes at once."""
    for one in operations:
        yield one
        if one.kind == "write":
            yield ClientOperation("flush")


def _draw_operation(draw: random.Random, places: list[int]) -> ClientOperation:
    kind = draw.choices(("write", "read", "flush", "zero", "trim"), (10, 7, 3, 1, 1))[0]
    if kind == "flush":
        return ClientOperation(kind)
    first = draw.choice(places) + draw.choice((0, 0, 0, 8, 16, 3))
    count = draw.choice((8, 8, 8, 16, 32, 1, 5))
    if kind in ("zero", "trim") and draw.random() < 0.2:
        # Over several extents, more than fit into one piece.
        first, count = first // 8 * 8, draw.choice((128, 300, 400))
    count = min(count, SECTORS - first)
    return ClientOperation(kind, first, count, fua=kind != "read" and draw.random() < 0.15)

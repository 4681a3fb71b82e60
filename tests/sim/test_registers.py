"""One sector's checker beside a naive one that tries all orders, on random tiny histories, right and wrong."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.sim.history import History
from tests.sim.recording import Loss, Operation
from tests.sim.registers import Access, Survival, replay


@dataclass(eq=False)
class Tiny:
    """An operation of the naive checker."""

    writes: bool
    fua: bool
    call_time: int
    done_time: int | None


def orders(accesses: list[Access], start: int) -> Iterator[list[Access]]:
    """Every order of every choice of the open writes that respects time and gives each read what it read."""
    answered = [access for access in accesses if access.operation.done_time is not None]
    still_open = [access for access in accesses if access.operation.done_time is None and access.operation.writes]
    for size in range(len(still_open) + 1):
        for chosen in itertools.combinations(still_open, size):
            for order in itertools.permutations([*answered, *chosen]):
                if respects_time(order) and reads_right(order, start):
                    yield [access for access in order if access.operation.writes]


def respects_time(order: tuple[Access, ...]) -> bool:
    return not any(
        later.operation.done_time is not None and later.operation.done_time < earlier.operation.call_time
        for earlier, later in itertools.combinations(order, 2)
    )


def reads_right(order: tuple[Access, ...], value: int) -> bool:
    for access in order:
        if access.operation.writes:
            value = access.value
        elif access.value != value:
            return False
    return True


def naive_survivors(
    accesses: list[Access], starts: frozenset[int], older: frozenset[int], flush_time: int | None
) -> frozenset[int]:
    found: set[int] = set()
    for start in starts:
        for order in orders(accesses, start):
            kept = [start] if flush_time is not None else [start, *older, *starts]
            for access in order:
                done_time = access.operation.done_time
                covered = flush_time is not None and done_time is not None and done_time < flush_time
                if done_time is not None and (covered or access.operation.fua):
                    kept = []
                kept.append(access.value)
            found |= set(kept)
    return frozenset(found)


def tiny_history(rng: random.Random) -> list[Access]:
    """Mostly right: what reads give is drawn from what a simple volume held meanwhile, and now and then anything."""
    count = rng.randrange(1, 6)
    times = rng.sample(range(1, 30), 2 * count)
    if rng.random() < 0.3:
        times.sort()
    accesses = []
    tags = list(range(1, count + 1))
    for index in range(count):
        call_time, done_time = sorted(times[2 * index : 2 * index + 2])
        is_open = rng.random() < 0.25
        writes = rng.random() < 0.6
        value = rng.choice([0, tags[index], tags[index]]) if writes else rng.choice([0, *tags])
        accesses.append(Access(Tiny(writes, rng.random() < 0.2, call_time, None if is_open else done_time), value))
    rng.shuffle(accesses)
    return accesses


@pytest.mark.parametrize("seed", range(20))
def test_it_agrees_with_a_naive_checker(seed: int) -> None:
    rng = random.Random(seed)
    verdicts = set()
    for _ in range(60):
        accesses = tiny_history(rng)
        starts = frozenset(rng.sample([0, 1, 2, 9], rng.randrange(1, 3)))
        result = replay(starts, accesses)
        finals = {order[-1].value if order else start for start in starts for order in orders(accesses, start)}
        verdicts.add(bool(finals))
        assert bool(result.refused) == (not finals), accesses
        if finals:
            assert result.values == finals, accesses
            flush_time = rng.choice([None, rng.randrange(31)])
            older = frozenset({8, *starts})
            expected = naive_survivors(accesses, starts, older, flush_time)
            assert Survival(starts, lambda older=older: older, accesses, flush_time, 31).values() == expected, (
                accesses,
                flush_time,
            )
    assert verdicts == {False, True}


def cut(accesses: list[Access], until: int) -> list[Access]:
    """What was known by then."""
    known = []
    for access in accesses:
        operation = access.operation
        if operation.call_time <= until:
            done_time = operation.done_time if access.answered(until) else None
            known.append(Access(Tiny(operation.writes, operation.fua, operation.call_time, done_time), access.value))
    return known


def recorded(history: History, parent_until: int, loss: Loss, first: list[Access], second: list[Access]) -> None:
    """Two reigns of one sector, of which the second begins at 100."""
    events: list[tuple[int, int, bool, Access]] = []
    for number, accesses in enumerate((first, second)):
        for access in accesses:
            events.append((access.operation.call_time, number, False, access))
            if access.operation.done_time is not None:
                events.append((access.operation.done_time, number, True, access))
    reigns = [history.begin_reign(0, "a")]
    operations: dict[Access, Operation] = {}
    for time, number, is_answer, access in sorted(events, key=lambda event: event[0]):
        if time > 100 and len(reigns) == 1:
            reigns.append(history.begin_reign(100, "b", reigns[0], parent_until, loss))
        if is_answer:
            operations[access].answer(time, [access.value])
        else:
            kind = "write" if access.operation.writes else "read"
            operations[access] = reigns[number].call(time, kind, 0, 1, access.value, fua=access.operation.fua)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("loss", [Loss.NONE, Loss.UNFLUSHED])
def test_two_reigns_agree_with_the_naive_checker(seed: int, loss: Loss) -> None:
    rng = random.Random(seed)
    verdicts = set()
    for _ in range(80):
        first = tiny_history(rng)
        second = [
            Access(
                Tiny(
                    operation.writes,
                    operation.fua,
                    operation.call_time + 100,
                    operation.done_time and operation.done_time + 100,
                ),
                value if rng.random() < 0.5 else rng.choice(first).value,
            )
            for operation, value in tiny_history(rng)
        ]
        until = rng.choice([100, rng.randrange(30)])
        known = cut(first, until)
        finals = {order[-1].value if order else 0 for order in orders(known, 0)}
        if not finals or not list(orders(first, 0)):
            continue
        starts = finals if loss is Loss.NONE else naive_survivors(known, frozenset({0}), frozenset({0}), None)
        expected = {order[-1].value if order else start for start in starts for order in orders(second, start)}
        history = History(1)
        recorded(history, until, loss, first, second)
        if len(history.reigns) == 2:
            verdicts.add(bool(expected))
            assert bool(history.check()) == (not expected)
            if expected:
                assert history.allowed(history.reigns[1], 0) == expected
    assert verdicts == {False, True}

"""Make a failing life small: fewer events, fewer operations, and still the same invariant broken."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tests.sim.life import Life, Result
from tests.sim.plan import Plan

# Lives that a shrinking may cost: about a minute.
ATTEMPTS_MAX = 400


def shrink(result: Result, tried: Callable[[int], None] = lambda attempts: None) -> Result:
    """The smallest life found that breaks the same invariant."""
    best = result
    attempts = 0
    progress = True
    while progress and attempts < ATTEMPTS_MAX:
        progress = False
        for name in ("events", "operations"):
            size = max(1, len(getattr(best.plan, name)) // 2)
            while size and attempts < ATTEMPTS_MAX:
                index = 0
                while index < len(getattr(best.plan, name)) and attempts < ATTEMPTS_MAX:
                    attempts += 1
                    tried(attempts)
                    smaller = Life(_without(best.plan, name, index, size)).run()
                    if _same(smaller, result):
                        best, progress = smaller, True
                    else:
                        index += size
                size //= 2
    return best


def _without(plan: Plan, name: str, index: int, size: int) -> Plan:
    items: Sequence[Any] = getattr(plan, name)
    return replace(plan, **{name: (*items[:index], *items[index + size :])})


def _same(one: Result, other: Result) -> bool:
    return bool(one.violations) and one.violations[0][0] == other.violations[0][0]

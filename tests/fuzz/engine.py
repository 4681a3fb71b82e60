"""Runs inputs through a target: counts its steps, measures its memory, and says how to play a failure again.

python -m tests.fuzz.engine superblock 4 1234      play input 1234 of seed 4 again, and show it
"""

import gc
import os
import random
import sys
import tracemalloc
from collections.abc import Iterable
from types import FrameType
from typing import Any

from tests.fuzz.targets import TARGETS, Target

# The same inputs in every run, unless somebody wants others.
SEED = int(os.environ.get("NBDMIRROR_FUZZ_SEED") or 4)
# Counting lines is slow, so it is done for one input in so many.
COUNTED_EVERY = 16


class Failed(AssertionError):
    """An input that did what none may do."""


def input_of(target: Target, seed: int, number: int) -> bytes:
    return target.make(random.Random(f"{target.name} {seed} {number}"))


def run(target: Target, numbers: Iterable[int], seed: int = SEED) -> int:
    """Check these inputs; returns how many. Raises Failed."""
    count = 0
    # What is made once and kept is nobody's cost.
    target.check(input_of(target, seed, 0))
    tracemalloc.start()
    try:
        for number in numbers:
            raw = input_of(target, seed, number)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                if number % COUNTED_EVERY:
                    target.check(raw)
                else:
                    counted(target, raw)
            except Exception as error:  # the outermost call of an input: whatever it raised is news
                raise Failed(story(target, seed, number, raw)) from error
            taken = tracemalloc.get_traced_memory()[1] - before
            if number % COUNTED_EVERY and taken > target.memory_bytes:
                raise Failed(f"{taken} bytes, more than {target.memory_bytes}; {story(target, seed, number, raw)}")
            count += 1
    finally:
        tracemalloc.stop()
        gc.collect()
    return count


def counted(target: Target, raw: bytes) -> None:
    """Check one input, and fail when it runs more lines of Python than it may: it would never end, or too late."""
    steps = 0

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > target.steps:
            raise Failed(f"more than {target.steps} steps")
        return step

    former = sys.gettrace()
    sys.settrace(step)
    try:
        target.check(raw)
    finally:
        sys.settrace(former)


def story(target: Target, seed: int, number: int, raw: bytes) -> str:
    shown = raw.hex() if len(raw) <= 200 else f"{raw[:200].hex()}... ({len(raw)} bytes)"
    return f"play it again: .venv/bin/python -m tests.fuzz.engine {target.name} {seed} {number}\ninput: {shown}"


def main(name: str, seed: str, number: str) -> None:
    target = TARGETS[name]
    raw = input_of(target, int(seed), int(number))
    sys.stdout.write(f"{raw!r}\n")
    target.check(raw)
    counted(target, raw)
    sys.stdout.write("nothing wrong with it\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Mutated recorded bytes through every decoder: the same inputs in every run, a few thousand, or half a million."""

from typing import Any

import pytest

from tests.fuzz import engine
from tests.fuzz.mutation import mutate
from tests.fuzz.targets import TARGETS, Target

SHORT = 7
LONG = 1050

every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def test_there_are_as_many_inputs_as_is_said() -> None:
    shares = sum(target.share for target in TARGETS.values())
    assert SHORT * shares > 3000
    assert LONG * shares > 500_000


@every_target
def test_mutated_bytes(target: Target) -> None:
    engine.run(target, range(1, SHORT * target.share + 1))


@every_target
@pytest.mark.long
def test_very_many_mutated_bytes(target: Target) -> None:
    engine.run(target, range(1, LONG * target.share + 1))


# -- the fuzzer itself ------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_inputs() -> None:
    for target in TARGETS.values():
        inputs = [engine.input_of(target, 7, number) for number in range(20)]
        assert inputs == [engine.input_of(target, 7, number) for number in range(20)]
        assert len(set(inputs)) > 10


def broken(check: Any) -> Target:
    """A decoder with a fault."""
    return Target("superblock", lambda rng: mutate(rng, [b"recorded"] * 3), check, 1 << 20, 10_000, 1)


def crash(raw: bytes) -> None:
    if raw.endswith(b"\xff"):
        raise KeyError(raw)


def hoard(raw: bytes) -> None:
    if raw.endswith(b"\xff"):
        bytes(1 << 22)


def loop(raw: bytes) -> None:
    while raw.startswith(b"r"):
        pass


@pytest.mark.parametrize("check", [crash, hoard])
def test_a_decoder_that_crashes_or_hoards_is_found_and_told_how(check: Any) -> None:
    with pytest.raises(engine.Failed, match=r"tests\.fuzz\.engine superblock \d+ \d+"):
        engine.run(broken(check), range(1, 2000))


def test_a_decoder_that_loops_is_found_by_counting() -> None:
    with pytest.raises(engine.Failed, match="steps"):
        engine.counted(broken(loop), b"recorded")

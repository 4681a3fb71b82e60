"""The checker beside a volume that keeps its promises: nothing is accused, and a lie is found."""

import random

import pytest

from tests.sim.story import SECTORS, Life


@pytest.mark.parametrize("seed", range(10))
def test_honest_lives_are_not_accused(seed: int) -> None:
    life = Life(seed)
    assert not life.told
    assert not life.story.history.check()
    assert not life.story.history.check_contents(life.reign, life.contents, "disk")
    assert not life.story.history.check_stable(life.reign, [min(values) for values in life.kept], "disk")


def test_what_is_said_at_once_is_what_is_said_at_the_end() -> None:
    caught = 0
    for seed in range(20):
        life = Life(seed, lie=seed // 2)
        at_end = [(told.invariant, told.sectors) for told in life.story.history.check()]
        at_once = [(told.invariant, told.sectors) for told in life.told]
        # Where a lie was believed, later reads that tell the truth are refused too; `check` names the first only.
        assert set(at_end) <= set(at_once)
        assert bool(at_end) == bool(at_once)
        caught += bool(at_end)
    assert caught > 10


@pytest.mark.parametrize("seed", range(10))
def test_disks_are_judged_by_what_they_may_hold(seed: int) -> None:
    life = Life(seed)
    rng = random.Random(seed)
    history = life.story.history
    for reign in history.reigns:
        for _ in range(10):
            disk = dict(enumerate([rng.choice(history.operations[-20:]).tag for _ in range(SECTORS)]))
            wrong = {sector for told in history.check_stable(reign, disk, "disk") for sector in told.sectors}
            assert wrong == {sector for sector in disk if disk[sector] not in history.flushed(reign, sector)}
            wrong = {sector for told in history.check_contents(reign, disk, "disk") for sector in told.sectors}
            assert wrong == {sector for sector in disk if disk[sector] not in history.allowed(reign, sector)}

"""When spinning pays: on series of latencies as they were measured, quiet and beside busy loops."""

import random

import pytest

from mirror.core.limits import SPIN_US_MAX
from mirror.core.spin import Spin

# p50 and p99 in us of writes that spun and that slept: on a quiet machine, and beside two busy loops.
QUIET = {True: (43, 120), False: (105, 230)}
BUSY = {True: (52, 4100), False: (86, 1900)}


def live(spin: Spin, world: dict[bool, tuple[int, int]], writes: int, draw: random.Random) -> int:
    """So many writes that were alone, one after the other; how many of them spun."""
    spun = now_ns = 0
    for _ in range(writes):
        us = spin.wanted_us
        p50, p99 = world[us > 0]
        latency_us = p99 * draw.uniform(1.0, 1.3) if draw.random() < 0.013 else p50 * draw.uniform(0.85, 1.15)
        started_ns, now_ns = now_ns, now_ns + int(latency_us * 1000)
        spin.note(us > 0, started_ns, now_ns)
        spun += us > 0
    return spun


def test_it_spins_where_that_is_better_and_tries_sleeping_unseen() -> None:
    draw = random.Random(1)
    spin = Spin("auto")
    live(spin, QUIET, 1000, draw)
    writes = 100_000
    slept = writes - live(spin, QUIET, writes, draw)
    assert 0 < slept < writes / 100, "the trials must not reach the p99"


def test_beside_busy_loops_it_sleeps_and_comes_back_when_they_are_gone() -> None:
    draw = random.Random(2)
    spin = Spin("auto")
    live(spin, QUIET, 20_000, draw)
    live(spin, BUSY, 60_000, draw)
    assert live(spin, BUSY, 20_000, draw) < 1000, "the p99 of writes that spin is twice as bad"
    # Two seconds. A tail is known by hundreds of writes that spun, of which there are 32 in a thousand: trials twice as
    # often would take half as long, and are seen in the p99.9 beside busy loops.
    live(spin, QUIET, 20_000, draw)
    assert live(spin, QUIET, 20_000, draw) > 19_000


def test_where_neither_is_better_it_sleeps() -> None:
    draw = random.Random(3)
    spin = Spin("auto")
    same = {True: (5000, 9000), False: (5000, 9000)}
    slow = {True: (5100, 9000), False: (5000, 9000)}
    live(spin, slow, 10_000, draw)
    assert live(spin, slow, 20_000, draw) < 3000
    assert live(Spin("off"), same, 100, draw) == 0


def test_one_long_pause_of_the_machine_changes_nothing() -> None:
    draw = random.Random(4)
    spin = Spin("auto")
    live(spin, QUIET, 2000, draw)
    for _ in range(50):
        spin.note(spin.wanted_us > 0, 0, 20_000_000)
        assert live(spin, QUIET, 2000, draw) > 1900


@pytest.mark.parametrize("us", [1, 30, SPIN_US_MAX])
def test_a_number_is_taken_at_its_word(us: int) -> None:
    spin = Spin(us)
    for latency_ns in (10, 10**9) * 5000:
        assert spin.wanted_us == spin.peer_us == us
        spin.note(True, 10**12, 10**12 + latency_ns)


def test_the_peer_looks_for_the_next_write_only_where_it_mostly_comes_in_time() -> None:
    spin = Spin("auto")
    now_ns = 0

    def write_after(pause_us: int) -> None:
        nonlocal now_ns
        started_ns = now_ns + pause_us * 1000
        now_ns = started_ns + 50_000
        spin.note(spin.wanted_us > 0, started_ns, now_ns)

    for _ in range(200):
        write_after(SPIN_US_MAX // 2)
        assert spin.peer_us == SPIN_US_MAX
    # One pause between two bursts throws nothing away.
    write_after(1_000_000)
    assert spin.peer_us == SPIN_US_MAX
    for _ in range(10):
        write_after(2 * SPIN_US_MAX)
    assert spin.peer_us == 0
    assert spin.wanted_us == SPIN_US_MAX, "the answer comes as quickly as ever"
    for _ in range(10):
        write_after(SPIN_US_MAX // 2)
    assert spin.peer_us == SPIN_US_MAX

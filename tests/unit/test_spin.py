"""When spinning pays: on series of latencies as they were measured, quiet and beside busy loops."""

import random

import pytest

from mirror.core.limits import SPIN_US_MAX
from mirror.core.spin import Spin

# Latencies in us of writes that spun and that slept, as they were measured in turns of 32 on one machine (AMD EPYC, two
# cores, a guest): their values at these shares of all, on a quiet machine and beside two busy loops.
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
QUIET = {
    True: (42, 78, 91, 107, 128, 248, 333, 426, 540, 676, 1694, 12530),
    False: (57, 158, 184, 211, 239, 272, 312, 488, 649, 889, 1872, 12376),
}
BUSY = {
    True: (39, 77, 94, 122, 214, 624, 1856, 3432, 4391, 5035, 5617, 10564),
    False: (65, 129, 149, 178, 206, 243, 329, 2600, 3701, 4268, 5205, 8989),
}
# Another one (Intel Xeon), where the mean says nothing: p50 52 and 86, p99 4.1 and 1.9 ms.
BUSY_TAIL = {
    True: (44, 46, 48, 52, 56, 59, 60, 60, 4100, 4500, 5200, 5330),
    False: (73, 75, 80, 86, 92, 96, 98, 99, 1900, 2100, 2400, 2470),
}
# Spinning hardly worse.
ALIKE = {
    True: (4300, 4500, 4700, 5100, 5400, 5700, 5800, 5860, 9000, 10000, 11500, 11700),
    False: (4200, 4400, 4600, 5000, 5300, 5600, 5700, 5750, 9000, 10000, 11500, 11700),
}
World = dict[bool, tuple[int, ...]]


def latency_us(values: tuple[int, ...], draw: random.Random) -> float:
    share = draw.random()
    above = next(i for i, limit in enumerate(SHARES) if share <= limit and i)
    low, high = SHARES[above - 1], SHARES[above]
    return values[above - 1] + (values[above] - values[above - 1]) * (share - low) / (high - low)


def live(spin: Spin, world: World, writes: int, draw: random.Random) -> int:
    """So many writes that were alone, one after the other; how many of them spun."""
    spun = now_ns = 0
    for _ in range(writes):
        us = spin.wanted_us
        started_ns, now_ns = now_ns, now_ns + int(latency_us(world[us > 0], draw) * 1000)
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


# A host with other guests: for two seconds it takes something from every tenth millisecond, then two are quieter.
STOLEN_NS = 2_000_000_000


def live_on_a_busy_host(spin: Spin, p50_us: dict[bool, int], seconds: int, draw: random.Random) -> float:
    """Writes one after the other; the share of what they took in which spinning was its way."""
    now_ns, waited_ns, spun_ns = 0, 0, 0
    while now_ns < seconds * 1_000_000_000:
        us = spin.wanted_us
        stolen = now_ns // STOLEN_NS % 2 == 1
        latency_us = p50_us[us > 0] * draw.lognormvariate(0, 0.2) * (1.6 if stolen else 1.0)
        if draw.random() < latency_us * (100e-6 if stolen else 3e-6):
            latency_us += draw.uniform(500, 5000)
        started_ns, now_ns = now_ns + 60_000, now_ns + 60_000 + int(latency_us * 1000)
        spin.note(us > 0, started_ns, now_ns)
        waited_ns += now_ns - started_ns
        spun_ns += (now_ns - started_ns) * spin.pays
    return spun_ns / waited_ns


@pytest.mark.parametrize("seed", range(4))
def test_what_the_host_takes_for_a_while_speaks_against_neither_way(seed: int) -> None:
    draw = random.Random(seed)
    spin = Spin("auto")
    live_on_a_busy_host(spin, {True: 110, False: 220}, 1, draw)
    assert live_on_a_busy_host(spin, {True: 110, False: 220}, 20, draw) > 0.98
    spin = Spin("auto")
    live_on_a_busy_host(spin, {True: 250, False: 220}, 1, draw)
    assert live_on_a_busy_host(spin, {True: 250, False: 220}, 20, draw) < 0.02


@pytest.mark.parametrize(("busy", "often"), [(BUSY, 1300), (BUSY_TAIL, 2500)])
def test_beside_busy_loops_it_sleeps_and_comes_back_when_they_are_gone(busy: World, often: int) -> None:
    spun = []
    for seed in range(10):
        draw = random.Random(seed)
        spin = Spin("auto")
        live(spin, QUIET, 20_000, draw)
        live(spin, busy, 40_000, draw)
        spun.append(live(spin, busy, 20_000, draw))
        # Some seconds. A tail is known by hundreds of writes that spun, of which there are 32 in a thousand: trials
        # twice as often would take half as long, and are seen in the p99.9 beside busy loops.
        live(spin, QUIET, 20_000, draw)
        assert live(spin, QUIET, 20_000, draw) > 19_000
    # Trials are three in a hundred.
    assert sorted(spun)[5] < often


def test_where_spinning_is_hardly_worse_it_mostly_sleeps() -> None:
    spun = []
    for seed in range(10):
        draw = random.Random(seed)
        spin = Spin("auto")
        live(spin, ALIKE, 10_000, draw)
        spun.append(live(spin, ALIKE, 20_000, draw))
    assert sorted(spun)[5] < 700
    assert live(Spin("off"), ALIKE, 100, random.Random(0)) == 0


def test_what_went_the_other_way_by_chance_is_not_compared() -> None:
    """Under A a write behind a slow one is queued, and nobody looks for its answer."""
    draw = random.Random(5)
    spin = Spin("auto")
    for _ in range(200):
        live(spin, QUIET, 400, draw)
        if spin.wanted_us:
            for _ in range(100):
                spin.note(False, 0, 1000)
    assert spin.pays


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

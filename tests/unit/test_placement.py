"""Where threads run is decided by what is served, with as few trials as possible."""

import random
from collections.abc import Callable

from mirror.core.placement import WINDOW_NS, Placement

# Requests of a window of 5 ms on many cores and on one.
MANY_IN_FLIGHT = {False: 60, True: 110}
ONE_IN_FLIGHT = {False: 100, True: 60}


def run(
    placement: Placement, windows: int, served: Callable[[bool], int], several: Callable[[bool], bool]
) -> list[bool]:
    """How each window was placed."""
    placed = []
    for _ in range(windows):
        placed.append(placement.gathered)
        placement.window(WINDOW_NS, served(placement.gathered), several(placement.gathered))
    return placed


def test_many_requests_in_flight_gather_the_threads() -> None:
    placement = Placement()
    draw = random.Random(1)
    # On one core a worker ends a request before the next one begins: nobody sees several.
    placed = run(placement, 2000, lambda one: round(MANY_IN_FLIGHT[one] * draw.uniform(0.8, 1.2)), lambda one: not one)
    assert all(placed[8:500])
    assert placed.count(False) <= 4 * (2 + 2000 // 512)


def test_one_request_in_flight_is_never_disturbed() -> None:
    placement = Placement()
    draw = random.Random(2)
    assert not any(run(placement, 5000, lambda one: round(ONE_IN_FLIGHT[one] * draw.uniform(0.3, 3)), lambda _: False))


def test_several_that_gain_nothing_stay_where_they_are() -> None:
    placement = Placement()
    placed = run(placement, 2000, ONE_IN_FLIGHT.__getitem__, lambda _: True)
    assert placed.count(True) <= 4 * (2 + 2000 // 512)
    assert not placement.gathered


def test_a_client_that_goes_over_to_one_request_at_a_time_is_noticed() -> None:
    placement = Placement()
    run(placement, 100, MANY_IN_FLIGHT.__getitem__, lambda one: not one)
    assert placement.gathered
    placed = run(placement, 100, lambda one: ONE_IN_FLIGHT[one] // 2, lambda _: False)
    assert not any(placed[50:])


def test_a_difference_that_may_be_noise_changes_nothing() -> None:
    placement = Placement()
    run(placement, 20, lambda one: 105 if one else 100, lambda _: True)
    assert not placement.gathered


def test_idle_clients_cause_no_trial() -> None:
    placement = Placement()
    for _ in range(100):
        placement.window(WINDOW_NS * 20, 16, True)
        assert not placement.gathered

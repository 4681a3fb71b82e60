"""When a plan that failed is tried again."""

from mirror.core.backoff import Backoff
from mirror.core.limits import PLAN_RETRY_FIRST_S, PLAN_RETRY_MAX_S


def test_each_failure_waits_about_twice_as_long_up_to_the_cap() -> None:
    middle = 512  # the random number by which the wait is neither shortened nor made longer
    backoff = Backoff()
    assert backoff.left_s(100.0) == 0.0
    expected_s = PLAN_RETRY_FIRST_S
    for failures in range(1, 200):
        backoff = backoff.failed(f"reason {failures}", 100.0, middle)
        assert (backoff.failures, backoff.reason) == (failures, f"reason {failures}")
        assert backoff.left_s(100.0) == expected_s
        expected_s = min(PLAN_RETRY_MAX_S, expected_s * 2)
    assert expected_s == PLAN_RETRY_MAX_S
    assert backoff.left_s(100.0 + PLAN_RETRY_MAX_S + 1) == 0.0


def test_the_wait_is_a_little_random() -> None:
    waits = [Backoff().failed("", 0.0, number).left_s(0.0) for number in (0, 1023, 1024 * 7 + 512)]
    assert waits[0] == 0.75 * PLAN_RETRY_FIRST_S
    assert 1.24 * PLAN_RETRY_FIRST_S < waits[1] < 1.25 * PLAN_RETRY_FIRST_S
    assert waits[2] == PLAN_RETRY_FIRST_S

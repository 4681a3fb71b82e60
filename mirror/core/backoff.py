"""When a plan that failed is tried again: each time twice as late, a little at random, and never later than a cap.

A plan has failed when the two sides agreed on it and it could not be carried out: a resync that stopped because a disk
could not do its part, a handshake that broke off after the table had spoken. A peer that is out of reach is no failed
plan: it is dialled again soon, because reaching it costs nothing. Random, because both sides would else meet again
and again at the same moment.
"""

from typing import NamedTuple

from mirror.core.limits import PLAN_RETRY_FIRST_S, PLAN_RETRY_MAX_S

# Doubling further changes nothing: the cap is reached long before.
_DOUBLINGS_MAX = 16
# The share by which a wait is shorter or longer at random.
_JITTER = 0.25
_STEPS = 1024


class Backoff(NamedTuple):
    """How often the plan failed in a row, why the last time, and when by the runtime's clock it may be tried again."""

    failures: int = 0
    reason: str = ""
    next_try_at_s: float = 0.0

    def failed(self, reason: str, now_s: float, random_number: int) -> "Backoff":
        """Once more."""
        wait_s = min(PLAN_RETRY_MAX_S, PLAN_RETRY_FIRST_S * 2 ** min(self.failures, _DOUBLINGS_MAX))
        jitter = 1 - _JITTER + 2 * _JITTER * (random_number % _STEPS) / _STEPS
        return Backoff(self.failures + 1, reason, now_s + wait_s * jitter)

    def left_s(self, now_s: float) -> float:
        """Seconds until the next try, 0 when it may come now."""
        return max(0.0, self.next_try_at_s - now_s) if self.failures else 0.0

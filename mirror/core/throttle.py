"""How fast a resync may go beside the writes of clients: a controller of the p99 of their latency.

The goal is two figures at once: the p99 of foreground writes stays within TARGET_RATIO times what it is without the
resync, and the resync works for SHARE_MIN of the time or more, so that it has an end. Where both can't be had the floor
counts. Without foreground writes it goes at full speed, a fraction of a second after the last one.

What is controlled is the *share* of its time that the resync works. At half of it or less one stream does all the work
alone; each rests after a chunk in proportion to what that took. A share needs no idea of the speed of links, disks and
holes, and the floor is one on all of them. The smaller the share, the smaller the chunks: a write that meets one waits
for part of it, however seldom that is (recorded, 4 KiB writes at depth 1: p99 315 us alone, 720 beside one stream of
128 KiB chunks, 7060 beside two of 1 MiB).

What is measured is a *budget*: each foreground write earns OVER_ALLOWED, each one slower than the target costs one.
While it is overdrawn, slow writes lower the share; while something is left, the share rises. So on the average the
fraction of slow writes is what a p99 allows, at ten writes a second and at ten thousand alike.

What a write takes without the resync is measured in *probes*: the resync stops for a moment, now and then. Those of the
last half minute count, or a volume that was slow for other reasons would have its resync go on at that pace. The
figures of before do not serve: before a resync the volume mostly had no peer, and its writes did not wait for one.

What lost, in tests/unit/test_throttle.py's world:
- the p99 of each 0.1 s against the target: the same where writes are many; at 300 a second its noise costs up to a
  fifth of the speed (0.46 against 0.55 of full speed beside HURT, 0.81 against 0.95 beside HEAVY_TAIL);
- the p99 of each second: later to fall, 3.2 against 2.6 times the latency beside a heavy disturbance at 300 a second;
- raising the share by a constant: a tenth slower at the bottom (0.37 against 0.40 beside HURT at 3 000 a second);
- large chunks at every share: with the recorded latencies 19 times the latency alone at the floor, not 2.2 times.

Pure: the caller locks, reads the clock and waits. Latencies are in nanoseconds, as they are measured.
"""

import enum
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from mirror.core.limits import RESYNC_CHUNK_BYTES, RESYNC_HELD_CHUNK_BYTES

# The p99 of foreground writes during a resync against that without; twice is hardly noticed, ten times is an outage.
TARGET_RATIO = 2.0
# Writes slower than the target: somewhat fewer than a hundredth, so that the p99 lies under it and not about it.
OVER_ALLOWED = 0.007
# What the budget remembers: at most so many slow writes are repaid before the share rises again; few are saved up.
BUDGET_MIN, BUDGET_MAX = -10.0, 2.0
SHARE_MIN = 0.3
# While nobody knows yet what a write takes without the resync.
SHARE_UNKNOWN = 0.5
SHARE_FALL, SHARE_RISE = 0.7, 1.08
# A client that writes in bursts is not idle between two of them; full speed again within this time.
IDLE_S = 0.2
# Latencies are looked at so often; also the longest that anybody waits without asking again.
STEP_S = 0.02
# A probe: what was on its way needs SETTLE_S to be over; then so many writes are measured, or as long.
PROBE_S, SETTLE_S, PROBE_WRITES = 0.25, 0.02, 400
# A probe in so many seconds costs a resync 5 % at most.
PROBE_INTERVAL_S = 5.0
# Latencies without a resync that are remembered, for how long, and how many make a target, however old.
BASELINE_WRITES, BASELINE_S, BASELINE_WRITES_MIN = 2000, 30.0, 20
# Latencies of late that `status` tells the p99 of.
SHOWN_WRITES = 1000


class Phase(enum.Enum):
    """What the controller does now; its value is the beginning of what `status` says."""

    UNGOVERNED = "not held back for the foreground, as resync_rate says"
    IDLE = "full speed: no foreground writes"
    PROBE = "pausing for a moment, to measure the foreground without the resync"
    CAUTIOUS = "held back: too few foreground writes were measured without the resync"
    FREE = "full speed: the foreground is within its target"
    HELD = "held back for the foreground"
    FLOOR = "held back as far as a resync ever is"


class Rate(NamedTuple):
    """What the operator wants of a resync: a cap or None, and whether it is held back for the foreground."""

    bytes_per_s_max: int | None
    governed: bool


AUTO = Rate(None, governed=True)
FULL = Rate(None, governed=False)


class Throttle:
    """Of one resync in `streams` streams, which are numbered from 0."""

    def __init__(self, streams: int, rate: Rate = AUTO) -> None:
        self.share = SHARE_UNKNOWN
        self.bytes_per_s_max, self._governed = rate
        self._streams = list(range(streams))
        self._streams_at_first = streams
        # stream -> when its chunk began
        self._working: dict[int, float] = {}
        self._rests_until_s: dict[int, float] = {}
        self._paid_until_s = -math.inf
        self._observed_s = -math.inf
        self._busy_s = -math.inf
        self._budget = 0.0
        # When, and how long it took.
        self._baseline: deque[tuple[float, int]] = deque(maxlen=BASELINE_WRITES)
        self._target_ns: float | None = None
        self._recent: deque[int] = deque(maxlen=SHOWN_WRITES)
        self._probing = False
        self._probe_ended_s = -math.inf
        self._probed_writes = 0
        self._quiet_s: float | None = None
        # Since when a change has been on its way while none was answered.
        self._stalled_s: float | None = None
        self._idle = True

    # -- what is seen of the foreground -------------------------------------------------------------------------------

    def due(self, now_s: float) -> bool:
        """Whether it is time to `observe`."""
        return self._governed and now_s - self._observed_s >= STEP_S

    def observe(self, now_s: float, latencies_ns: Sequence[int], running: bool) -> None:
        """The latencies of the writes answered since the last call, and whether foreground changes run now."""
        since_s, self._observed_s = self._observed_s, now_s
        if latencies_ns or running:
            self._busy_s = now_s
        self._idle = now_s - self._busy_s >= IDLE_S
        self._note_stall(now_s, latencies_ns, running)
        if self._idle:
            if self._probing:
                # It found nothing to measure: not tried again with the next single write.
                self._probing, self._probe_ended_s = False, now_s
            return
        self._recent.extend(latencies_ns)
        if self._probing:
            self._probe(now_s, since_s, latencies_ns)
        elif latencies_ns and now_s - self._probe_ended_s >= PROBE_INTERVAL_S:
            self._probing, self._quiet_s, self._probed_writes = True, None, 0
        else:
            self._control(now_s, latencies_ns)

    def _note_stall(self, now_s: float, latencies_ns: Sequence[int], running: bool) -> None:
        if latencies_ns or not running:
            self._stalled_s = None
        elif self._stalled_s is None:
            self._stalled_s = now_s

    def _probe(self, now_s: float, since_s: float, latencies_ns: Sequence[int]) -> None:
        if self._working:
            self._quiet_s = None
        elif self._quiet_s is None:
            self._quiet_s = now_s
        elif since_s - self._quiet_s >= SETTLE_S:
            self._baseline.extend((now_s, latency_ns) for latency_ns in latencies_ns)
            self._probed_writes += len(latencies_ns)
        over = self._quiet_s is not None and now_s - self._quiet_s >= PROBE_S
        if over or self._probed_writes >= PROBE_WRITES:
            self._probing, self._probe_ended_s = False, now_s
            while len(self._baseline) > BASELINE_WRITES_MIN and now_s - self._baseline[0][0] > BASELINE_S:
                self._baseline.popleft()
            if len(self._baseline) >= BASELINE_WRITES_MIN:
                self._target_ns = TARGET_RATIO * p99([latency_ns for _, latency_ns in self._baseline])

    def _control(self, now_s: float, latencies_ns: Sequence[int]) -> None:
        target_ns = self._target_ns
        if target_ns is None:
            return
        over = sum(latency > target_ns for latency in latencies_ns)
        if self._stalled_s is not None and (now_s - self._stalled_s) * 1e9 > target_ns:
            over += 1
        earned = OVER_ALLOWED * len(latencies_ns)
        self._budget = min(BUDGET_MAX, max(BUDGET_MIN, self._budget + earned - over))
        if over and self._budget < 0:
            self.share = max(SHARE_MIN, self.share * SHARE_FALL)
        elif latencies_ns and self._budget > 0:
            self.share = min(1.0, self.share * SHARE_RISE)

    # -- what the streams may do --------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        if not self._governed:
            return Phase.UNGOVERNED
        if self._idle:
            return Phase.IDLE
        if self._probing:
            return Phase.PROBE
        if self._target_ns is None:
            return Phase.CAUTIOUS
        if self.share >= 1.0:
            return Phase.FREE
        return Phase.FLOOR if self.share <= SHARE_MIN else Phase.HELD

    @property
    def chunk_bytes(self) -> int:
        """What to copy next at one go."""
        if self.bytes_per_s_max is not None:
            return RESYNC_HELD_CHUNK_BYTES
        if not self._governed or self._idle:
            return RESYNC_CHUNK_BYTES
        # By the square of the share, in powers of two: at the floor an eighth.
        return max(RESYNC_HELD_CHUNK_BYTES, RESYNC_CHUNK_BYTES >> round(-2 * math.log2(self.share)))

    def wait_s(self, now_s: float, stream: int) -> float:
        """How long this stream waits before it asks again; 0: it may begin a chunk, and has begun."""
        wait_s = self._paid_until_s - now_s
        if self._governed and not self._idle:
            if self._probing or stream not in self._streams[: self._workers()]:
                wait_s = max(wait_s, STEP_S)
            wait_s = max(wait_s, self._rests_until_s.get(stream, now_s) - now_s)
        if wait_s > 0:
            return min(wait_s, STEP_S)
        self._working[stream] = now_s
        return 0.0

    def _workers(self) -> int:
        """The streams that work at this share."""
        return max(1, math.ceil(round(self.share * self._streams_at_first, 6)))

    def done(self, now_s: float, stream: int, length: int) -> None:
        """The chunk that `wait_s` let the stream begin is copied."""
        began_s = self._working.pop(stream)
        workers = min(self._workers(), len(self._streams))
        works = min(1.0, self.share * self._streams_at_first / workers)
        self._rests_until_s[stream] = now_s + (now_s - began_s) * (1 / works - 1)
        if self.bytes_per_s_max is not None:
            self._paid_until_s = max(self._paid_until_s, began_s) + length / self.bytes_per_s_max

    def leave(self, stream: int) -> None:
        """The stream has nothing left to do, or failed."""
        self._working.pop(stream, None)
        if stream in self._streams:
            self._streams.remove(stream)

    # -- for people ---------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """`share` is 1 at full speed; the p99 and its target are null while they are not known or do not count."""
        phase = self.phase
        counts = phase in (Phase.PROBE, Phase.FREE, Phase.HELD, Phase.FLOOR)
        target_us = self._target_ns / 1000 if counts and self._target_ns is not None else None
        p99_us = p99(self._recent) / 1000 if counts and self._recent else None
        reason = phase.value
        if target_us is not None and p99_us is not None and phase is not Phase.PROBE:
            reason += f": p99 {p99_us:.0f} µs of target {target_us:.0f} µs"
        return {
            "share": round(1.0 if phase in (Phase.UNGOVERNED, Phase.IDLE) else self.share, 2),
            "bytes_per_s_max": self.bytes_per_s_max,
            "p99_us": None if p99_us is None else round(p99_us),
            "target_us": None if target_us is None else round(target_us),
            "reason": reason,
        }


def p99(latencies_ns: Sequence[int]) -> int:
    """The least latency that 99 % do not exceed; of less than a hundred the largest."""
    ordered = sorted(latencies_ns)
    return ordered[max(0, math.ceil(0.99 * len(ordered)) - 1)]

"""Whether both ends spin for a write that is alone: look for the next message instead of sleeping until it comes.

With one write in flight the latency of a replicated write is mostly the waking of sleepers, 20 to 30 µs each and two
more than an unreplicated write has. Spinning takes them away, and a processor with them: it pays only while there is
one to spare, and for one write at a time (with more in flight it halves the throughput, measured).

`auto` measures itself: it keeps the latest latencies of writes that spun and of writes that slept, spins while those
that spun are better in p50 and no worse in p99 (for which the mean of the worst fiftieth stands, without the two worst
of all: it jumps less), and tries the other way with few enough writes that no percentile shows it. What lost: backing
off after one miss (throws the gain away), the share of misses (beside busy loops answers come in time and the p99 is
twice as bad all the same), asking for the load of the machine (it knows nothing of quotas).

The peer looks for the next write, after its answer to this one. How long that will be off the primary knows: where a
client takes its time, the peer does not look at all.

Pure: the caller reads the clock. Writes that are alone are noted one at a time; a lost update costs a measurement.
"""

from mirror.core.limits import SPIN_US_MAX

# The latest latencies of either way that are compared: enough that the tail is ten of them.
_KEPT = 512
# Fewer say nothing of a tail.
_ENOUGH = 128
_TAIL = 50
# The worst of all say nothing of either way: the machine stood still, for whatever reason.
_STRAY = 2
# Writes between two comparisons, and between two trials of the other way; and how many are one trial: under one in a
# hundred, so that the p99 does not see it.
_COMPARE_EVERY = 128
_TRIAL_EVERY = 4096
_TRIAL_WRITES = 32
# While it sleeps, trials come more often: those that spin are no worse in p50, so no percentile shows them.
_TRIAL_EVERY_ASLEEP = 1024
# Comparisons in a row that must say so before it changes its mind: longer than one outlier is remembered.
_VOTES = _KEPT // _COMPARE_EVERY + 2
# Long pauses of the client more than short ones, of the latest so many, and the peer sleeps at once.
_PAUSES = 8
# Noise in the tail of so few: spinning is not given up for less.
_WORSE_TAIL = 1.25


class _Latest:
    """The latest latencies of one way."""

    def __init__(self) -> None:
        self._ring = [0] * _KEPT
        self._at = 0
        self.count = 0

    def add(self, latency_ns: int) -> None:
        at = self._at
        self._ring[at] = latency_ns
        self._at = at + 1 if at + 1 < _KEPT else 0
        if self.count < _KEPT:
            self.count += 1

    def middle_and_tail(self) -> tuple[int, float]:
        """The p50, and the mean of the worst, in ns."""
        ordered = sorted(self._ring[: self.count])
        end = self.count - _STRAY
        worst = ordered[end - max(1, self.count // _TAIL - _STRAY) : end]
        return ordered[self.count // 2], sum(worst) / len(worst)


class Spin:
    """How long to spin for the next write that is alone. `setting`: "auto", "off", or microseconds."""

    def __init__(self, setting: str | int) -> None:
        self.auto = setting == "auto"
        self.us = SPIN_US_MAX if self.auto else 0 if setting == "off" else int(setting)
        assert 0 <= self.us <= SPIN_US_MAX, f"{self.us} us"
        self.pays = self.us > 0
        # How long the peer is to look for the write after this one.
        self.peer_us = self.us
        self._long_pauses = 0
        self._ended_ns = 0
        self._spun, self._slept = _Latest(), _Latest()
        self._since = 0
        self._votes = 0
        # Writes that are left of a trial of the other way; the first one comes at once.
        self._trial = _ENOUGH if self.auto else 0

    @property
    def wanted_us(self) -> int:
        """For this write: microseconds to spin at most, 0 to sleep."""
        return self.us if self.pays is not (self._trial > 0) else 0

    def note(self, spun: bool, started_ns: int, ended_ns: int) -> None:
        """A write that was alone took from then to then."""
        if not self.auto:
            return
        if started_ns - self._ended_ns > self.us * 1000:
            if self._long_pauses < _PAUSES:
                self._long_pauses += 1
        elif self._long_pauses:
            self._long_pauses -= 1
        self.peer_us = self.us if self._long_pauses <= _PAUSES // 2 else 0
        self._ended_ns = ended_ns
        (self._spun if spun else self._slept).add(ended_ns - started_ns)
        if self._trial:
            self._trial -= 1
            return
        self._since += 1
        if self._since % _COMPARE_EVERY == 0:
            self._compare()
        if self._since >= (_TRIAL_EVERY if self.pays else _TRIAL_EVERY_ASLEEP):
            self._since, self._trial = 0, _TRIAL_WRITES

    def _compare(self) -> None:
        if self._spun.count < _ENOUGH or self._slept.count < _ENOUGH:
            return
        (p50_spun, tail_spun), (p50_slept, tail_slept) = self._spun.middle_and_tail(), self._slept.middle_and_tail()
        verdict = p50_spun < p50_slept and tail_spun <= _WORSE_TAIL * tail_slept
        self._votes = self._votes + 1 if verdict is not self.pays else 0
        if self._votes == _VOTES:
            self.pays, self._votes = verdict, 0

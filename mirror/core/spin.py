"""Whether both ends spin for a write that is alone: look for the next message instead of sleeping until it comes.

With one write in flight the latency of a replicated write is mostly the waking of sleepers, two more than an
unreplicated write has. Spinning takes them away, and a processor with them: it pays only while there is one to spare,
and for one write at a time (with more in flight it costs throughput).

`auto` measures itself: it tries the other way with few enough writes that no percentile shows it, and compares them
with the writes right before. It spins while those that spun are better in p50 and in the mean, which knows the tail by
all of it, and no worse in p99, for which the mean of the worst fiftieth stands, without the two worst of all. Where
that says otherwise, or its way has become worse than the other was, one trial follows the other, and these alone
decide: what a host takes from the machine for a while makes either way worse. What lost: deciding by writes of
different times, and by a tail of so few alone (measured: one decision in three was wrong on a quiet machine, every
other one beside busy loops); backing off after one miss (throws the gain away); the share of misses (beside busy loops
answers come in time and the p99 is twice as bad all the same); asking for the load of the machine (it knows nothing of
quotas).

The peer looks for the next write, after its answer to this one. How long that will be off the primary knows: where a
client takes its time, the peer does not look at all.

Pure: the caller reads the clock. Writes that are alone are noted one at a time; a lost update costs a measurement.
"""

from mirror.core.limits import SPIN_US_MAX

# The latest latencies of either way that are compared: enough that the tail is ten of them.
_KEPT = 512
# Fewer say nothing.
_ENOUGH = 128
_TAIL = 50
# The worst of all say nothing of either way: the machine stood still, for whatever reason.
_STRAY = 2
# Writes of one trial of the other way, and its own between two: under one in a hundred, which the p99 does not see.
_TRIAL_WRITES = 32
_TRIAL_EVERY = 4096
# While it sleeps, trials come more often: those that spin are no worse in p50, so no percentile shows them.
_TRIAL_EVERY_ASLEEP = 1024
# Trials that settle a doubt: all that is compared is of the same moments then.
_SETTLING_TRIALS = _KEPT // _TRIAL_WRITES
# Writes between two looks whether its way has become worse, and how many in a row must say so: longer than one outlier
# is remembered.
_LOOK_EVERY = 128
_WORSE_LOOKS = _KEPT // _LOOK_EVERY + 2
# Long pauses of the client more than short ones, of the latest so many, and the peer sleeps at once.
_PAUSES = 8
# Noise in the tail of so few: it says nothing below.
_WORSE_TAIL = 1.5


class _Latest:
    """The latest of some latencies."""

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

    def add_last(self, latest: "_Latest", count: int) -> None:
        """The last so many of those, in their order."""
        for back in range(min(count, latest.count), 0, -1):
            self.add(latest._ring[latest._at - back])

    def middle_mean_and_tail(self) -> tuple[int, float, float]:
        """The p50, the mean, and the mean of the worst, in ns. Too few have no tail: 0."""
        ordered = sorted(self._ring[: self.count])[: self.count - _STRAY]
        worst = ordered[_STRAY - _KEPT // _TAIL :] if self.count == _KEPT else [0]
        return ordered[self.count // 2], sum(ordered) / len(ordered), sum(worst) / len(worst)


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
        # Those of the way it goes.
        self._own = _Latest()
        # Those of trials of the other way and as many right before each: what is compared.
        self._spun, self._slept = _Latest(), _Latest()
        # Own writes since the last trial, writes that are left of one, trials that are left to settle a doubt.
        self._since = 0
        self._trial = 0
        self._settling = _ENOUGH // _TRIAL_WRITES if self.auto else 0
        self._worse = 0

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
        if spun is not self.pays:
            # Outside a trial it did not choose that way: under A one that finds another on its way never spins.
            if self._trial:
                (self._spun if spun else self._slept).add(ended_ns - started_ns)
                self._trial -= 1
                if not self._trial:
                    self._judge()
            return
        self._own.add(ended_ns - started_ns)
        self._since += 1
        if not self._settling and self._since % _LOOK_EVERY == 0:
            self._look()
        if self._since >= (_TRIAL_WRITES if self._settling else _TRIAL_EVERY if self.pays else _TRIAL_EVERY_ASLEEP):
            (self._spun if self.pays else self._slept).add_last(self._own, _TRIAL_WRITES)
            self._since, self._trial = 0, _TRIAL_WRITES

    def _judge(self) -> None:
        """A trial has ended."""
        settled = self._settling == 1
        if self._settling:
            self._settling -= 1
        if self._settling or self._verdict(self._spun, self._slept) is self.pays:
            return
        if settled and self._spun.count == self._slept.count == _KEPT:
            self.pays = not self.pays
            self._own = _Latest()
        else:
            self._settling = _SETTLING_TRIALS

    def _look(self) -> None:
        """Has its way become worse than the other was at its last trials?"""
        if self._own.count < _ENOUGH:
            return
        spun, slept = (self._own, self._slept) if self.pays else (self._spun, self._own)
        self._worse = self._worse + 1 if self._verdict(spun, slept) is not self.pays else 0
        if self._worse == _WORSE_LOOKS:
            self._worse, self._settling = 0, _SETTLING_TRIALS

    @staticmethod
    def _verdict(spun: _Latest, slept: _Latest) -> bool:
        """Whether to spin, by these."""
        p50_spun, mean_spun, tail_spun = spun.middle_mean_and_tail()
        p50_slept, mean_slept, tail_slept = slept.middle_mean_and_tail()
        worse_tail = tail_slept > 0 and tail_spun > _WORSE_TAIL * tail_slept
        return p50_spun < p50_slept and mean_spun < mean_slept and not worse_tail

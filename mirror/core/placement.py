"""Whether the threads of a server share one core or run on any: whichever serves more requests.

The interpreter runs one thread at a time. With many requests in flight, workers on several cores do little but hand its
lock over and wake each other across cores (at depth 16: 9 context switches and 14 futex calls a write, where workers
on one core have 2 and 1). With one request at a time, on the contrary, whoever prepares to take the next one runs
beside the one that is served. How many a client has in flight is not to be seen from here: those that wait lie in its
socket, and workers on one core end a request before they take the next. So, where more than one at a time is seen, it
is tried: requests are counted in short windows, now the one way, now the other.

What lost: trials beside a client that has one request in flight (they made its tail, and with it whether to spin, a
matter of chance), cores fixed once for all (twice as many requests at depth 16, a fifth more latency at depth 1).

Pure: the caller reads the clock and moves the threads.
"""

# Long enough for some dozen requests, short enough that a trial is not seen in a percentile.
WINDOW_NS = 5_000_000
# Windows of one trial, half of them each way; and of the choice, between two trials.
_TRIAL = 8
_TRIAL_EVERY = 512
# A window that took longer had too few requests to tell anything: clients leave the interpreter idle.
_IDLE_NS = 5 * WINDOW_NS
# The load is another one when so many times more or fewer are served than when the choice was made.
_OTHER_LOAD = 1.5
# The other way must serve so many times more: less is noise.
_BETTER = 1.1


class Placement:
    """`gathered`: how the threads are to be placed in this window."""

    def __init__(self) -> None:
        self.gathered = False
        self._choice = False
        # Requests a nanosecond in the windows of this trial, by way.
        self._tried: tuple[list[float], list[float]] = ([], [])
        self._left = _TRIAL
        self._since = 0
        # Requests a nanosecond: when the choice was made, and of late. 0: no choice was made for this load.
        self._rate_then = 0.0
        self._rate = 0.0

    def window(self, elapsed_ns: int, requests: int, several: bool) -> bool:
        """A window is over, in which so many requests were served; returns `gathered` for the next one.

        `several`: more than one at a time was seen. On one core that may not be seen though it is so, on many it is.
        """
        if elapsed_ns > _IDLE_NS or not (several or self.gathered or self._choice):
            self._begin_trial()
            self.gathered = self._choice
            return self.gathered
        rate = requests / elapsed_ns
        if self._left:
            self._tried[self.gathered].append(rate)
            self._left -= 1
            self.gathered = not self.gathered
            if not self._left:
                self._choose()
        else:
            self._since += 1
            self._rate += (rate - self._rate) / 8
            usual = self._rate_then / _OTHER_LOAD < self._rate < self._rate_then * _OTHER_LOAD
            if self._since == _TRIAL_EVERY or not usual:
                self._begin_trial()
                self.gathered = not self._choice
        return self.gathered

    def _begin_trial(self) -> None:
        self._tried = ([], [])
        self._left = _TRIAL
        self._since = 0

    def _choose(self) -> None:
        now, other = _middle(self._tried[self._choice]), _middle(self._tried[not self._choice])
        if other > now * _BETTER:
            self._choice = not self._choice
        self._rate_then = self._rate = max(now, other) if other > now * _BETTER else now
        self.gathered = self._choice


def _middle(rates: list[float]) -> float:
    """The mean without the least and the most."""
    middle = sorted(rates)[1:-1]
    return sum(middle) / len(middle)

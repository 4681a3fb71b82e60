"""What the machine's processors do: for a moment when somebody asks, and for the last minutes, a second at a time.

Who asks why it was slow mostly asks when it is over. A look takes a fraction of a millisecond, once a second.
"""

import logging
import os
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from mirror.core.errors import ProtocolError
from mirror.core.why_slow import BUSY_CORES, SCARCE_IDLE_PERCENT
from mirror.core.wire import words
from mirror.runtime import Runtime

log = logging.getLogger(__name__)

# How long the processor is watched for whoever asks: twenty of its clock's ticks on most machines, of each core.
WATCH_S = 0.2
# How often it is looked at by itself, and how many looks are kept: as long as spans tell of.
EVERY_S, KEPT = 1.0, 240
# What is said of a stretch of time, and when it was.
SAID, AGES = ("own_cores", "idle_percent", "runnable"), ("began_ago_s", "ended_ago_s")
# What a peer may say, from 0 to this; of those that a float stands at it need not be whole.
NUMBER_MAX = 1_000_000
LARGEST = {
    "cores": NUMBER_MAX,
    "own_cores": float(NUMBER_MAX),
    "idle_percent": 100,
    "runnable": NUMBER_MAX,
    **dict.fromkeys(AGES, float(NUMBER_MAX)),
}


class _Reading(NamedTuple):
    """Sums since some moment of before: what processors had nothing to do, and what this process took."""

    at_s: float
    idle_s: float
    own_s: float
    # Threads of this machine that want a processor now, those that have one included.
    runnable: int


class Use(NamedTuple):
    """Of a stretch of time that began and ended then, by time.perf_counter."""

    began_s: float
    ended_s: float
    own_cores: float
    idle_percent: int
    runnable: int

    @property
    def is_scarce(self) -> bool:
        """Whoever was woken waited for a turn, or for this process's interpreter."""
        return self.idle_percent <= SCARCE_IDLE_PERCENT or self.own_cores >= BUSY_CORES


class Processor:
    """That of the machine and of this process. `start` once, after the last fork; without it there is no history."""

    def __init__(self) -> None:
        self._uses: deque[Use] = deque(maxlen=KEPT)

    def start(self, runtime: Runtime) -> None:
        """Raises OperatorError when the system gives no thread. Nobody waits for its end: it holds nothing."""
        runtime.spawn("processor", self._run)

    def _run(self) -> None:
        former = None
        while True:
            try:
                reading = _read()
                if former is not None:
                    self._uses.append(_between(former, reading))
                former = reading
            except OSError as error:
                # No descriptor is left, mostly.
                log.debug("nobody saw what the processors did: %s", error.strerror)
                former = None
            time.sleep(EVERY_S)

    def report(self) -> dict[str, Any]:
        """What docs/operations.md describes; takes WATCH_S."""
        first = _read()
        time.sleep(WATCH_S)
        now = _between(first, _read())
        return self._told(now, now.ended_s)

    def lately(self) -> dict[str, Any] | None:
        """As `report`, but for its moment the last look that was taken by itself: nobody waits. None without one."""
        uses, now_s = list(self._uses), time.perf_counter()
        if not uses or now_s - uses[-1].ended_s > 2 * EVERY_S:
            return None
        return self._told(uses[-1], now_s)

    def _told(self, last: Use, now_s: float) -> dict[str, Any]:
        before = [
            {
                "began_ago_s": round(now_s - one.began_s, 1),
                "ended_ago_s": round(now_s - one.ended_s, 1),
                **_said(one),
            }
            for one in reversed(list(self._uses))
            if one.is_scarce
        ]
        return {"cores": _cores(), **_said(last), "before": before}


def of_peer(told: object) -> dict[str, Any] | None:
    """What a peer's `lately` says, as it came over the wire. Raises ProtocolError for what can't be that."""
    if told is None:
        return None
    if not isinstance(told, dict) or not isinstance(before := told.get("before"), list) or len(before) > KEPT:
        raise ProtocolError("no use of processors where one was due")
    now = _checked(told, "cores", *SAID)
    if now["cores"] < 1:
        raise ProtocolError("a use of processors where there are none")
    return {**now, "before": [_stretch(one) for one in before]}


def _stretch(told: object) -> dict[str, float]:
    found = _checked(told, *AGES, *SAID)
    if found["began_ago_s"] < found["ended_ago_s"]:
        raise ProtocolError("a use of processors that ended before it began")
    return found


def _checked(told: object, *keys: str) -> dict[str, float]:
    found = {}
    for key in keys:
        number: Any = told.get(key) if isinstance(told, dict) else None
        largest = LARGEST[key]
        if type(number) not in (int, type(largest)) or not 0 <= number <= largest:
            raise ProtocolError(f"a use of processors whose {key} is {words(number)}")
        found[key] = number
    return found


def _said(use: Use) -> dict[str, Any]:
    return {key: getattr(use, key) for key in SAID}


def _cores() -> int:
    return os.cpu_count() or 1


def _between(first: _Reading, second: _Reading) -> Use:
    taken_s = second.at_s - first.at_s
    idle_percent = max(0, min(100, round(100 * (second.idle_s - first.idle_s) / taken_s / _cores())))
    own_cores = round((second.own_s - first.own_s) / taken_s, 2)
    return Use(first.at_s, second.at_s, own_cores, idle_percent, max(first.runnable, second.runnable))


def _read() -> _Reading:
    """Whoever waits for a disk leaves its processor idle."""
    text = Path("/proc/stat").read_text()
    fields = text.split(maxsplit=6)
    idle_s = (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")
    runnable = int(text.split("\nprocs_running ", 1)[1].split(None, 1)[0])
    return _Reading(time.perf_counter(), idle_s, time.process_time(), runnable)

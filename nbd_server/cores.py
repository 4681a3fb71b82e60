"""Moves the threads of this process to one core, or lets them run on any, as mirror.core.placement finds better.

On one core they are of class SCHED_BATCH: whoever is woken waits until the waker sleeps. Otherwise he takes the core at
once, wants the interpreter's lock, which the waker has, and gives the core back: two changes of threads for nothing.
"""

import ctypes
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable

from mirror.core.placement import WINDOW_NS, Placement

log = logging.getLogger(__name__)

# Requests between two looks at the clock; a power of two.
LOOK_EVERY = 16

_current_core = ctypes.PyDLL(None).sched_getcpu


class Cores:
    """Of the one volume of this process. `setting`: "auto", or "any" to leave the threads alone."""

    def __init__(self, setting: str, tell: Callable[[bool], None]) -> None:
        """`tell` is called with whether the threads share one core, when that changes."""
        self._auto = setting == "auto" and len(os.sched_getaffinity(0)) > 1
        self._placement = Placement()
        self._gathered = False
        self._tell = tell
        self._lock = threading.Lock()
        self._began_ns = time.perf_counter_ns()
        self._began_at = 0
        self._several = False
        self.next_request = itertools.count(1).__next__

    def look(self, requests: int, running: int) -> None:
        """So many requests were served since the start, so many run: when it is time, place the threads anew."""
        if not self._auto:
            return
        if running:
            self._several = True
        now_ns = time.perf_counter_ns()
        elapsed_ns = now_ns - self._began_ns
        if elapsed_ns < WINDOW_NS or not self._lock.acquire(blocking=False):
            return
        try:
            gathered = self._placement.window(elapsed_ns, requests - self._began_at, self._several)
            self._several = False
            self._put(gathered)
            self._began_ns, self._began_at = time.perf_counter_ns(), requests
        finally:
            self._lock.release()

    def let_go(self) -> None:
        """No client is left, so nobody will look: the threads run on any core, as before the first request."""
        with self._lock:
            self._placement = Placement()
            self._several = False
            self._put(False)

    def _put(self, gathered: bool) -> None:
        if gathered is not self._gathered:
            self._gathered = gathered
            self._tell(gathered)
            _place(gathered)


def _place(gathered: bool) -> None:
    """All threads but the first, from which nbdkit makes those of new connections: they begin on any core.

    The first one is never moved here, so it tells what the operator allows, also when that has changed meanwhile. A
    request calls this once it is carried out: nothing that goes wrong here may become its answer.
    """
    first = os.getpid()
    try:
        allowed = os.sched_getaffinity(first)
        core = _current_core()
        cores = {core if core in allowed else min(allowed)} if gathered else allowed
        usual = os.sched_getscheduler(first) == os.SCHED_OTHER
        threads = os.listdir("/proc/self/task")
    except OSError as error:
        log.warning("the threads stay on the cores where they are: %s", error)
        return
    for thread in map(int, threads):
        if thread != first:
            try:
                os.sched_setaffinity(thread, cores)
                if usual:
                    os.sched_setscheduler(thread, os.SCHED_BATCH if gathered else os.SCHED_OTHER, os.sched_param(0))
            except OSError:
                pass  # it has ended

"""Threads, locks, clock and randomness: the seam that a simulator replaces.

Every shell (primary, secondary, peer, sync, volume) takes these from a `Runtime` that is handed to it, so that the
same code can run on greenlets under virtual time. In production this is `threading` and `time`, without a layer on
the hot path: `lock()` returns the very `threading.Lock`.
"""

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, cast

from mirror.core.errors import OperatorError


class Lock(Protocol):
    def __enter__(self) -> bool: ...
    def __exit__(self, *arguments: object) -> None: ...
    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...
    def release(self) -> None: ...


class Condition(Protocol):
    def __enter__(self) -> bool: ...
    def __exit__(self, *arguments: object) -> None: ...
    def wait(self, timeout: float | None = None) -> bool: ...
    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any: ...
    def notify_all(self) -> None: ...


class Thread(Protocol):
    def join(self, timeout: float | None = None) -> None: ...
    def is_alive(self) -> bool: ...


class Runtime:
    """The production runtime."""

    def lock(self) -> Lock:
        return cast(Lock, threading.Lock())

    def condition(self, lock: Lock | None = None) -> Condition:
        """A condition on `lock`, or on a lock of its own (not re-entrant)."""
        return cast(Condition, threading.Condition(cast(Any, lock)) if lock else threading.Condition(threading.Lock()))

    def spawn(self, name: str, function: Callable[..., None], *arguments: object) -> Thread:
        """Start a daemon thread; it must end by itself, because daemons are not waited for at exit.

        Raises OperatorError when the system gives none.
        """
        thread = threading.Thread(target=function, args=arguments, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise OperatorError(
                f"can't start the thread {name!r}: {error}",
                remedy="see what uses all threads, or allow more (ulimit -u; TasksMax of a systemd unit)",
            ) from error
        return thread

    def is_current(self, thread: Thread | None) -> bool:
        return thread is threading.current_thread()

    def now_s(self) -> float:
        """Seconds of a clock that never jumps and counts suspended time too."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall_time_s(self) -> float:
        """Seconds since 1970, for people only: no decision rests on it."""
        return time.time()

    def boot_id(self) -> bytes:
        """16 bytes that name this boot of the machine: what was in its page cache is still there while it holds."""
        return _boot_id()

    def random_number(self) -> int:
        """64 random bits, never 0 or 1 (both have a meaning as generation)."""
        return int.from_bytes(os.urandom(8), "little") | 2

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)


@functools.cache
def _boot_id() -> bytes:
    """Read once: where a session begins or a resync ends there may be no descriptor left for it."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))

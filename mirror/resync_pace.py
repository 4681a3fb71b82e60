"""The pace of a resync: asks mirror.core.throttle before each chunk, tells it what the foreground sees, and waits.

A wait ends with the session. No thread of its own: the streams that wait, or have just copied, look at the foreground.
"""

from typing import Any

from mirror.core.limits import SYNC_STREAMS
from mirror.core.throttle import Rate, Throttle
from mirror.primary import Primary
from mirror.session import Session


class Pace:
    """That of one resync, shared by its streams."""

    def __init__(self, primary: Primary, session: Session, rate: Rate) -> None:
        self._primary = primary
        self._session = session
        self._runtime = primary.replica.runtime
        self._lock = self._runtime.lock()
        self._throttle = Throttle(SYNC_STREAMS, rate)
        # What was written before says nothing of this resync.
        primary.trace.take_recent_writes()

    @property
    def chunk_bytes(self) -> int:
        """What to copy next at one go."""
        return self._throttle.chunk_bytes

    def wait(self, stream: int) -> None:
        """Return when this stream may copy a chunk. Raises LinkLost when the session ends first."""
        while wait_s := self._ask(stream):
            self._session.rest(wait_s)

    def _ask(self, stream: int) -> float:
        now_s = self._runtime.now_s()
        with self._lock:
            if self._throttle.due(now_s):
                running = self._primary.unanswered() > 0
                self._throttle.observe(now_s, self._primary.trace.take_recent_writes(), running)
            return self._throttle.wait_s(now_s, stream)

    def done(self, stream: int, length: int) -> None:
        """The stream has copied its chunk."""
        with self._lock:
            self._throttle.done(self._runtime.now_s(), stream, length)

    def leave(self, stream: int) -> None:
        """The stream finds nothing more to copy, or failed."""
        with self._lock:
            self._throttle.leave(stream)

    def status(self) -> dict[str, Any]:
        with self._lock:
            return self._throttle.status()

"""The window of changes that are answered and not yet applied by the peer: bounded by count and by bytes.

It is the bound of invariant ack-c under protocol A: what a dead link can leave behind in memory. A request larger than
the whole window is admitted when the window is empty, else it could never be. The caller locks and waits.

A semaphore lost: it bounds one quantity, and a waiter for many bytes would be starved by those who want few.
"""


class InFlight:
    """Counts what is admitted and not done."""

    __slots__ = ("_bytes", "_bytes_max", "_count", "_count_max")

    def __init__(self, count_max: int, bytes_max: int) -> None:
        assert count_max > 0, "a window that admits nothing"
        assert bytes_max > 0, "a window that admits nothing"
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._count = 0
        self._bytes = 0

    def admit(self, size_bytes: int) -> bool:
        """Take room for a request of this size; False, and nothing taken, when there is none."""
        if self._count and (self._count >= self._count_max or self._bytes + size_bytes > self._bytes_max):
            return False
        self._count += 1
        self._bytes += size_bytes
        return True

    def done(self, size_bytes: int) -> None:
        """Give back the room of an admitted request."""
        self._count -= 1
        self._bytes -= size_bytes
        assert self._count >= 0, "more requests done than were admitted"
        assert self._bytes >= 0, "more bytes done than were admitted"

    @property
    def idle(self) -> bool:
        return self._count == 0

    @property
    def count(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        return self._bytes

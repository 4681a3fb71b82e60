"""Whether a client makes durable what it has just written, as a database does with its log at each commit.

Then the disk may begin with a write at once, while the client is answered and thinks, instead of when the flush comes:
a flush waits for a write of 4 KiB and for the disk's cache (measured: 150 us; 75 when the write was begun before). Of
anybody else, who writes much and flushes seldom, the disk would get pages in no good order, and some more than once.
Where commits are alike, the flush itself is sent to the peer behind the write that it will follow.

Pure: a count that two threads spoil costs nothing but a flush that takes longer.
"""

from typing import Final

from mirror.core.limits import COMMITS_ALIKE_MIN, COMMITS_MIN

# A commit writes so many pieces at most, mostly one.
WRITES_MAX: Final = 8


class Commits:
    """`writes` since the last flush, for the caller to count."""

    def __init__(self) -> None:
        self.writes = 0
        self._in_a_row = 0
        self._habit = False
        # Writes of the latest commit, and how many commits in a row had so many.
        self._size = 0
        self._alike = 0

    @property
    def next_is_last(self) -> bool:
        """After the write that comes now there will be a flush: the latest commits all had so many writes."""
        return self._habit and self._alike >= COMMITS_ALIKE_MIN and self.writes + 1 == self._size

    @property
    def likely(self) -> bool:
        """What is written now will be flushed at once."""
        return self._habit and self.writes <= WRITES_MAX

    def flushed(self) -> None:
        """A flush begins."""
        if self.writes:
            self._alike = self._alike + 1 if self.writes == self._size else 1
            self._size = self.writes
            self._in_a_row = self._in_a_row + 1 if self.writes <= WRITES_MAX else 0
            self._habit = self._in_a_row >= COMMITS_MIN
            self.writes = 0

"""Proof before UpToDate is believed: after a handshake the copies are compared where they are likeliest to differ.

A handshake that finds nothing to do believes the maps. So once its resync, if any, is done, the primary compares first
every extent that either side's activity log has held since the last proof, and those that a bitmap resync copied
("running"). Then the copies count as "proven", and the rest of the volume follows slowly, in a circle that goes on
where the last session left it. What differs is a suspect on both sides.

It blocks nobody: roles, clients and the disk state UpToDate don't wait for it, because two copies of which one is
needed now are better than a minute without either. `status` says which it is.

This module decides what is compared next; mirror.verify does it.
"""

import enum
from collections.abc import Callable
from typing import Any

from mirror.core.limits import EXTENT_BYTES, PROOF_BYTES_PER_S, PROOF_REST_BYTES_PER_S, RESYNC_CHUNK_BYTES
from mirror.replica import Replica


class State(enum.Enum):
    # Connected, but there is no primary yet, or a resync has not ended.
    WAITING = "waiting"
    RUNNING = "running"
    # What the logs held is compared; the rest is being, or was.
    PROVEN = "proven"
    # A disk could not be read; the next session tries again.
    FAILED = "failed"


class Proof:
    """Those of one replica, as their driver; of one session at a time, for one thread."""

    def __init__(self, replica: Replica) -> None:
        self.state = State.WAITING
        self.reason = ""
        # Compared, and the peer was not told yet.
        self.finished: list[int] = []
        self._replica = replica
        self._extents: list[int] = []
        self._rest_left = 0
        self._at = 0

    def begin(self, more: set[int]) -> None:
        """A session's proof begins; `more`: what the peer has not proven."""
        unproven = self._replica.unproven
        with self._replica.books:
            unproven.give_back()
            unproven.add(more)
            self._extents = unproven.extents()[::-1]
        self._rest_left = self._replica.unproven.extent_count
        self._at = 0
        self.finished = []
        self.state, self.reason = State.RUNNING, ""

    def end(self) -> None:
        """The session ended, or this side is no longer its driver."""
        with self._replica.books:
            self._replica.unproven.give_back()
        self.finished = []
        self._extents = []
        self.state = State.WAITING

    def fail(self, reason: str) -> None:
        """Nothing more is compared in this session."""
        self.end()
        self.state, self.reason = State.FAILED, reason

    @property
    def running(self) -> bool:
        return self.state is State.RUNNING

    @property
    def due(self) -> bool:
        """There is something to compare."""
        return self.running or (self.state is State.PROVEN and self._rest_left > 0)

    @property
    def bytes_per_s(self) -> int:
        return PROOF_BYTES_PER_S if self.running else PROOF_REST_BYTES_PER_S

    def step(self, compare: Callable[[int, int], object]) -> int:
        """Compare one more piece, of one extent; returns its bytes, 0 where there was none."""
        if self.running:
            if not self._extents:
                self.state = State.PROVEN
                return 0
            extent = self._extents[-1]
            if not self._at:
                with self._replica.books:
                    self._replica.unproven.take(extent)
        else:
            extent = self._replica.unproven.cursor
        start = extent * EXTENT_BYTES
        end = min(start + EXTENT_BYTES, self._replica.size_bytes)
        length = min(RESYNC_CHUNK_BYTES, end - start - self._at)
        compare(start + self._at, length)
        self._at += length
        if start + self._at == end:
            self._at = 0
            self._extent_done(extent)
        return length

    def _extent_done(self, extent: int) -> None:
        if self.running:
            self._extents.pop()
            self.finished.append(extent)
        else:
            self._rest_left -= 1
            with self._replica.books:
                unproven = self._replica.unproven
                unproven.cursor = (extent + 1) % unproven.extent_count

    def status(self) -> dict[str, Any]:
        total = self._replica.size_bytes
        return {
            "state": self.state.value,
            "left_bytes": min(len(self._extents) * EXTENT_BYTES, total),
            "rest_left_bytes": min(self._rest_left * EXTENT_BYTES, total) if self.state is not State.WAITING else None,
            "reason": self.reason or None,
        }

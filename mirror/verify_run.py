"""One verify as its operator asked for it: what is compared next, what was found, how it ended.

Its note in the superblock says how far it is, so that one that was cut short (by Ctrl-C, a lost link, a restart) goes
on there. What was found before is durably suspect already.
"""

import enum
from dataclasses import dataclass
from typing import Any

from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import OperatorError, ProtocolError
from mirror.core.layout import Note
from mirror.core.limits import RESYNC_CHUNK_BYTES
from mirror.core.resync import Progress
from mirror.suspects import Suspects, shown_ranges

SIDES = ("primary", "secondary")


@dataclass(frozen=True)
class Wish:
    """`repair` names the side that is right, "" for none; `rate` is bytes a second, 0 for no limit."""

    repair: str = ""
    rate: int = 0
    suspects_only: bool = False
    restart: bool = False

    @staticmethod
    def of(request: dict[str, Any]) -> "Wish":
        """Raises OperatorError, ProtocolError."""
        repair, rate = request.get("repair", ""), request.get("rate", 0)
        if repair not in ("", *SIDES):
            raise OperatorError(f"{repair!r} is no side", remedy="say --from primary or --from secondary")
        if type(rate) is not int or rate < 0:
            raise ProtocolError("a rate that is no number of bytes")
        return Wish(repair, rate, bool(request.get("suspects_only")), bool(request.get("restart")))


class State(enum.Enum):
    RUNNING = "running"
    STOPPED = "stopped"
    DONE = "done"


class Run:
    """One verify. The caller locks."""

    def __init__(
        self, number: int, wish: Wish, suspects: Suspects, last: Note | None, wall_time_s: float, now_s: float
    ) -> None:
        size_bytes = suspects.found.size_bytes
        self.number = number
        self.wish = wish
        self.state = State.RUNNING
        self.reason = ""
        self.stop_wanted = False
        self.found = DirtyMap(size_bytes)
        self.earlier_bytes = 0
        self.repaired_bytes = 0
        self.started = wall_time_s
        self.started_s = now_s
        self.ended = 0.0
        self.cursor = 0
        if not wish.suspects_only and not wish.restart and last is not None:
            self._resume(last, suspects)
        self.resumed_bytes = self.cursor
        self.progress = Progress(suspects.found.dirty_bytes if wish.suspects_only else size_bytes - self.cursor)

    def _resume(self, last: Note, suspects: Suspects) -> None:
        cursor, differing = last.get("cursor"), last.get("differing_bytes")
        size_bytes = self.found.size_bytes
        # "running": its process died.
        if (
            last.get("result") not in (State.STOPPED.value, State.RUNNING.value)
            or last.get("repair", "") != self.wish.repair
        ):
            return
        if type(cursor) is not int or type(differing) is not int or not 0 < cursor < size_bytes:
            return
        self.cursor = cursor
        if self.wish.repair:
            self.earlier_bytes = differing
        else:
            # What was found before and was not repaired or written again since.
            self.found.mark_where(suspects.found, 0, cursor)
        started, repaired = last.get("started"), last.get("repaired_bytes")
        # The note may be the peer's word, when it was primary.
        self.started = started if type(started) is float else self.started
        self.repaired_bytes = repaired if type(repaired) is int else 0

    @property
    def active(self) -> bool:
        return self.state is State.RUNNING

    def next_chunk(self, suspects: Suspects) -> tuple[int, int] | None:
        """What is compared next, None at the end; call with the books held."""
        if self.wish.suspects_only:
            return suspects.found.next_run(self.cursor, RESYNC_CHUNK_BYTES)
        length = min(RESYNC_CHUNK_BYTES, self.found.size_bytes - self.cursor)
        return (self.cursor, length) if length else None

    @property
    def differing_bytes(self) -> int:
        return self.earlier_bytes + self.found.dirty_bytes

    def result(self, state: State) -> str:
        if state is not State.DONE:
            return state.value
        if not self.differing_bytes:
            return "equal"
        return "repaired" if self.repaired_bytes >= self.differing_bytes else "differs"

    def note(self, state: State) -> Note:
        """What is durable of it in this state."""
        return {
            "started": self.started,
            "ended": self.ended,
            "checked_bytes": self.resumed_bytes + self.progress.done_bytes,
            "differing_bytes": self.differing_bytes,
            "repaired_bytes": self.repaired_bytes,
            "result": self.result(state),
            "cursor": self.cursor,
            "repair": self.wish.repair,
        }

    def status(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "state": self.state.value,
            "result": self.result(self.state) if not self.active else None,
            "reason": self.reason or None,
            "done_bytes": self.progress.done_bytes,
            "total_bytes": self.progress.total_bytes,
            "bytes_per_s": round(self.progress.bytes_per_s),
            "eta_s": self.progress.eta_s,
            "resumed_bytes": self.resumed_bytes,
            "differing_bytes": self.differing_bytes,
            "repaired_bytes": self.repaired_bytes,
            "repair": self.wish.repair or None,
            **shown_ranges(self.found),
        }

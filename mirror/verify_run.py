"""One verify as its operator asked for it: what is compared next, what was found, how it ended.

"Equal" is said of a whole volume only when all of it was compared while the two replicas stayed connected: what was
found equal before they were apart may have changed on either disk since. So one that was stopped goes on where it was
in the same session, and after that begins there and goes once round, over the end of the volume to where it began. The
place is in its note in the superblock. What was found before is durably suspect already.
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
        self,
        number: int,
        wish: Wish,
        suspects: Suspects,
        last: Note | None,
        former: "Run | None",
        wall_time_s: float,
        now_s: float,
    ) -> None:
        """`last` is the durable note on the last one, `former` one that was stopped and may go on as it is."""
        size_bytes = suspects.found.size_bytes
        self.number = number
        self.wish = wish
        self.state = State.RUNNING
        self.reason = ""
        self.stop_wanted = False
        self.found = DirtyMap(size_bytes)
        self.repaired_bytes = 0
        self.started = wall_time_s
        self.started_s = now_s
        self.ended = 0.0
        # Where the circle begins and ends, and what of it this run has taken over from the former one.
        self.begin = 0
        self.resumed_bytes = 0
        self.cursor = 0
        total_bytes = suspects.found.dirty_bytes if wish.suspects_only else size_bytes
        if not wish.suspects_only and not wish.restart:
            if former is not None and former.wish.repair == wish.repair and former.found.size_bytes == size_bytes:
                self._go_on(former, suspects)
            elif last is not None:
                self.begin = self.cursor = _cursor_of(last, wish, size_bytes)
        self.progress = Progress(total_bytes - self.resumed_bytes)

    def _go_on(self, former: "Run", suspects: Suspects) -> None:
        self.begin, self.cursor = former.begin, former.cursor
        self.resumed_bytes = former.compared_bytes
        self.started = former.started
        self.repaired_bytes = former.repaired_bytes
        for run in former.found.runs():
            if self.wish.repair:
                self.found.mark(*run)
            else:
                # What was not repaired or written again since.
                self.found.mark_where(suspects.found, *run)

    @property
    def active(self) -> bool:
        return self.state is State.RUNNING

    def next_chunk(self, suspects: Suspects) -> tuple[int, int] | None:
        """What is compared next, None at the end; call with the books held."""
        if self.wish.suspects_only:
            return suspects.found.next_run(self.cursor, RESYNC_CHUNK_BYTES)
        left = self.progress.total_bytes - self.progress.done_bytes
        length = min(RESYNC_CHUNK_BYTES, self.found.size_bytes - self.cursor, left)
        return (self.cursor, length) if length else None

    def advance(self, offset: int, length: int, now_s: float) -> None:
        """This chunk is compared."""
        self.cursor = offset + length
        if self.cursor == self.found.size_bytes and not self.wish.suspects_only:
            self.cursor = 0
        self.progress.advance(length, now_s - self.started_s)

    @property
    def compared_bytes(self) -> int:
        return self.resumed_bytes + self.progress.done_bytes

    @property
    def differing_bytes(self) -> int:
        return self.found.dirty_bytes

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
            "checked_bytes": self.compared_bytes,
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
            "begin": self.begin,
            "cursor": self.cursor,
            "differing_bytes": self.differing_bytes,
            "repaired_bytes": self.repaired_bytes,
            "repair": self.wish.repair or None,
            "suspects_only": self.wish.suspects_only,
            **shown_ranges(self.found),
        }


def _cursor_of(last: Note, wish: Wish, size_bytes: int) -> int:
    """Where the last one was cut short, 0 where it was not. The note may be the peer's word, when it was primary."""
    cursor = last.get("cursor")
    # "running": its process died.
    cut_short = last.get("result") in (State.STOPPED.value, State.RUNNING.value)
    if not cut_short or last.get("repair", "") != wish.repair or type(cursor) is not int:
        return 0
    return cursor if 0 < cursor < size_bytes else 0

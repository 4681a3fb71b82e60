"""What a writer's log says may stand in each block, and whether it does.

The rule, for one block: the content of request x may stand there unless another request y, which must have survived,
was submitted after x had ended. What must have survived is every answered request; after the loss of a primary under
protocol A or B only what an answered flush or FUA covers (`forget_unflushed`). The zeroes of a fresh volume count as a
request before all others. A request without an answer may stand or not, until its run is over.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.writer import BLOCK_BYTES, MAGIC, RECORD, block_contents

NEVER = 1 << 62
ZEROES = bytes(BLOCK_BYTES)


@dataclass
class Request:
    identifier: int
    kind: str
    first: int
    blocks: int
    fua: bool
    submitted: int
    submitted_s: float
    ended: int = NEVER
    ended_s: float = 0.0
    outcome: str = ""
    errno: int = 0
    may_be_lost: bool = False


@dataclass
class History:
    """All requests of all runs of one test, in the order of their logs; places are line numbers over all runs."""

    seed: int
    requests: dict[int, Request] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)
    _place: int = 0

    def add(self, log: Path) -> None:
        """Read the log of one run that is over: what it left unanswered can't land later."""
        opened: list[Request] = []
        for line in log.read_text().splitlines():
            words = line.split()
            self._place += 1
            identifier = int(words[1])
            if words[0] == "S" and len(words) == 7:
                place, seconds = self._place, float(words[6])
                kind, first, blocks, fua = words[2], int(words[3]), int(words[4]), words[5] == "1"
                request = Request(identifier, kind, first, blocks, fua, place, seconds)
                self.requests[identifier] = request
                opened.append(request)
            elif words[0] == "M":
                self.mismatches.append(line)
            elif words[0] in "AEL":
                request = self.requests[identifier]
                request.outcome, request.ended_s = words[0], float(words[-1])
                request.errno = int(words[2]) if words[0] == "E" else 0
                request.ended = NEVER if words[0] == "L" else self._place
        self._place += 1
        for request in opened:
            request.ended = min(request.ended, self._place)

    # -- figures ------------------------------------------------------------------------------------------------

    def having(self, outcome: str, kinds: str = "WZTF") -> list[Request]:
        return [request for request in self.requests.values() if request.outcome == outcome and request.kind in kinds]

    @property
    def errors(self) -> list[Request]:
        return self.having("E", "WZTFR")

    def longest_s(self) -> float:
        """The longest time that an answered request took."""
        return max((request.ended_s - request.submitted_s for request in self.having("A", "WZTFR")), default=0.0)

    # -- the check ----------------------------------------------------------------------------------------------

    def forget_unflushed(self) -> None:
        """What no flush covers so far may be lost from now on: a replica took over that need not have it."""
        last_flush = max((flush.submitted for flush in self.having("A", "F")), default=0)
        for request in self.requests.values():
            request.may_be_lost |= not request.fua and request.ended >= last_flush

    def floors(self) -> dict[int, int]:
        """For each block, the place at which the last request that must have survived was submitted."""
        floors: dict[int, int] = {}
        for request in self.having("A", "WZT"):
            for block in () if request.may_be_lost else range(request.first, request.first + request.blocks):
                floors[block] = max(floors.get(block, 0), request.submitted)
        return floors

    def wrong_blocks(self, read: Callable[[int], bytes], blocks: Iterable[int]) -> list[str]:
        """A sentence for each block whose content can't be; `read(block)` gives its 4096 bytes."""
        floors = self.floors()
        zeroing: dict[int, int] = {}
        for request in self.requests.values():
            if request.kind in "ZT":
                for block in range(request.first, request.first + request.blocks):
                    zeroing[block] = max(zeroing.get(block, 0), request.ended)
        wrong = []
        for block in blocks:
            fault = self._fault(block, read(block), floors.get(block, 0), zeroing.get(block, 0))
            if fault:
                wrong.append(f"block {block}: {fault}")
        return wrong

    def _fault(self, block: int, contents: bytes, floor: int, zeroed: int) -> str:
        if contents == ZEROES:
            return "" if zeroed >= floor else f"zeroes, but a write submitted at line {floor} must be there"
        magic, seed, number, identifier = RECORD.unpack_from(contents)
        if magic != MAGIC or seed != self.seed or number != block:
            return f"bytes that were never written there: {contents[:32]!r}"
        request = self.requests.get(identifier)
        if request is None or not request.first <= block < request.first + request.blocks:
            return f"request {identifier}, which is not in the log"
        if contents != block_contents(seed, block, identifier):
            return f"torn: starts like request {identifier} ({request.outcome})"
        if request.ended < floor:
            return f"request {identifier} ended at line {request.ended}, but a later one (line {floor}) must be there"
        return ""

    def touched_blocks(self) -> list[int]:
        touched: set[int] = set()
        for request in self.requests.values():
            if request.kind in "WZT":
                touched.update(range(request.first, request.first + request.blocks))
        return sorted(touched)

    def assert_on(self, handle: Any) -> None:
        """Every block that was touched reads back as it may, through a libnbd handle."""
        self._assert_blocks(lambda block: bytes(handle.pread(BLOCK_BYTES, block * BLOCK_BYTES)))

    def assert_in_file(self, path: Path) -> None:
        with path.open("rb") as data:

            def read(block: int) -> bytes:
                data.seek(block * BLOCK_BYTES)
                return data.read(BLOCK_BYTES)

            self._assert_blocks(read)

    def _assert_blocks(self, read: Callable[[int], bytes]) -> None:
        touched = self.touched_blocks()
        assert touched, "the writer wrote nothing"
        wrong = self.wrong_blocks(read, touched)
        assert not wrong, f"{len(wrong)} of {len(touched)} blocks wrong (seed {self.seed}): " + "; ".join(wrong[:10])
        assert not self.mismatches, f"reads returned old data: {self.mismatches[:10]}"

"""What a history is made of: reigns, and the operations that clients called in them; see tests.sim.history."""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.sim.registers import FOREVER, Access

WRITING = ("write", "zero", "trim")
KINDS = ("read", "flush", *WRITING)


class Loss(enum.Enum):
    """What a reign may lack of its parent; the greater, the more."""

    # Nothing. What was not answered by then took effect or never will.
    NONE = 0
    # What no answered flush or FUA made stable, each sector for itself.
    UNFLUSHED = 1
    # Anything: a copy that is known to be old, by the operator's choice.
    ANY = 2


@dataclass(eq=False, slots=True)
class Operation:
    """A client's request. Answered, failed, or open for as long as its reign."""

    number: int
    reign: "Reign"
    kind: str
    first_sector: int
    count: int
    tag: int
    fua: bool
    call_time: int
    writes: bool
    done_time: int | None = None
    fail_time: int | None = None
    values: Sequence[int] | None = None

    @property
    def sectors(self) -> range:
        return range(self.first_sector, self.first_sector + self.count)

    def answer(self, time: int, values: Sequence[int] | None = None) -> None:
        """It succeeded; a read gives the tag of each sector."""
        self.done_time = time
        if self.kind == "read":
            assert values is not None
            assert len(values) == self.count
            self.values = values
            places = self.reign.places
            for sector, value in zip(self.sectors, values, strict=True):
                places[sector] = places[sector].with_access(self, value)

    def fail(self, time: int) -> None:
        """It was answered with an error: each sector of it may take effect until the reign ends, or never."""
        self.fail_time = time

    def __str__(self) -> str:
        if self.done_time is not None:
            end = f"-{self.done_time}"
        else:
            end = "-, no answer" if self.fail_time is None else f"-, error at {self.fail_time}"
        tag = f" of {self.tag}" if self.kind == "write" else ""
        where = "" if self.kind == "flush" else f" {span(self.sectors)}"
        return f"#{self.number} {'FUA ' if self.fua else ''}{self.kind}{tag}{where} [{self.call_time}{end}]"


@dataclass(eq=False, slots=True)
class Place:
    """Where a sector stands in the tree of all sectors' accesses in a reign: sectors with equal ones share it."""

    before: "Place | None" = None
    access: Access | None = None
    following: dict[tuple[int, int], "Place"] = field(default_factory=dict)
    _accesses: tuple[Access, ...] | None = None
    _settled: tuple[Operation | None] | None = None

    def with_access(self, operation: Operation, value: int) -> "Place":
        key = (operation.number, value)
        place = self.following.get(key)
        if place is None:
            place = self.following[key] = Place(self, Access(operation, value))
        return place

    @property
    def accesses(self) -> tuple[Access, ...]:
        """In the order of calls for writes, of answers for reads."""
        if self._accesses is None:
            found = []
            place: Place | None = self
            while place is not None and place.access is not None:
                found.append(place.access)
                place = place.before
            self._accesses = tuple(reversed(found))
        return self._accesses

    @property
    def settled(self) -> Operation | None:
        """The last write, if all others had been answered before it was called: the plain case, nothing to search."""
        if self._settled is None:
            found = None
            if self.access is not None and self.before is not None:
                operation = self.access.operation
                assert isinstance(operation, Operation)
                if not operation.writes:
                    found = self.before.settled
                elif all(access.answered(operation.call_time) for access in self.before.accesses):
                    found = operation
            # What had no answer at its call has none before it for ever: this stays so.
            self._settled = (found,)
        return self._settled[0]


@dataclass(eq=False, slots=True)
class Reign:
    """One replica's time as primary. Made by `History.begin_reign`."""

    number: int
    begin_time: int
    replica: str
    parent: "Reign | None"
    parent_until: int
    loss: Loss
    note: str
    start_is_stable: bool
    places: list[Place]
    # Those of all reigns.
    operations: list[Operation]
    flushes: list[Operation] = field(default_factory=list)
    # Of each sector: what may stand there at the beginning.
    starts: list[frozenset[int]] = field(default_factory=list)
    # … and what its disks may still hold instead, as long as nothing is flushed; empty until asked for.
    older: list[frozenset[int]] = field(default_factory=list)

    def call(
        self, time: int, kind: str, first_sector: int = 0, count: int = 0, tag: int = 0, *, fua: bool = False
    ) -> Operation:
        assert kind in KINDS
        assert first_sector + count <= len(self.places)
        tag = tag if kind == "write" else 0
        number = len(self.operations) + 1
        operation = Operation(number, self, kind, first_sector, count, tag, fua, time, kind in WRITING)
        self.operations.append(operation)
        if kind == "flush":
            self.flushes.append(operation)
        elif operation.writes:
            for sector in operation.sectors:
                self.places[sector] = self.places[sector].with_access(operation, tag)
        return operation

    def flush_time(self, until: int) -> int | None:
        """The latest call of a flush that was answered by then; a stable start counts as one."""
        return max(
            (flush.call_time for flush in self.flushes if flush.done_time is not None and flush.done_time <= until),
            default=self.begin_time if self.start_is_stable else None,
        )

    def lineage(self) -> Iterator[tuple["Reign", int]]:
        """This reign, its parent, …, each with the time until which it counts."""
        reign, until = self, FOREVER
        yield reign, until
        while reign.parent is not None:
            reign, until = reign.parent, min(until, reign.parent_until)
            yield reign, until

    def __str__(self) -> str:
        note = f", {self.note}" if self.note else ""
        return f"reign {self.number} ({self.replica}{note})"


def span(sectors: range) -> str:
    return f"sector {sectors[0]}" if len(sectors) == 1 else f"sectors {sectors[0]}..{sectors[-1]}"

"""What the clients of a volume asked and were answered, and whether any volume that loses nothing explains it.

The volume is an array of sectors; each holds a tag, 0 for zeroes. A *reign* is one replica's time as primary: its
contents start as those of its parent at `parent_until`, less what its `Loss` allows, and from there on it goes its own
way, even where the parent goes on too (split brain). Whoever calls gives the times: a number that rises with every
event; nothing may be asked about a time that is still to come, but for the default, which takes all that is known.

Not seen: orders *between* sectors (a write of several sectors may take effect in pieces), and what the reads of a later
reign tell about which unflushed write of an earlier one came last (`flushed` then allows a little too much).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.sim.recording import Loss, Operation, Place, Reign, span
from tests.sim.registers import FOREVER, Access, Survival, replay

KeyOf = Callable[[int], object]
# Of all sectors in order, or of some by their number.
Tags = Sequence[int] | Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant of the design that does not hold, with all that a reader needs to see why."""

    invariant: str
    message: str
    sectors: range
    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        return f"{self.invariant}: {self.message}"


class History:
    """Recording and checking; see above."""

    def __init__(self, sectors: int) -> None:
        self.sectors = sectors
        self.reigns: list[Reign] = []
        self.operations: list[Operation] = []
        # Places with more orders than were searched: they were not checked to the end.
        self.unchecked = 0
        self._replays: dict[tuple[Place, frozenset[int], int], tuple[frozenset[int], list[Access]]] = {}

    # -- recording ----------------------------------------------------------------------------------------------------

    def begin_reign(
        self,
        time: int,
        replica: str,
        parent: Reign | None = None,
        parent_until: int | None = None,
        loss: Loss = Loss.NONE,
        note: str = "",
        *,
        start_is_stable: bool = False,
    ) -> Reign:
        """`parent_until` is the last event that the copy may know of (the present, if not given).

        `start_is_stable`: its contents at the beginning are on stable storage on all disks that may follow it.
        """
        until = time if parent_until is None else parent_until
        number = len(self.reigns) + 1
        places = [Place()] * self.sectors
        reign = Reign(number, time, replica, parent, until, loss, note, start_is_stable, places, self.operations)
        if loss is Loss.ANY:
            reign.starts = self._ever_written()
        elif parent is None:
            reign.starts = [frozenset({0})] * self.sectors
        else:
            if loss is Loss.UNFLUSHED:
                reign.starts = self.all_flushed(parent, until)
            else:
                reign.starts = self.all_allowed(parent, until)
        self.reigns.append(reign)
        return reign

    def grow(self, sectors: int) -> None:
        """The volume has more sectors from now on; the new ones are zeroes."""
        more = sectors - self.sectors
        self.sectors = sectors
        for reign in self.reigns:
            reign.places = reign.places + [Place()] * more
            reign.starts = reign.starts + [frozenset({0})] * more
            if reign.older:
                reign.older = reign.older + [frozenset({0})] * more

    def older(self, reign: Reign) -> list[frozenset[int]]:
        """Of each sector: what the reign's disks may still hold instead of its start, as long as nothing is flushed."""
        if not reign.older:
            reign.older = reign.starts
            if reign.loss is Loss.NONE and reign.parent is not None:
                reign.older = self.all_flushed(reign.parent, reign.parent_until)
        return reign.older

    # -- what may be there --------------------------------------------------------------------------------------------

    def allowed(self, reign: Reign, sector: int, time: int = FOREVER) -> frozenset[int]:
        """What a reader could see at that time, by what was answered until then."""
        return self._replay(reign, sector, time)[0]

    def flushed(self, reign: Reign, sector: int, time: int = FOREVER) -> frozenset[int]:
        """What the durable content of a disk may be at that time, by the flushes and FUA writes answered until then."""
        return self._survival(reign, sector, reign.flush_time(time), time).values()

    def all_allowed(self, reign: Reign, time: int = FOREVER) -> list[frozenset[int]]:
        return list(self._each_sector(self._alike(reign), lambda sector: self.allowed(reign, sector, time)).values())

    def all_flushed(self, reign: Reign, time: int = FOREVER) -> list[frozenset[int]]:
        key_of = self._alike_on_disk(reign, reign.flush_time(time))
        return list(self._each_sector(key_of, lambda sector: self.flushed(reign, sector, time)).values())

    def check_contents(
        self, reign: Reign, tags: Tags, what: str, invariant: str = "same-order", time: int = FOREVER
    ) -> list[Violation]:
        """`tags` are those of a copy that should be what a reader sees: none may contradict."""
        found = dict(_by_sector(tags))
        values = self._each_sector(self._alike(reign), lambda sector: self.allowed(reign, sector, time), found)
        wrong = [(sector, tag, values[sector]) for sector, tag in found.items() if tag not in values[sector]]
        return self._differing(reign, wrong, f"{what}, as read", invariant)

    def check_stable(
        self, reign: Reign, tags: Tags, what: str, invariant: str = "flush", time: int = FOREVER
    ) -> list[Violation]:
        """The same for what a disk would keep after a power cut."""
        flush_time = reign.flush_time(time)
        key_of = self._alike_on_disk(reign, flush_time)
        survivals: dict[object, Survival] = {}
        verdicts: dict[object, bool] = {}
        wrong = []
        places = reign.places
        for sector, tag in _by_sector(tags):
            settled = places[sector].settled
            if settled is not None and settled.tag == tag and settled.call_time <= time:
                continue
            key = key_of(sector)
            good = verdicts.get((key, tag))
            if good is None:
                if key not in survivals:
                    survivals[key] = self._survival(reign, sector, flush_time, time)
                good = verdicts[key, tag] = survivals[key].may_hold(tag)
            if not good:
                wrong.append((sector, tag, survivals[key].values()))
        return self._differing(reign, wrong, f"{what}, on stable storage", invariant)

    def _survival(self, reign: Reign, sector: int, flush_time: int | None, time: int) -> Survival:
        accesses = reign.places[sector].accesses
        return Survival(reign.starts[sector], lambda: self.older(reign)[sector], accesses, flush_time, time)

    def _replay(self, reign: Reign, sector: int, time: int) -> tuple[frozenset[int], list[Access]]:
        place, starts = reign.places[sector], reign.starts[sector]
        key = (place, starts, time)
        found = self._replays.get(key)
        if found is None:
            result = replay(starts, place.accesses, time)
            found = (result.values, result.refused)
            if result.gave_up:
                self.unchecked += 1
            # At FOREVER the answers are not final: operations may still be answered.
            if time != FOREVER:
                self._replays[key] = found
        return found

    def _each_sector(
        self, key_of: KeyOf, ask: Callable[[int], frozenset[int]], sectors: Iterable[int] | None = None
    ) -> dict[int, frozenset[int]]:
        """Ask once for all sectors with the same key."""
        answers: dict[object, frozenset[int]] = {}
        found = {}
        for sector in range(self.sectors) if sectors is None else sectors:
            key = key_of(sector)
            answer = answers.get(key)
            if answer is None:
                answer = answers[key] = ask(sector)
            found[sector] = answer
        return found

    def _alike(self, reign: Reign) -> KeyOf:
        """Sectors with the same key have the same reads and writes."""
        places, starts = reign.places, reign.starts
        return lambda sector: (places[sector], starts[sector])

    def _alike_on_disk(self, reign: Reign, flush_time: int | None) -> KeyOf:
        """Of sectors with the same key the same may survive."""
        if flush_time is not None or reign.parent is None or reign.loss is not Loss.NONE:
            return self._alike(reign)
        places, starts, older = reign.places, reign.starts, self.older(reign)
        return lambda sector: (places[sector], starts[sector], older[sector])

    def _ever_written(self) -> list[frozenset[int]]:
        values = [{0} for _ in range(self.sectors)]
        for operation in self.operations:
            if operation.writes:
                for sector in operation.sectors:
                    values[sector].add(operation.tag)
        return [frozenset(of_sector) for of_sector in values]

    # -- checking -----------------------------------------------------------------------------------------------------

    def check(self) -> list[Violation]:
        """All reads of all reigns; of each sector and reign only the first that nothing explains."""
        wrong: list[Violation] = []
        for reign in self.reigns:
            refused = self._refused(reign, range(self.sectors), FOREVER)
            for (access, _), sectors in refused.items():
                wrong += [self._explain(reign, access, run) for run in _runs(sectors)]
        return sorted(wrong, key=lambda violation: violation.operations[0].done_time or 0)

    def check_read(self, operation: Operation) -> list[Violation]:
        """The same for one read, as soon as it is answered."""
        time = operation.done_time
        assert time is not None
        wrong: list[Violation] = []
        places = operation.reign.places
        doubtful = [sector for sector in operation.sectors if not _is_plainly_right(operation, places[sector])]
        for (access, _), sectors in self._refused(operation.reign, doubtful, time).items():
            if access.operation is operation:
                wrong += [self._explain(operation.reign, access, run) for run in _runs(sectors)]
        return wrong

    def _refused(
        self, reign: Reign, sectors: Iterable[int], until: int
    ) -> dict[tuple[Access, frozenset[int]], list[int]]:
        """The first refused read of each sector, with the sectors where the same happened from the same start."""
        alike: dict[tuple[Place, frozenset[int]], list[int]] = {}
        for sector in sectors:
            alike.setdefault((reign.places[sector], reign.starts[sector]), []).append(sector)
        refused: dict[tuple[Access, frozenset[int]], list[int]] = {}
        for (place, starts), same in alike.items():
            if place.before is not None:
                for access in self._replay(reign, same[0], until)[1][:1]:
                    refused.setdefault((access, starts), []).extend(same)
        return refused

    # -- saying why ---------------------------------------------------------------------------------------------------

    def _explain(self, reign: Reign, access: Access, sectors: range) -> Violation:
        read, value, sector = access.operation, access.value, sectors[0]
        assert isinstance(read, Operation)
        allowed = self._could_read(reign, sector, access)
        invariant, why = self._blame(reign, sector, access)
        message, involved = self._tell(reign, sectors, value, allowed)
        message = f"{read} in {reign}: {message}. {why}"
        return Violation(invariant, message, sectors, (read, *involved))

    def _could_read(self, reign: Reign, sector: int, access: Access) -> frozenset[int]:
        accesses, starts = reign.places[sector].accesses, reign.starts[sector]
        until = access.operation.done_time or 0
        possible = set()
        for value in starts | {other.value for other in accesses if other.operation.writes}:
            changed = [Access(other.operation, value) if other is access else other for other in accesses]
            if not any(other.operation is access.operation for other in replay(starts, changed, until).refused):
                possible.add(value)
        return frozenset(possible)

    def _blame(self, reign: Reign, sector: int, access: Access) -> tuple[str, str]:
        """The invariant that is broken, and why it is that one."""
        read, value = access.operation, access.value
        writers = [writer for writer in self._writers(value, sector) if writer.call_time < (read.done_time or 0)]
        if value and not writers:
            return "linearizable", f"Nobody had written {value} there"
        own = [writer for writer in writers if writer.reign is reign]
        ancestors = [
            (writer, until)
            for ancestor, until in reign.lineage()
            for writer in writers
            if ancestor is not reign and writer.reign is ancestor and writer.call_time <= until
        ]
        if value and not own and not ancestors and value not in reign.starts[sector]:
            return "split-brain-found", f"{value} was written in {writers[-1].reign}, which is no part of this history"
        if reign.parent is not None and self._fits_another_start(reign, sector, access):
            if any(self._from_power_cut(reign, sector, access)):
                return "flush", "What an answered flush or FUA write had made stable is lost"
            return "ack-c", f"It began with all that {reign.parent} had answered by {reign.parent_until}"
        open_writers = [writer for writer, until in ancestors if not Access(writer, value).answered(until)]
        if open_writers and not own:
            late = open_writers[-1]
            return "drain-before-next", f"{late} of {late.reign} landed after that reign had ended"
        return "linearizable", "No order of the operations of this reign explains it"

    def _fits_another_start(self, reign: Reign, sector: int, access: Access) -> bool:
        """Whether only what stood there at the beginning is at fault."""
        accesses = reign.places[sector].accesses
        anything = {other.value for other in accesses}
        return access not in replay(anything, accesses, access.operation.done_time or 0).refused

    def _from_power_cut(self, reign: Reign, sector: int, access: Access) -> Iterator[bool]:
        """Of each start after a power cut, with nothing lost since: whether another content of it explains the read."""
        chain = list(reign.lineage())
        for index, (cut, _) in enumerate(chain):
            if cut.loss is Loss.UNFLUSHED:
                values: Collection[int] = {access.value, *cut.starts[sector]}
                for ancestor, until in reversed(chain[1 : index + 1]):
                    values = replay(values, ancestor.places[sector].accesses, until).values
                yield access.value in values
            if cut.loss is not Loss.NONE:
                return

    def _differing(
        self, reign: Reign, wrong: list[tuple[int, int, frozenset[int]]], what: str, invariant: str
    ) -> list[Violation]:
        """One violation for each run of sectors that are wrong in the same way: (sector, its tag, what was allowed)."""
        alike: dict[tuple[Place, int, frozenset[int]], list[int]] = {}
        for sector, value, values in wrong:
            alike.setdefault((reign.places[sector], value, values), []).append(sector)
        violations = []
        for (_, value, values), sectors in alike.items():
            for run in _runs(sectors):
                message, involved = self._tell(reign, run, value, values)
                violations.append(Violation(invariant, f"{what}, after {reign}: {message}", run, involved))
        return sorted(violations, key=lambda violation: violation.sectors.start)

    def _tell(
        self, reign: Reign, sectors: range, value: int, allowed: Collection[int]
    ) -> tuple[str, tuple[Operation, ...]]:
        sector = sectors[0]
        involved = dict.fromkeys(self._writers(value, sector) or self._writers(value))
        parts = []
        for one in sorted(allowed):
            writers = self._writers(one, sector, reign)
            involved |= dict.fromkeys(writers)
            parts.append(f"{one}{_by(writers, reign)}")
        found = f"{value}{_by(self._writers(value, sector) or self._writers(value), reign)}"
        return f"{span(sectors)} gave {found}, allowed: {', or '.join(parts) or 'nothing'}", tuple(involved)

    def _writers(self, value: int, sector: int | None = None, reign: Reign | None = None) -> list[Operation]:
        """Who wrote this tag, here or anywhere, in this reign's history or in any."""
        lineage = None if reign is None else {ancestor for ancestor, _ in reign.lineage()}
        return [
            operation
            for operation in self.operations
            if operation.writes
            and operation.tag == value
            and (sector is None or sector in operation.sectors)
            and (lineage is None or operation.reign in lineage)
        ]


def _is_plainly_right(read: Operation, place: Place) -> bool:
    """Whether it gave what the last write before it had written, and no other was under way."""
    access, settled = place.access, place.settled
    if access is None or access.operation is not read or settled is None or settled.done_time is None:
        return False
    return settled.done_time < read.call_time and access.value == settled.tag


def _by_sector(tags: Tags) -> Iterable[tuple[int, int]]:
    return tags.items() if isinstance(tags, Mapping) else enumerate(tags)


def _by(writers: list[Operation], reign: Reign) -> str:
    """The last few writers of a tag, in brackets; none of them for the zeroes of a new volume."""
    told = [f"{writer}{'' if writer.reign is reign else f' in {writer.reign}'}" for writer in writers[-3:]]
    return f" ({'; '.join(told)})" if told else ""


def _runs(sectors: Iterable[int]) -> list[range]:
    """Neighbouring sectors together."""
    runs: list[range] = []
    for sector in sorted(sectors):
        if runs and runs[-1].stop == sector:
            runs[-1] = range(runs[-1].start, sector + 1)
        else:
            runs.append(range(sector, sector + 1))
    return runs

"""The activity log: the bounded set of extents that may differ between the replicas after a crash.

Before a write goes out, its extents are *hot*: named in a durable log record (invariant log-before-write). The log has
a fixed number of slots; when a cold extent is wanted and no slot is free, the least recently used extent gives way
that no write holds and whose writes are stable on both replicas. Slots change in *transactions*: one record that names
the changed slots and, beside them, a rotating run of slots as they stand then, so that any full ring of records
rebuilds the whole table although each record is small.

    hold()  - all hot: go on                              plan() - choose slots, a record to be written
            - else: join the waiting ones, then plan()    commit() once it is durable, abort() when that failed
    release() when the write is done: it waits for a flush round to become stable

Promises: a request gets all its extents or none, in the order of asking; a victim stops being hot when it is chosen, a
newcomer starts only at commit, so a crash at any moment finds every extent with an unfinished write in the log; what
`rebuild` returns is never less than that. The newest record may be torn; any other bad record is damage.

Rounds: the caller numbers its flush rounds upwards from 1. `release(..., flush_round)` names the round that will make
the write stable, `stable_through(flush_round)` says that it did. 0 stands for "nothing was written".

Pure: the caller locks, writes the records and flushes. What lost: a bitmap of hot extents rewritten in place (as large
as the volume asks, and a torn one is lost whole), a journal with checkpoints (a second kind of record, for no gain in
size), an eviction per extent as it cools (a durable write each).
"""

import enum
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from mirror.core.errors import DamagedRecord, UnknownVersion
from mirror.core.layout import LogRecord, decode_log_record, ring_position
from mirror.core.limits import LOG_AHEAD_EXTENTS, LOG_CHANGES_MAX, LOG_RING_RECORDS, LOG_SLICE, LOG_SLOTS_MAX
from mirror.core.log_size import ReuseCurve, sampled

Range = tuple[int, int]


class _Need(enum.Enum):
    STABLE = "stable"


# plan() found no room: make victims_waiting() stable, or where none waits, wait for a release; then plan again.
NEED_STABLE: Final = _Need.STABLE


@dataclass(frozen=True)
class Transaction:
    """A record to be written at `position` of the ring, the ranges that it grants, the extents that give way.

    Without changes everything wanted was hot already: it may be committed without writing the record.
    """

    record: LogRecord
    granted: tuple[Range, ...]
    victims: tuple[int, ...] = ()

    @property
    def position(self) -> int:
        return ring_position(self.record.sequence)


@dataclass(frozen=True)
class Rebuilt:
    """What the ring tells: the extents that were hot, and how to go on in the same epoch.

    `torn` is the ring position of a record that was being written, None when there is none; it must be mended (or
    written over by the next record) before another one may be torn.
    """

    extents: frozenset[int]
    next_sequence: int
    table: tuple[int | None, ...]
    torn: int | None


@dataclass(frozen=True)
class DamagedLog:
    """The ring can't be trusted: any extent may have been hot. `positions` are those of unreadable records."""

    why: str
    positions: tuple[int, ...]


class _Hot:
    """An extent in the log: how many writes hold it, which round makes its past writes stable, where it stands.

    `ahead`: it was logged ahead of a sequential writer, which has not come there yet.
    """

    __slots__ = ("ahead", "count", "flush_round", "slot")

    def __init__(self, slot: int, flush_round: int) -> None:
        self.slot = slot
        self.count = 0
        self.flush_round = flush_round
        self.ahead = False


class ActivityLog:
    """The log of one replica in one `epoch`.

    A new epoch begins empty with sequence 1. `next_sequence` and `table` of a `Rebuilt` continue an epoch instead; its
    extents then wait for round 1.
    """

    def __init__(
        self,
        slots: int,
        next_sequence: int = 1,
        *,
        epoch: int,
        table: Sequence[int | None] = (),
        reuse: ReuseCurve | None = None,
    ) -> None:
        self.hits = 0
        self.misses = 0
        # A hold has come to an extent that was logged ahead: the next ones are due (see `ahead_of`). -1: none has.
        self.reached = -1
        self._stable_round = 0
        # What other sizes would hold, for whoever chooses the size.
        self.reuse = reuse
        self._begin(epoch, slots, next_sequence, table)

    def _begin(self, epoch: int, slots: int, next_sequence: int, table: Sequence[int | None]) -> None:
        if not 1 <= slots <= LOG_SLOTS_MAX:
            raise ValueError(f"a log of {slots} slots")
        assert epoch >= 1, "epoch 0 is that of blank records"
        assert next_sequence == 1 or len(table) == slots, "an epoch begins at 1 or goes on whole"
        self.slots = slots
        self.epoch = epoch
        self.next_sequence = next_sequence
        self._table: list[int | None] = list(table) or [None] * slots
        # Least recently used first.
        self._hot: OrderedDict[int, _Hot] = OrderedDict()
        self._free: list[int] = []
        self._pending: Transaction | None = None
        for slot in reversed(range(slots)):
            extent = self._table[slot]
            if extent is None or extent in self._hot:
                self._free.append(slot)
            else:
                self._hot[extent] = _Hot(slot, 1)

    @property
    def quiet(self) -> bool:
        """No extent is held, and no transaction under way."""
        return self._pending is None and not any(entry.count for entry in self._hot.values())

    def begin_epoch(self, epoch: int, slots: int) -> None:
        """Go on empty, with another number of slots: the superblock names the epoch durably, so the ring says nothing.

        Before that, whatever this log named was stable on both or durably dirty (invariant log-before-write).
        """
        assert self.quiet, "extents are held"
        assert epoch > self.epoch, f"epoch {epoch} after {self.epoch}"
        self._begin(epoch, slots, 1, ())

    @property
    def used(self) -> int:
        return len(self._hot)

    @property
    def range_max(self) -> int:
        """The extents that one request may ask for at once; larger ones go in pieces."""
        return min(self.slots, LOG_CHANGES_MAX)

    def hot_extents(self) -> set[int]:
        return set(self._hot)

    # -- the path of a write ------------------------------------------------------------------------------------------

    def hold(self, first_extent: int, last_extent: int) -> bool:
        """Hold the extents if all are hot; else take nothing."""
        hot = self._hot
        reuse = self.reuse
        if first_extent == last_extent:
            # log_size.sampled, without a call.
            if reuse is not None and not (first_extent + 1) * 2654435761 >> 26 & reuse.mask:
                reuse.note(first_extent)
            entry = hot.get(first_extent)
            if entry is None:
                self.misses += 1
                return False
            entry.count += 1
            hot.move_to_end(first_extent)
            self.hits += 1
            if entry.ahead:
                entry.ahead = False
                self.reached = first_extent
            return True
        return self._hold_several(range(first_extent, last_extent + 1))

    def _hold_several(self, extents: range) -> bool:
        hot, reuse = self._hot, self.reuse
        if reuse is not None:
            for extent in extents:
                if sampled(extent, reuse.mask):
                    reuse.note(extent)
        if not all(extent in hot for extent in extents):
            self.misses += 1
            return False
        for extent in extents:
            entry = hot[extent]
            entry.count += 1
            hot.move_to_end(extent)
            if entry.ahead:
                entry.ahead = False
                self.reached = extent
        self.hits += 1
        return True

    def ahead_of(self, extent: int, extent_count: int, sure: bool) -> tuple[int, int] | None:
        """What to log ahead (first and last extent) of a writer that has come to `extent`; None while enough is hot.

        `sure`: it has come there from extents that were logged ahead before; else only the one before is hot, which
        may be chance.
        """
        hot = self._hot
        if not sure and extent - 1 not in hot:
            return None
        most = min(LOG_AHEAD_EXTENTS if sure else 1, self.slots // 4)
        first, last = extent + 1, min(extent + most, extent_count - 1)
        while first <= last and first in hot:
            first += 1
        enough = most > 1 and 2 * (first - extent - 1) >= most
        return None if enough or first > last else (first, last)

    def logged_ahead(self, first_extent: int, last_extent: int, flush_round: int) -> None:
        """End the hold by which these were logged ahead: whoever comes there is noticed.

        Nothing was written, but with the round of those that were they don't give way before older ones.
        """
        self.release(first_extent, last_extent, flush_round)
        for extent in range(first_extent, last_extent + 1):
            self._hot[extent].ahead = True

    def release(self, first_extent: int, last_extent: int, flush_round: int) -> None:
        """End a hold; flush round `flush_round` will make what was written stable (0: nothing was written)."""
        hot = self._hot
        for extent in range(first_extent, last_extent + 1):
            entry = hot[extent]
            assert entry.count > 0, f"extent {extent} is released more often than held"
            entry.count -= 1
            if flush_round > entry.flush_round:
                entry.flush_round = flush_round

    def stable_through(self, flush_round: int) -> None:
        """All that was released with this round or an earlier one is stable on both, or durably dirty."""
        self._stable_round = max(self._stable_round, flush_round)

    def left_dirty(self, extents: Iterable[int], flush_round: int) -> None:
        """What was written to these with this round or an earlier one is durably dirty: they may give way."""
        for extent in extents:
            entry = self._hot.get(extent)
            if entry is not None and entry.flush_round <= flush_round:
                entry.flush_round = 0

    def victims_waiting(self) -> list[int]:
        """The extents that a stabilisation would free, least recently used first."""
        stable = self._stable_round
        return [extent for extent, entry in self._hot.items() if not entry.count and entry.flush_round > stable]

    @property
    def runs_short(self) -> bool:
        """A few more records, and nothing will give way that is stable."""
        wanted = min(self.slots // 4, LOG_CHANGES_MAX) - len(self._free)
        return wanted > 0 and sum(1 for _ in itertools.islice(self._candidates(set()), wanted)) < wanted

    # -- transactions -------------------------------------------------------------------------------------------------

    def plan(self, wanted: Sequence[Range]) -> Transaction | Literal[_Need.STABLE] | None:
        """Find slots for the wanted ranges, in order, up to the first that finds none.

        None while another transaction is under way or nothing is wanted. A range larger than `range_max` is a bug.
        """
        if self._pending is not None or not wanted:
            return None
        for first, last in wanted:
            assert 0 <= last - first < self.range_max, f"extents {first} to {last} in one request"
            for extent in range(first, last + 1):
                # Wanted is as good as used: else one request might evict what the next one asks for.
                if extent in self._hot:
                    self._hot.move_to_end(extent)
        granted, new, victims = self._choose(wanted)
        if not granted:
            return NEED_STABLE
        self._pending = self._transaction(granted, new, victims)
        return self._pending

    def _choose(self, wanted: Sequence[Range]) -> tuple[list[Range], list[int], list[int]]:
        """The ranges that can be granted, their new extents, and the extents that give way for them."""
        kept: set[int] = set()
        free = len(self._free)
        victims: dict[int, None] = {}
        new: dict[int, None] = {}
        granted: list[Range] = []
        candidates = self._candidates(kept)
        for first, last in wanted:
            extents = range(first, last + 1)
            cold = [one for one in extents if (one not in self._hot or one in victims) and one not in new]
            if len(new) + len(cold) > LOG_CHANGES_MAX:
                break
            kept.update(extents)
            missing = len(new) + len(cold) - free - len(victims)
            found = [victim for _, victim in zip(range(missing), candidates, strict=False)]
            if len(found) < missing:
                break
            victims.update(dict.fromkeys(found))
            new.update(dict.fromkeys(cold))
            granted.append((first, last))
        return granted, list(new), list(victims)

    def _candidates(self, kept: set[int]) -> Iterator[int]:
        """The extents that may give way, least recently used first; none that `kept` names by then."""
        stable = self._stable_round
        for extent, entry in self._hot.items():
            if not entry.count and entry.flush_round <= stable and extent not in kept:
                yield extent

    def _transaction(self, granted: list[Range], new: list[int], victims: list[int]) -> Transaction:
        for extent in victims:
            self._free.append(self._hot.pop(extent).slot)
        changes = tuple((self._free.pop(), extent) for extent in new)
        for slot, extent in changes:
            self._table[slot] = extent
        sequence = self.next_sequence
        record = LogRecord(self.epoch, sequence, self.slots, changes, self._rotating(sequence))
        return Transaction(record, tuple(granted), tuple(victims))

    def _rotating(self, sequence: int) -> tuple[tuple[int, int | None], ...]:
        """The run of slots that this record repeats: its sequence tells, so neither restart nor abort skips one."""
        runs = -(-self.slots // LOG_SLICE)
        start = sequence % runs * LOG_SLICE
        return tuple(enumerate(self._table[start : start + LOG_SLICE], start))

    def commit(self, transaction: Transaction) -> None:
        """The record is durable: its extents are hot, and held once for each granted range."""
        assert transaction is self._pending, "another transaction is under way"
        self._pending = None
        for slot, extent in transaction.record.changes:
            assert extent is not None
            self._hot[extent] = _Hot(slot, 0)
        for first, last in transaction.granted:
            for extent in range(first, last + 1):
                self._hot[extent].count += 1
                self._hot.move_to_end(extent)
        if transaction.record.changes:
            self.next_sequence += 1

    def abort(self, transaction: Transaction) -> None:
        """The record could not be written, or perhaps it was: neither its victims nor its newcomers are hot.

        The next record takes its place in the ring.
        """
        assert transaction is self._pending, "another transaction is under way"
        self._pending = None
        for slot, _ in reversed(transaction.record.changes):
            self._table[slot] = None
            self._free.append(slot)

    # -- after a crash ------------------------------------------------------------------------------------------------

    @staticmethod
    def rebuild(records: Sequence[bytes], epoch: int) -> Rebuilt | DamagedLog:
        """Read a ring (each position's raw bytes); records of former epochs are ignored if they are sound."""
        if len(records) != LOG_RING_RECORDS:
            return DamagedLog(f"the ring has {len(records)} records instead of {LOG_RING_RECORDS}", ())
        ours: dict[int, LogRecord] = {}
        bad: dict[int, str] = {}
        strange = ""
        for position, raw in enumerate(records):
            try:
                record = decode_log_record(raw)
            except (DamagedRecord, UnknownVersion) as error:
                bad[position] = error.message
                continue
            if record.epoch == epoch:
                ours[record.sequence] = record
            strange = strange or _strange(record, position, epoch)
        newest = max(ours, default=0)
        torn = ring_position(newest + 1)
        why = strange or next((f"position {at}: {why}" for at, why in bad.items() if at != torn), "") or _gap(ours)
        if why:
            return DamagedLog(why, tuple(bad))
        table = _replay([ours[sequence] for sequence in sorted(ours)])
        if table is None:
            return DamagedLog("its records don't name every slot", tuple(bad))
        extents = frozenset(extent for extent in table if extent is not None)
        return Rebuilt(extents, newest + 1, table, torn if bad else None)


def _strange(record: LogRecord, position: int, epoch: int) -> str:
    """Why a sound record can't be where it is, or nothing."""
    if record.epoch > epoch:
        return f"position {position}: a record of epoch {record.epoch}, later than the superblock's {epoch}"
    if record.epoch == epoch and ring_position(record.sequence) != position:
        return f"position {position}: record {record.sequence} does not belong there"
    return ""


def _gap(ours: Mapping[int, LogRecord]) -> str:
    """Which record is missing between the oldest that the ring must still hold and the newest, or nothing."""
    newest = max(ours, default=0)
    oldest = max(1, newest - LOG_RING_RECORDS + 2)
    missing = [sequence for sequence in range(oldest, newest + 1) if sequence not in ours]
    if missing:
        return f"record {missing[0]} is missing, though {newest} is there"
    if len({record.slots for record in ours.values()}) > 1:
        return "its records are of logs of several sizes"
    return ""


def _replay(records: Sequence[LogRecord]) -> tuple[int | None, ...] | None:
    """The table of slots after these successive records; None when they begin in the middle and name too few."""
    if not records:
        return ()
    slots: dict[int, int | None] = {}
    for record in records:
        slots.update(record.rotating)
        slots.update(record.changes)
    if records[0].sequence > 1 and len(slots) < records[0].slots:
        return None
    return tuple(slots.get(slot) for slot in range(records[0].slots))

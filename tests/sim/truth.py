"""What is true, seen from outside: all disks and all answers at once, and what can be judged on the spot.

The product's own books are not believed: what each replica holds is read from its simulated disk, durable superblocks
and logs are decoded from what is durable. Only who serves and who is connected to whom is asked of the product.

For each replica the truth keeps `reign` (whose history its data belongs to), `loss` (what it may lack of that one since
its last crash) and `has` (how much of what was acknowledged by one replica alone it has): a vector of counters,
compared when a resync begins to overwrite somebody.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from tests.sim.cluster import Machine, World  # isort: skip  the limits come before the product

from mirror.core import layout
from mirror.core.activity_log import ActivityLog, DamagedLog
from mirror.core.errors import DamagedRecord
from mirror.core.generation import POLICY_RULES, Kind
from mirror.core.layout import Superblock
from mirror.core.limits import EXTENT_BYTES, LOG_RING_RECORDS, RECORD_BYTES
from mirror.core.parked import SLOT_BYTES, ParkedWrite, decode_slot
from mirror.core.states import LEFT_BEHIND, DiskState
from tests.sim.disk import PAGE_BYTES, SECTOR_BYTES, File
from tests.sim.history import History, Loss, Operation, Reign, Violation

SECTORS_PER_PAGE = PAGE_BYTES // SECTOR_BYTES
PAGES_PER_EXTENT = EXTENT_BYTES // PAGE_BYTES
# In place of a tag: a sector that no write left so.
GARBAGE = -1
# Threads that carry out clients' changes: here, from the peer, and what is parked, until the end of a session.
CHANGING = ("worker", "apply", "resync-apply", "clean-up")
# From the best to the worst.
LOSSES = (Loss.NONE, Loss.UNFLUSHED, Loss.ANY)


def pattern(tag: int) -> bytes:
    """A sector that bears this tag."""
    return tag.to_bytes(8, "little") * (SECTOR_BYTES // 8)


@functools.lru_cache(maxsize=4096)
def tags_of(content: bytes) -> list[int]:
    """The tags of successive sectors."""
    found = []
    for start in range(0, len(content), SECTOR_BYTES):
        sector = content[start : start + SECTOR_BYTES]
        tag = int.from_bytes(sector[:8], "little")
        found.append(tag if sector == pattern(tag) else GARBAGE)
    return found


def differing_sectors(source: File, target: File, size_bytes: int) -> dict[int, int]:
    """The tags that a power cut of the source would leave, of those sectors that the target's readers see otherwise."""
    found = {}
    for page in range(size_bytes // PAGE_BYTES):
        left, seen = source.durable_page(page), target.page(page)
        if left == seen:
            continue
        for index, tag in enumerate(tags_of(left)):
            at = index * SECTOR_BYTES
            if left[at : at + SECTOR_BYTES] != seen[at : at + SECTOR_BYTES]:
                found[page * SECTORS_PER_PAGE + index] = tag
    return found


@dataclass
class Held:
    """What is true of one replica."""

    machine: Machine
    reign: Reign | None = None
    loss: Loss = Loss.NONE
    # Since it was last in step it was started without proof that it had forgotten nothing (invariant memory-counts).
    forgot: bool = False
    has: dict[int, int] = field(default_factory=dict)
    # What the operator gave up when he took this copy, so that lacking it is no news.
    forgiven: dict[int, int] = field(default_factory=dict)
    known: Superblock | None = None
    # sector -> when each tag last reached this replica
    seen_at: dict[int, dict[int, int]] = field(default_factory=dict)
    power_cut_at: int = 0
    lost_at: int = 0
    serving: Reign | None = None
    serving_process: object = None
    serving_started: int = 0
    discard_allowed: bool = False
    # An empty replica that was never in step: its contents are nothing to choose from.
    void: bool = False
    log_extents: frozenset[int] = frozenset()
    log_damaged: bool = False
    durable_dirty: dict[int, int] = field(default_factory=dict)
    # Called when a write has been parked here.
    on_parked: Callable[[], None] = lambda: None
    # Called when a client's write that the peer has sent has been applied here.
    on_applied: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        return self.machine.name


class Truth:
    """Watches a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._clock = count(1)
        self.history = History(world.size_bytes // SECTOR_BYTES)
        self.held = {name: Held(machine) for name, machine in world.machines.items()}
        # All that was ever answered by one replica alone, by reign; with an error, by the negative of its number.
        self.answered_alone: dict[int, int] = {}
        # Of these reigns some was a change, not only a read or a flush.
        self.changed_alone: set[int] = set()
        # Blocks in which a bit was flipped behind everybody's back: what they hold proves nothing any more.
        self.flipped: set[int] = set()
        # When each block was first seen among the suspects of a replica, and when it was last written whole.
        self.suspected: dict[int, int] = {}
        self.written_whole: dict[int, int] = {}
        # What happens when a write of a suspect block is answered.
        self.on_suspect_written: Callable[[], None] = lambda: None
        # What happens when a change is answered.
        self.on_answered: Callable[[], None] = lambda: None
        # When each sector last got a client's write on either replica, and when a bit of it was flipped.
        self.client_wrote: dict[int, int] = {}
        self.spoilt: dict[int, int] = {}
        # Reigns whose primary drained and flushed everything before it ceased to be one.
        self.ended_in_order: set[int] = set()
        for held in self.held.values():
            self._watch(held)

    def now(self) -> int:
        return next(self._clock)

    def other(self, held: Held) -> Held:
        return self.held[self.world.other(held.machine).name]

    # Watching the disks

    def _watch(self, held: Held) -> None:
        def on_forgotten() -> None:
            held.forgot = True

        held.machine.on_forgotten = on_forgotten  # type: ignore[method-assign]

        held.machine.on_killed_at_work = functools.partial(self._killed_at_work, held)  # type: ignore[method-assign]

        def on_write(file: File, offset: int, length: int) -> None:
            if file.name.endswith("/data"):
                self._data_written(held, file, offset, length)
            elif file.name.endswith("/parked"):
                self._parked_written(held, file, offset)

        def on_durable(file: File, offset: int, length: int) -> None:
            if file.name.endswith("/meta"):
                self._metadata_durable(held, file, offset, length)

        held.machine.disk.on_lost = functools.partial(self._lost, held)
        held.machine.disk.on_write = on_write
        held.machine.disk.on_durable = on_durable

    def _killed_at_work(self, held: Held) -> None:
        """What the peer had been told that it is received was in the process's memory alone, all that B promises."""
        if self.world.protocol == "B":
            held.loss = max(held.loss, Loss.UNFLUSHED, key=LOSSES.index)

    @staticmethod
    def _lost(held: Held, file: File) -> None:
        """Some of what was parked may be lost, so that the replica must not count as remembering all."""
        if file.name.endswith("/parked"):
            held.forgot = True

    def replaced(self, held: Held) -> None:
        """An empty replica took this one's place."""
        known = held.machine.superblock()
        self.held[held.name] = fresh = Held(held.machine, known=known, void=True)
        fresh.power_cut_at = self.now()
        self._watch(fresh)

    def lost_power(self, held: Held) -> None:
        held.power_cut_at = self.now()
        held.loss = max(held.loss, Loss.UNFLUSHED, key=LOSSES.index)
        held.known = held.machine.superblock() or held.known
        self._read_log(held)
        self._read_map(held)

    def _data_written(self, held: Held, file: File, offset: int, length: int) -> None:
        now = self.now()
        first, last = offset // SECTOR_BYTES, (offset + length - 1) // SECTOR_BYTES
        for page in range(first // SECTORS_PER_PAGE, last // SECTORS_PER_PAGE + 1):
            start = max(first, page * SECTORS_PER_PAGE)
            stop = min(last + 1, (page + 1) * SECTORS_PER_PAGE)
            content = file.page(page)
            at = (start - page * SECTORS_PER_PAGE) * SECTOR_BYTES
            for sector in range(start, stop):
                tag = int.from_bytes(content[at : at + 8], "little")
                at += SECTOR_BYTES
                held.seen_at.setdefault(sector, {})[tag] = now
        task = self.world.scheduler.current
        known = held.known
        if task is None or known is None:
            return
        resyncs = task.name.startswith("resync-apply") and not self._is_parked(held, offset, length)
        changes = not resyncs and task.name.startswith(CHANGING)
        if changes:
            self.client_wrote.update(dict.fromkeys(range(first, last + 1), now))
        extents = range(offset // EXTENT_BYTES, (offset + length - 1) // EXTENT_BYTES + 1)
        if resyncs:
            if known.disk not in (DiskState.INCONSISTENT, DiskState.FAILED):
                self.world.violate("inconsistent-first", f"a resync writes to {held.name}, which is {known.disk.value}")
            self._check_no_suspect(held, range(first, last + 1))
        elif changes:
            source = held if task.name.startswith("worker") else self.other(held)
            self._check_logged(
                source, held, extents, range(offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES + 1)
            )
            if task.name.startswith("apply"):
                held.on_applied()

    def _parked_written(self, held: Held, file: File, offset: int) -> None:
        """What is parked has reached this replica: no killed process loses it, and a power cut does as it does others.

        What it is worth is seen when somebody reads it after a failover.
        """
        parked = self._parked(held, file, offset)
        if parked is not None:
            now = self.now()
            for index, tag in enumerate(tags_of(parked.data)):
                held.seen_at.setdefault(parked.offset // SECTOR_BYTES + index, {})[tag] = now
            held.on_parked()

    @staticmethod
    def _parked(held: Held, file: File, offset: int) -> ParkedWrite | None:
        slot = b"".join([file.page(offset // PAGE_BYTES + index) for index in range(SLOT_BYTES // PAGE_BYTES)])
        return None if held.known is None else decode_slot(slot, held.known.log_epoch)

    def _is_parked(self, held: Held, offset: int, length: int) -> bool:
        """Whether a client's write of this place is parked: it makes way for whoever comes next, a resync too."""
        return any((parked.offset, len(parked.data)) == (offset, length) for parked in self._all_parked(held))

    def _all_parked(self, held: Held) -> list[ParkedWrite]:
        file = held.machine.disk.files[f"/{held.name}/parked"]
        slots = (self._parked(held, file, at) for at in range(0, file.size_bytes, SLOT_BYTES))
        return [parked for parked in slots if parked is not None]

    def _contents(self, held: Held) -> Callable[[int], bytes]:
        """Its pages, with what is parked in its place."""
        parked = self._all_parked(held)

        def page(index: int) -> bytes:
            content = bytearray(held.machine.data.page(index))
            start = index * PAGE_BYTES
            for one in parked:
                first, last = max(start, one.offset), min(start + PAGE_BYTES, one.offset + len(one.data))
                if first < last:
                    content[first - start : last - start] = one.data[first - one.offset : last - one.offset]
            return bytes(content)

        return page

    def _check_no_suspect(self, target: Held, sectors: range) -> None:
        """No resync decides which side of a suspect block is right (invariant suspect-is-not-dirty).

        It may bring what a client has written since, and overwrite what a person or a policy has given up.
        """
        if target.void or self._discards(target, set()):
            return
        for sector in sectors:
            page = sector // SECTORS_PER_PAGE
            if page in self.suspected and self.client_wrote.get(sector, 0) < self.suspected[page]:
                self.world.violate("suspect-is-not-dirty", f"a resync overwrites suspect block {page} of {target.name}")

    def _check_logged(self, primary: Held, held: Held, extents: range, pages: range) -> None:
        """log-before-write: what lands anywhere is named by the primary's durable log."""
        if primary.log_damaged or primary.machine.volume is None or not primary.machine.is_primary:
            return
        if primary.known is None or primary.known.disk is DiskState.FAILED:
            return
        for extent in extents:
            # A late one of a session that the primary has given up: its blocks are durably dirty by then.
            bits = primary.durable_dirty.get(extent, 0) | held.durable_dirty.get(extent, 0)
            blocks = [page % PAGES_PER_EXTENT for page in pages if page // PAGES_PER_EXTENT == extent]
            if extent not in primary.log_extents and not all(bits >> block & 1 for block in blocks):
                self.world.violate(
                    "log-before-write",
                    f"a write lands on {held.name} in extent {extent}, and {primary.name}'s durable log lacks it"
                    f" ({sorted(primary.log_extents)})",
                )
                return

    def _metadata_durable(self, held: Held, file: File, offset: int, length: int) -> None:
        if length == RECORD_BYTES and offset in layout.Geometry.superblock_offsets:
            try:
                found = layout.decode_superblock(file.durable_page(offset // PAGE_BYTES))
            except DamagedRecord:
                return
            if held.known is None or found.sequence > held.known.sequence or held.known.replica_id != found.replica_id:
                before, held.known = held.known, found
                self._superblock_changed(held, before, found)
                named = held.log_extents
                self._read_log(held)
                self._check_coverage(held, named - held.log_extents, "log-before-write")
        elif offset and offset < layout.Geometry.map_offset:
            before = held.log_extents
            self._read_log(held)
            self._check_coverage(held, before - held.log_extents, "log-before-write")
        else:
            cleared = self._read_map(held)
            self._check_coverage(held, cleared, "clear-after-stable")

    def _read_log(self, held: Held) -> None:
        if held.known is None:
            return
        first = layout.Geometry.log_offset // PAGE_BYTES
        meta = held.machine.meta
        records = [meta.durable_page(first + index) for index in range(LOG_RING_RECORDS)]
        ring = ActivityLog.rebuild(records, held.known.log_epoch)
        held.log_damaged = isinstance(ring, DamagedLog)
        held.log_extents = frozenset() if isinstance(ring, DamagedLog) else ring.extents

    def _read_map(self, held: Held) -> set[int]:
        """Read the durable dirty map; the extents in which blocks became clean."""
        geometry = layout.Geometry(self.world.size_bytes)
        meta = held.machine.meta
        found: dict[int, int] = {}
        for index in range(geometry.pages):
            try:
                bitmaps = layout.decode_map_page(
                    meta.durable_page(geometry.map_page_offset(index) // PAGE_BYTES), index
                )
            except DamagedRecord:
                bitmaps = [(1 << PAGES_PER_EXTENT) - 1] * len(geometry.extents_of_page(index))
            found.update(zip(geometry.extents_of_page(index), bitmaps, strict=False))
        before, held.durable_dirty = held.durable_dirty, {extent: bits for extent, bits in found.items() if bits}
        return {extent for extent, bits in before.items() if bits & ~found.get(extent, 0)}

    def _check_coverage(self, held: Held, extents: set[int] | frozenset[int], invariant: str) -> None:
        """Extents that a record of `held` has just given up: what differs in them is named elsewhere."""
        other = self.other(held)
        if not extents or not self._bookkeeping_counts(held, other):
            return
        mine, theirs = held.machine.data, other.machine.data
        for extent in extents:
            named = held.log_extents | other.log_extents
            if extent in named or held.log_damaged:
                continue
            bits = held.durable_dirty.get(extent, 0) | other.durable_dirty.get(extent, 0)
            for page in range(extent * PAGES_PER_EXTENT, (extent + 1) * PAGES_PER_EXTENT):
                if bits >> (page % PAGES_PER_EXTENT) & 1 or not held.seen_at or page in self.flipped:
                    continue
                if mine.stable(page) and theirs.stable(page) and mine.page(page) == theirs.page(page):
                    continue
                self.world.violate(
                    invariant,
                    f"block {page} (extent {extent}) is not the same and stable on both, and the last record that"
                    f" names it is gone from {held.name}",
                )
                return

    def _bookkeeping_counts(self, held: Held, other: Held) -> bool:
        """Whether the two share a ground since which both keep books, and this one's will be used."""
        one, two = held.known, other.known
        if one is None or two is None:
            return False
        if not (one.met_peer and two.met_peer) or one.volume_id != two.volume_id:
            return False
        if not held.machine.is_primary or one.disk is DiskState.FAILED or two.disk is DiskState.FAILED:
            return False
        if other.machine.is_primary:
            return False
        ground = {one.current, one.base, *one.history} - {0}
        return two.current in ground and two.kind is Kind.ESTABLISHED and two.current != 0

    # Roles and histories

    def _superblock_changed(self, held: Held, before: Superblock | None, now: Superblock) -> None:
        other = self.other(held)
        if before is None:
            return
        if now.disk is DiskState.INCONSISTENT and before.disk is not DiskState.INCONSISTENT:
            ahead = {key: value for key, value in held.has.items() if key > 0 and value > other.has.get(key, 0)}
            if ahead and not self._discards(held, set(ahead)) and before.kind is not Kind.JOINING:
                self.world.violate(
                    "split-brain-found",
                    f"{held.name} is about to be overwritten by {other.name}, and it alone holds acknowledged changes",
                )
            equal = _same(held.has, other.has) and held.reign is other.reign is not None
            sound = before.disk is DiskState.UP_TO_DATE and not (held.discard_allowed or held.forgot)
            if equal and sound and _known_equal(held, other) and self._may_be_lost(held, other):
                self.world.violate(
                    "memory-counts",
                    f"{held.name} gives up what a power cut of {other.name} would lose",
                )
        volume = held.machine.volume
        if before.disk is DiskState.INCONSISTENT and now.disk is DiskState.UP_TO_DATE:
            self._take(held, other)
            return
        in_step = now.base == 0 and now.peer_disk is now.disk is DiskState.UP_TO_DATE
        if in_step and volume is not None and volume._primary.session is not None:
            self._equal(held, other)

    def _discards(self, held: Held, reigns: set[int]) -> bool:
        """Whether somebody said that what this replica alone holds of these reigns shall go."""
        volume = held.machine.volume
        outcome = volume._peer.outcome if volume is not None and volume._peer is not None else None
        rule = outcome.rule if outcome is not None else ""
        if rule.startswith("policy-discard-zero"):
            return not reigns & self.changed_alone
        return held.discard_allowed or rule.startswith(POLICY_RULES)

    def _take(self, target: Held, source: Held) -> None:
        """The target has all that the source has."""
        if target.void or self._discards(target, set()):
            self.suspected.clear()
        target.reign, target.loss, target.has = source.reign, source.loss, dict(source.has)
        if source.reign is not None and self._may_be_behind(source, source.reign, in_step=False):
            source.loss = target.loss = max(target.loss, Loss.UNFLUSHED, key=LOSSES.index)
        target.forgiven = dict(source.forgiven)
        target.forgot = source.forgot = False
        target.discard_allowed = target.void = False

    def _equal(self, one: Held, other: Held) -> None:
        """Both say that they are in step."""
        if other.known is None or other.known.disk is not DiskState.UP_TO_DATE:
            return
        if _same(one.has, other.has):
            one.forgot = other.forgot = False
            one.loss = other.loss = min(one.loss, other.loss, key=LOSSES.index)
            if one.reign is not other.reign:
                newest = max((one, other), key=lambda held: held.reign.number if held.reign else 0)
                one.reign = other.reign = newest.reign

    def _may_be_lost(self, target: Held, source: Held) -> bool:
        """Whether the target holds what the source's disk should hold by all that was acknowledged, and does not.

        Where the target holds the same as the source's disk it gives nothing up, though acknowledged writes may be
        missing there: those that a power cut of both has taken from both, as it may before a flush. Neither `loss`
        tells that: the source's may be what it alone forgot, while the target remembers.
        """
        assert source.reign is not None
        found = differing_sectors(source.machine.data, target.machine.data, self.world.size_bytes)
        tags = {sector: tag for sector, tag in found.items() if sector // SECTORS_PER_PAGE not in self.flipped}
        return bool(self.history.check_contents(source.reign, tags, source.name, time=self.now()))

    def connected(self, held: Held) -> bool:
        """Whether its session lives, on both sides."""
        sessions = []
        for one in (held, self.other(held)):
            volume = one.machine.volume
            peer = volume._peer if volume is not None else None
            sessions.append(peer.session if peer is not None else None)
        one, two = sessions
        return one is not None and two is not None and not one.ended and not two.ended and one.number == two.number

    def begin_reign(self, held: Held) -> Reign:
        """A replica serves as primary from now on."""
        other = self.other(held)
        known = held.known
        if known is not None and known.disk is DiskState.INCONSISTENT:
            self.world.violate("no-bad-primary", f"{held.name} is primary and Inconsistent")
        connected = self.connected(held)
        known_of = {key: max(held.has.get(key, 0), held.forgiven.get(key, 0)) for key in self.answered_alone}
        behind = any(value > known_of[key] for key, value in self.answered_alone.items())
        if behind:
            held.forgiven = dict(self.answered_alone)
        loss = Loss.ANY if behind else held.loss
        parent = held.reign
        # A peer that is being resynced from this very copy has had nothing to add to it.
        in_step = connected and other.known is not None and other.known.disk is DiskState.UP_TO_DATE
        if parent is not None and loss is Loss.NONE and self._may_be_behind(held, parent, in_step):
            loss = Loss.UNFLUSHED
        time = self.now()
        reign = self.history.begin_reign(time, held.name, parent, None if parent is None else time, loss)
        held.reign, held.loss = reign, Loss.NONE
        if connected:
            held.forgot = False
        held.serving, held.serving_process, held.serving_started = reign, held.machine.process, time
        if in_step:
            other.reign, other.loss = reign, Loss.NONE
        elif known is None or other.known is None or known.current != other.known.current:
            # What it answers, reads included, rests on its copy alone. Not when it was promoted by a peer that has died
            # since: it records that before it answers anything that the peer lacks.
            self._count_alone(held, reign)
        self.world.note(
            held.name, f"serves: reign {reign.number}, {loss.name} lost of reign {parent.number if parent else '-'}"
        )
        return reign

    def _may_be_behind(self, held: Held, parent: Reign, in_step: bool) -> bool:
        """Under protocol A what was answered may still be queued when the primary dies."""
        return (
            self.world.protocol == "A"
            and parent.replica != held.name
            and not in_step
            and parent.number not in self.ended_in_order
        )

    # Answers

    def _alone(self, held: Held, what: str) -> None:
        """An answer that the peer does not have: the record must be durable (record-before-ack-alone)."""
        if not self._has_recorded_alone(held):
            self.world.violate(
                "record-before-ack-alone",
                f"{held.name} answered {what} that {self.other(held).name} does not have, and did not durably record it"
                " before",
            )
        assert held.serving is not None
        self._count_alone(held, held.serving)

    def _has_recorded_alone(self, held: Held) -> bool:
        """Whether it has durably left its peer behind, which then serves without its answers by force only."""
        known, theirs = held.known, self.other(held).known
        assert known is not None
        recorded = known.peer_disk in LEFT_BEHIND or not known.met_peer
        return recorded and (theirs is None or known.current != theirs.current or not known.met_peer)

    def _count_alone(self, held: Held, reign: Reign) -> None:
        self._count(held, reign.number)

    def failed_change(self, held: Held, operation: Operation) -> None:
        """Answered with an error: it may be seen here, and nobody was promised that it stays."""
        other = self.other(held)
        if held.serving is not None and not all(
            self._reached(other, sector, operation.tag, operation.call_time) for sector in operation.sectors
        ):
            self._count(held, -held.serving.number)

    def _count(self, held: Held, key: int) -> None:
        self.answered_alone[key] = self.answered_alone.get(key, 0) + 1
        held.has[key] = self.answered_alone[key]

    def answered_change(self, held: Held, operation: Operation, started: int) -> None:
        """A write, zero or trim was answered well."""
        self.on_answered()
        # First, for they may be seen here for the first time, and be no more because of this very write.
        self.note_suspects()
        self._note_written(operation.sectors)
        other = self.other(held)
        sectors = operation.sectors
        lacks_here = [one for one in sectors if not self._reached(held, one, operation.tag, started)]
        lacks_there = [one for one in sectors if not self._reached(other, one, operation.tag, started)]
        if lacks_here and held.known is not None and not self._failed(held) and not lacks_there:
            lacks_here = []  # another write of the same blocks came over it in the same moment, or the peer stands in
        if lacks_here and lacks_there:
            self.world.violate("ack-c", f"{held.name} answered write {operation.tag}, which is on neither disk")
            return
        if not lacks_there:
            if lacks_here and held.serving is not None:
                self._count_alone(other, held.serving)
            elif (
                held.serving is not None
                and self._has_recorded_alone(held)
                and not all(self._seen(other, sector, operation.tag, started) for sector in sectors)
            ):
                # The peer lost power meanwhile, perhaps before it had this.
                self._count_alone(held, held.serving)
            self._check_fua(held, operation)
            return
        volume = held.machine.volume
        assert volume is not None
        session = volume._primary.session
        attached = session is not None and not session.ended
        recording = session is not None or volume._primary._alone_lock._held  # type: ignore[attr-defined]
        if self.world.protocol != "C" and recording and not operation.fua:
            # Under way; or the link was lost just between the queue and this answer, and that is being recorded.
            return
        # A large trim goes in pieces: one may have gone before the peer came back, and be dirty.
        whole = other.known is None or other.known.disk is not DiskState.INCONSISTENT
        stayed = other.power_cut_at < started and other.lost_at < started
        if attached and whole and stayed and self.connected(held):
            self.world.violate(
                "ack-c", f"{held.name} answered write {operation.tag} while connected, and {other.name} never got it"
            )
            return
        self._alone(held, f"write {operation.tag}")
        if held.serving is not None:
            self.changed_alone.add(held.serving.number)
        self._check_fua(held, operation)

    def _note_written(self, sectors: range) -> None:
        for page in range(-(-sectors.start // SECTORS_PER_PAGE), sectors.stop // SECTORS_PER_PAGE):
            self.written_whole[page] = self.now()
        if self.suspected and any(sector // SECTORS_PER_PAGE in self.suspected for sector in sectors):
            self.on_suspect_written()

    def _reached(self, held: Held, sector: int, tag: int, started: int) -> bool:
        # After a power cut: it had it, or not; what it lost it lost by a crash.
        return held.power_cut_at > started or self._seen(held, sector, tag, started)

    @staticmethod
    def _seen(held: Held, sector: int, tag: int, started: int) -> bool:
        return held.seen_at.get(sector, {}).get(tag, 0) > started

    @staticmethod
    def _failed(held: Held) -> bool:
        """Its disk is Failed, or that could not be recorded and the peer stands in, which has recorded that."""
        volume = held.machine.volume
        recorded = held.known is not None and held.known.disk is DiskState.FAILED
        return recorded or (volume is not None and volume._replica.failed and volume._primary.peer_only)

    def answered_flush(self, held: Held) -> None:
        """A flush was answered well: what was answered before it began is stable (invariant flush)."""
        other = self.other(held)
        known = held.known
        if known is None or self._failed(held) or held.serving is None:
            return
        if self._check_stable(held.serving, held) or other.known is None:
            return
        if other.known.disk is DiskState.INCONSISTENT or other.reign is not held.reign:
            return
        in_step = self.connected(held) and other.known.disk is DiskState.UP_TO_DATE and other.loss is Loss.NONE
        if in_step and other.power_cut_at < held.serving_started:
            self._check_stable(held.serving, other)
        elif self._unstable(held.serving, other):
            self._alone(held, "a flush")

    def _unstable(self, reign: Reign, held: Held) -> list[Violation]:
        """Where the durable contents of a replica contradict what was answered."""
        data = held.machine.data
        tags: list[int] | dict[int, int] = []
        for page in range(self.world.size_bytes // PAGE_BYTES):
            tags += tags_of(data.durable_page(page))
        if self.flipped:
            tags = {at: tag for at, tag in enumerate(tags) if at // SECTORS_PER_PAGE not in self.flipped}
        return self.history.check_stable(reign, tags, held.name, time=self.now())

    def _check_stable(self, reign: Reign, held: Held) -> bool:
        for violation in self._unstable(reign, held):
            self.world.violate(violation.invariant, str(violation))
            return True
        return False

    def _check_fua(self, held: Held, operation: Operation) -> None:
        """A FUA write was answered well: what it wrote, or what came after it, is durable."""
        if not operation.fua or held.serving is None or self.touches_flipped(operation.sectors):
            return
        where = self.other(held) if self._failed(held) else held
        for sector in operation.sectors:
            page = tags_of(where.machine.data.durable_page(sector // SECTORS_PER_PAGE))
            tag, allowed = page[sector % SECTORS_PER_PAGE], self.history.flushed(held.serving, sector, self.now())
            if tag not in allowed:
                self.world.violate(
                    "flush",
                    f"{held.name} answered FUA write {operation.tag}, and sector {sector} is durably {tag} on"
                    f" {where.name}; only {sorted(allowed)} may be there",
                )
                return

    # The end

    def check_equal(self) -> None:
        """Both say that they are in step: bit for bit, then."""
        known = [held.known for held in self.held.values()]
        sizes = {(one.size_bytes, one.next_size_bytes) for one in known if one is not None}
        if len(sizes) != 1 or sizes.pop()[1]:
            self.world.violate("equal-after-sync", f"the replicas are not of one size: {known}")
            return
        one, two = (self._contents(held) for held in self.held.values())
        suspects = self._suspects()
        for page in range(self.world.size_bytes // PAGE_BYTES):
            if one(page) != two(page) and page in self.flipped:
                if page not in suspects:
                    self.world.violate("proof", f"block {page} differs since a bit was flipped, and nobody suspects it")
                    return
            elif one(page) != two(page):
                first, second = tags_of(one(page)), tags_of(two(page))
                self.world.violate("equal-after-sync", f"block {page} differs: {first} and {second}")
                return

    def check_flipped(self, held: Held) -> None:
        """Where a bit was flipped every answered write is there all the same, on both copies, but for that sector."""
        assert held.serving is not None
        for one in self.held.values():
            tags = {
                sector: tag
                for page in self.flipped
                for sector, tag in enumerate(tags_of(one.machine.data.page(page)), page * SECTORS_PER_PAGE)
                if sector not in self.spoilt or self._rewritten(held.serving, sector)
            }
            for violation in self.history.check_contents(held.serving, tags, one.name, time=self.now()):
                self.world.violate("suspect-is-not-dirty", f"beside a flipped bit: {violation}")
                return

    def _rewritten(self, reign: Reign, sector: int) -> bool:
        """Answered after a bit of it was flipped and not lost since, so that nothing of it may be left."""
        reigns = [reign]
        while reigns[-1].loss is Loss.NONE and reigns[-1].parent is not None:
            reigns.append(reigns[-1].parent)
        return any(
            one.writes and one.done_time is not None and one.call_time > self.spoilt[sector] and sector in one.sectors
            for one in self.history.operations
            if one.reign in reigns
        )

    def note_suspects(self) -> None:
        """Look at the suspects: a block is one only for a cause."""
        for page in self._suspects() - self.suspected.keys():
            self.suspected[page] = self.now()
            if page not in self.flipped:
                self.world.violate("no-false-alarm", f"block {page} is suspect, though nothing happened to it")

    def check_suspects(self) -> None:
        """None has gone but by the client's writing the whole block again (invariant suspect-is-not-dirty)."""
        suspects = self._suspects()
        for page, time in self.suspected.items():
            if page not in suspects and self.written_whole.get(page, 0) < time:
                self.world.violate("suspect-is-not-dirty", f"block {page} was suspect, and is no more without a cause")
                return

    def _suspects(self) -> set[int]:
        found = set()
        for held in self.held.values():
            volume = held.machine.volume
            if volume is not None and volume._replica.suspects.any:
                for offset, length in volume._replica.suspects.found.runs():
                    found.update(range(offset // PAGE_BYTES, (offset + length) // PAGE_BYTES))
        return found

    def touches_flipped(self, sectors: range) -> bool:
        return bool(self.flipped) and any(sector // SECTORS_PER_PAGE in self.flipped for sector in sectors)

    def check_history(self) -> None:
        for violation in self.history.check():
            self.world.violate(violation.invariant, str(violation))
            return


def _same(one: dict[int, int], other: dict[int, int]) -> bool:
    """Whether neither lacks anything that was acknowledged."""
    return all(one.get(key, 0) == other.get(key, 0) for key in {*one, *other} if key > 0)


def _known_equal(one: Held, other: Held) -> bool:
    """Both durably stand at one generation, so that neither knows of anything that the other one lacks."""
    mine, theirs = one.known, other.known
    return (
        mine is not None and theirs is not None and (mine.volume_id, mine.current) == (theirs.volume_id, theirs.current)
    )

"""One replica's durable state in memory: superblock, dirty map, activity log, and the books of what is not stable yet.

`books` is the one lock over the maps, the log and the range locks; it is held for microseconds and never across I/O.
What is written as the durable dirty map is always dirty + unstable (invariants log-before-write, clear-after-stable):
blocks that one side may not have on its disk yet are never durably clean.
"""

import dataclasses
import errno
import logging
from collections.abc import Iterable

from mirror.core import generation, layout
from mirror.core.activity_log import ActivityLog
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import DeviceError
from mirror.core.layout import Superblock
from mirror.core.limits import BLOCK_BYTES, EXTENT_BYTES, EXTENTS_PER_PAGE, SUSPECT_PARTS_MAX
from mirror.core.map_pages import Bitmaps
from mirror.core.selection import split, with_parts
from mirror.core.states import LEFT_BEHIND, DiskState, Role
from mirror.durable_map import DurableMap
from mirror.running import Running
from mirror.runtime import Lock, Runtime
from mirror.store import Store
from mirror.suspects import Suspects
from mirror.unproven import Unproven

log = logging.getLogger(__name__)

# Not a broken disk but a full one: the write fails, the replica goes on.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# In place of the boot's identifier: this replica may have lost acknowledged writes, and was neither in step since nor
# the source of a resync.
FORGOTTEN = bytes(16)


class Replica:
    """The state that every part of the mirror shares. `tracked` is False for a volume that has no peer configured."""

    def __init__(
        self,
        runtime: Runtime,
        store: Store,
        superblock: Superblock,
        dirty: DirtyMap,
        activity_log: ActivityLog,
        tracked: bool,
        crashed_primary: bool,
        kept_memory: bool,
        map_pages: dict[int, Bitmaps],
        books: Lock,
        suspects: Suspects,
        unproven: Unproven,
    ) -> None:
        self.runtime = runtime
        self.store = store
        self.superblock = superblock
        self.tracked = tracked
        self.crashed_primary = crashed_primary
        self.kept_memory = kept_memory
        self.role = Role.SECONDARY
        self.failed = superblock.disk is DiskState.FAILED
        self.failure = ""
        self.books = books
        self.changed = runtime.condition(self.books)
        # What clients asked, and what the peer asked, for whoever wants to know what takes so long.
        self.under_way: set[Running] = set()
        self.dirty = dirty
        self.unstable = DirtyMap(superblock.size_bytes)
        self.flushing = DirtyMap(superblock.size_bytes)
        self.suspects = suspects
        self.log = activity_log
        self.unproven = unproven
        self.round = 1
        self._durable = DurableMap(runtime, map_pages, layout.encode_map_page, store.write_map_pages)
        self._superblock_lock = runtime.lock()
        self._sequence = superblock.sequence
        self._suspects_lock = runtime.lock()
        # Of suspect blocks whose parts there was no room to note: the peer gets this side's version.
        self.decided_alone_bytes = 0

    @property
    def size_bytes(self) -> int:
        return self.superblock.size_bytes

    def disk_state(self, connected: bool) -> DiskState:
        """The live disk state; in step, but neither primary nor connected, it can't know that it is the newest."""
        if self.failed:
            return DiskState.FAILED
        if connected or self.role is Role.PRIMARY:
            return self.superblock.disk
        return state_at_rest(self.superblock, self.tracked)

    # The superblock

    def update(self, **changes: object) -> None:
        """Make changes to the superblock durable; when this returns, both copies say so. Raises DeviceError."""
        with self._superblock_lock:
            self._write(dataclasses.replace(self.superblock, **changes))  # type: ignore[arg-type]

    def _write(self, superblock: Superblock) -> None:
        numbered = self._numbered(superblock)
        self.store.write_superblock(layout.encode_superblock(numbered))
        self.superblock = numbered

    def _numbered(self, superblock: Superblock) -> Superblock:
        """No number is used twice, also when a write failed: one of its copies may stand on the disk."""
        self._sequence += 1
        return dataclasses.replace(superblock, sequence=self._sequence)

    def take_role(self, role: Role, **changes: object) -> None:
        """Primary or secondary from now on, also after a crash. Raises DeviceError, and nothing has changed then.

        One step, on disk and in memory: else a resync that ends meanwhile could write the former role over the new one.
        """
        with self._superblock_lock:
            primary = role is Role.PRIMARY or self.crashed_primary
            self._write(dataclasses.replace(self.superblock, primary=primary, **changes))  # type: ignore[arg-type]
            self.role = role

    def define_contents(self, **changes: object) -> None:
        """What both replicas hold is what this one holds: that it crashed as primary, or forgot, is over (duty g9).

        So it is for both once they are in step, and for the source of a resync once its target is durably Inconsistent.
        Not only at the end: the target is UpToDate first, and may become primary, and then answers writes that a power
        cut takes from it, or that it has queued. This replica must not count as one that forgot them, nor as the
        primary that answered them, only because its own last record of the resync was never written.
        Raises DeviceError.
        """
        with self._superblock_lock:
            primary = self.role is Role.PRIMARY
            self._write(
                dataclasses.replace(self.superblock, primary=primary, boot_id=self.runtime.boot_id(), **changes)  # type: ignore[arg-type]
            )
            self.crashed_primary = False
            self.kept_memory = True

    def move_on(self, peer_disk: DiskState, current: int = 0) -> None:
        """Begin a history of our own, durably (invariant record-before-ack-alone)."""
        with self._superblock_lock:
            known = self.superblock
            moved = generation.moved_on(known, current or self.runtime.random_number())
            self._write(
                dataclasses.replace(
                    known,
                    current=moved.current,
                    base=moved.base,
                    history=moved.history,
                    peer_disk=peer_disk,
                    redundancy_lost_at=known.redundancy_lost_at or self.runtime.wall_time_s(),
                )
            )

    def settle_size(self, size_bytes: int) -> None:
        """No resize is under way any more, and the volume has this size: the present one, or the recorded next one.

        What works on the volume meanwhile stays within the old size, so it needs not wait. Raises DeviceError, and
        OperatorError when the data has become smaller since there was room.
        """
        with self._superblock_lock:
            known = self.superblock
            if (known.size_bytes, known.next_size_bytes) == (size_bytes, 0):
                return
            assert size_bytes in (known.size_bytes, known.next_size_bytes), f"nobody has made room for {size_bytes}"
            self.store.check_room(size_bytes)
            settled = self._numbered(dataclasses.replace(known, size_bytes=size_bytes, next_size_bytes=0))
            self.store.write_superblock(layout.encode_superblock(settled))
            with self.books:
                for one in self._maps():
                    one.grow(size_bytes)
                self.suspects.grow(size_bytes)
                self.unproven.grow(layout.Geometry(size_bytes).extents)
                self.store.set_size(size_bytes)
                self.superblock = settled
            if size_bytes == known.size_bytes:
                # Whoever names a next size has made room for it, so nobody is making room now.
                self.store.give_room_back()

    def fail(self, error: DeviceError) -> None:
        """The disk is not to be trusted any more (invariant flush); durable if the metadata can still be written."""
        if self.failed:
            return
        self.failed = True
        self.failure = str(error)
        log.error("this replica's disk is Failed: %s; after repair: nbdmirror invalidate, then serve again", error)
        try:
            self.update(disk=DiskState.FAILED)
        except DeviceError as second:
            log.error("could not record the failure: %s", second)

    def drop_out(self, error: DeviceError) -> None:
        """This disk refused what the peer has: a full one leaves the replica Outdated, any other error Failed."""
        if error.errno not in FULL:
            self.fail(error)
            return
        log.error("%s; this replica drops out until there is room, and then catches up by a resync", error)
        self.failure = str(error)
        if self.superblock.disk is DiskState.UP_TO_DATE:
            try:
                self.update(disk=DiskState.OUTDATED)
            except DeviceError as second:
                self.fail(second)

    def flush(self) -> None:
        """Make this side's data stable. Raises DeviceError, and is Failed then: no later flush could be believed."""
        try:
            self.store.flush()
        except DeviceError as error:
            self.fail(error)
            raise

    # The durable dirty map

    def persist_extents(self, extents: Iterable[int]) -> None:
        """Make the map's pages that hold these extents durable."""
        self._durable.persist({extent // EXTENTS_PER_PAGE for extent in extents}, self._page)

    def persist_map(self) -> None:
        """Make the whole map durable: pages that hold something now, and pages that held something on disk."""
        with self.books:
            pages = {extent // EXTENTS_PER_PAGE for extents in self._maps() for extent in extents.extents()}
        self._durable.persist(pages | self._durable.pages(), self._page)

    def _maps(self) -> tuple[DirtyMap, DirtyMap, DirtyMap]:
        return self.dirty, self.unstable, self.flushing

    def _page(self, page: int) -> Bitmaps:
        first = page * EXTENTS_PER_PAGE
        with self.books:
            return [
                self.dirty.bits(extent) | self.unstable.bits(extent) | self.flushing.bits(extent)
                for extent in range(first, first + EXTENTS_PER_PAGE)
            ]

    def not_in_step(self) -> DirtyMap:
        """A copy of everything that may differ from the peer; call with the books held."""
        union = DirtyMap(self.size_bytes)
        for part in self._maps():
            union.merge(part)
        return with_suspect_parts(union, self.superblock)

    @property
    def dirty_bytes(self) -> int:
        """What the peer is missing; call with the books held."""
        return with_suspect_parts(self.dirty, self.superblock).dirty_bytes

    def own_map(self) -> DirtyMap:
        """The same, for those who do not hold the books."""
        with self.books:
            return self.not_in_step()

    # Suspects that a client writes while the peer is away

    def suspects_written_alone(self, offset: int, length: int) -> None:
        """A client's write that touches suspect blocks is stable here, and the peer lacks it. Raises DeviceError.

        A block that was written whole is dirty and suspect no more. Of a part the range is kept, so that a resync can
        send just that (mirror.core.selection). Call before the write is answered, with its range locked.
        """
        with self.books:
            if not self.suspects.touches(offset, length):
                return
        with self._suspects_lock:
            whole = self._keep_parts(offset, length)
            with self.books:
                # In one step: a handshake may just have taken them out of the map, because they were suspect.
                for run in whole:
                    self.dirty.mark(*run)
                self.suspects.clear(whole)
            first, last = extents_of(offset, length)
            self.persist_extents(range(first, last + 1))
            self.suspects.persist()

    def _keep_parts(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Note durably what of the range is no whole suspect block; returns what is whole by now."""
        ends, whole = split(offset, length)
        with self.books:
            ends = [part for part in ends if self.suspects.touches(*part)]
        if not ends:
            return whole
        parts, completed = with_parts(self.superblock.suspect_parts, ends)
        if len(parts) > SUSPECT_PARTS_MAX:
            blocks = [at // BLOCK_BYTES * BLOCK_BYTES for at, _ in ends]
            log.error(
                "too many parts of suspect blocks were written while the peer is away: the blocks at %s are not suspect"
                " any more, and the peer will get this side's version",
                ", ".join(map(str, blocks)),
            )
            self.decided_alone_bytes += len(blocks) * BLOCK_BYTES
            return [*whole, *((at, BLOCK_BYTES) for at in blocks)]
        self.update(suspect_parts=parts)
        return [*whole, *completed]

    def take_unstable_as_dirty(self) -> None:
        """What the peer has not flushed may be lost there (invariant unstable-is-dirty); call with the books held."""
        self.dirty.merge(self.unstable)
        self.dirty.merge(self.flushing)
        self.unstable.clear_all()
        self.flushing.clear_all()
        self.suspects.link_lost()


def with_suspect_parts(dirty: DirtyMap, superblock: Superblock) -> DirtyMap:
    """With what a client wrote to suspect blocks: apart from the map, so that no resync copies the whole block."""
    if not superblock.suspect_parts:
        return dirty
    union = dirty.copy()
    for part in superblock.suspect_parts:
        union.mark(*part)
    return union


def state_at_rest(superblock: Superblock, tracked: bool) -> DiskState:
    """The disk state of a replica that is neither primary nor connected, served or not."""
    if superblock.disk is not DiskState.UP_TO_DATE or not tracked or not superblock.met_peer:
        return superblock.disk
    return DiskState.UP_TO_DATE if superblock.peer_disk in LEFT_BEHIND else DiskState.CONSISTENT


def extents_of(offset: int, length: int) -> tuple[int, int]:
    """First and last extent that a range touches."""
    return offset // EXTENT_BYTES, (offset + max(length, 1) - 1) // EXTENT_BYTES

"""The unproven extents: those that an activity log has held since both copies were last compared and found equal.

The dirty map may say clean while the disks differ: a lost write, a flipped bit, a bug of ours. What was written lately
is likelier to differ than the rest, so after each handshake exactly these extents are compared (proof by digests, never
by belief), and one bit an extent keeps that set over crashes.

Cheap on the path of writes: an extent that is in the log needs no bit, the log's ring names it. A bit must be durable
only before the log record that evicts its extent, and then the bits of all hot extents are written at once: one
write for a whole turnover of the log. After a crash: the durable bits, the ring's extents, all of them where either is
damaged. A bit goes only when the extent was compared, and what differed is durably suspect on both.

The caller holds the books for all but `persist`.
"""

import logging
from collections.abc import Collection, Iterable

from mirror.core import layout
from mirror.core.activity_log import ActivityLog, DamagedLog, Rebuilt
from mirror.core.errors import DamagedRecord, ProtocolError, UnknownVersion
from mirror.core.extent_set import ExtentSet
from mirror.core.limits import CONTROL_BYTES_MAX, EXTENTS_PER_UNPROVEN_PAGE
from mirror.core.wire import words
from mirror.runtime import Lock, Runtime
from mirror.store import Store

log = logging.getLogger(__name__)

# A run as [first, count] takes some 16 characters in a control message; more of them are summed up as "all".
_RUNS_MAX = CONTROL_BYTES_MAX // 32


class Unproven:
    """Those of one replica; the extents in `activity_log` always count among them.

    `cursor` is the extent where the slow pass over all the rest goes on.
    """

    def __init__(
        self, runtime: Runtime, store: Store, books: Lock, extent_count: int, activity_log: ActivityLog
    ) -> None:
        self.extent_count = extent_count
        self.cursor = 0
        self._held = ExtentSet(extent_count)
        # Taken by a proof that has not finished with them.
        self._proving = ExtentSet(extent_count)
        # What the file surely says.
        self._durable = ExtentSet(extent_count)
        self._durable_pages: dict[int, tuple[int, int]] = {}
        self._log = activity_log
        self._store = store
        self._books = books
        self._lock = runtime.lock()

    # On the path of writes

    def evict(self, extents: Collection[int]) -> bool:
        """These leave the log. False when `persist` must come before the record that says so."""
        self._held.update(extents)
        return all(extent in self._durable for extent in extents)

    # The proof

    def extents(self) -> list[int]:
        """All of them, in order."""
        return list(self._all())

    def _all(self) -> ExtentSet:
        every = self._held.copy()
        every.unite(self._proving)
        every.update(self._log.hot_extents())
        return every

    def add(self, extents: Iterable[int]) -> None:
        """What else is to be compared: what the peer has not proven, what a resync copied."""
        self._held.update(extents)

    def take(self, extent: int) -> None:
        """A proof begins to compare it; what is written to it from now on counts again."""
        self._held.discard(extent)
        self._proving.add(extent)

    def give_back(self) -> None:
        """The proof was cut short."""
        self._held.unite(self._proving)
        self._proving.clear()

    def proven(self, extents: Collection[int]) -> None:
        """Compared, and what differs is durably suspect on both. Durable with the next `persist`."""
        self._proving.difference_update(extents)

    def proven_by_peer(self, extents: Collection[int]) -> None:
        """The same, at the side that is driven: nothing enters its log meanwhile."""
        self._held.difference_update(extents)

    def grow(self, extent_count: int) -> None:
        """The volume has become larger, and the file has room for it (Store.grow_maps)."""
        self.extent_count = extent_count
        for one in (self._held, self._proving, self._durable):
            one.grow(extent_count)

    # On disk

    def persist(self) -> None:
        """Make durable what is not proven now. Raises DeviceError."""
        with self._lock:
            with self._books:
                now = self._all()
                cursor = self.cursor
                # Until the write has ended the file says one or the other: only what both say is sure.
                self._durable.intersect(now)
            pages = self._pages(now, cursor)
            changed = {page: bits for page, bits in pages.items() if self._durable_pages.get(page) != bits}
            if changed:
                self._store.unproven.write(
                    (page, layout.encode_unproven_page(page, *contents)) for page, contents in changed.items()
                )
            with self._books:
                self._durable_pages.update(changed)
                # The volume may have become larger meanwhile.
                now.grow(self.extent_count)
                self._durable = now

    def _pages(self, extents: ExtentSet, cursor: int) -> dict[int, tuple[int, int]]:
        """What the file is to say: page -> (bits, cursor)."""
        return {
            page: (extents.bits(page * EXTENTS_PER_UNPROVEN_PAGE, EXTENTS_PER_UNPROVEN_PAGE), 0 if page else cursor)
            for page in range(self._store.unproven.pages)
        }

    def load(self, ring: Rebuilt | DamagedLog, more: Iterable[int] = ()) -> list[str]:
        """What a start finds, made durable before the ring is given up; returns what the operator should know."""
        notes = []
        self._held.update(more)
        everything = isinstance(ring, DamagedLog)
        if self._store.unproven.exists:
            damaged = self._read()
            if damaged:
                everything = True
                notes.append(f"{self._store.unproven.path} is damaged ({damaged}): the whole volume is to be compared")
        else:
            self._store.unproven.make()
            everything = True
        if everything:
            self._held.update(range(self.extent_count))
        elif isinstance(ring, Rebuilt):
            self._held.update(extent for extent in ring.extents if extent < self.extent_count)
        self.persist()
        return notes

    def _read(self) -> str:
        """Take over the durable bits; why they can't be trusted, or nothing."""
        for index, raw in self._store.unproven.read():
            try:
                bits, cursor = layout.decode_unproven_page(raw, index)
            except (DamagedRecord, UnknownVersion) as error:
                log.error("%s", error)
                return error.message
            self._durable_pages[index] = bits, cursor
            first = index * EXTENTS_PER_UNPROVEN_PAGE
            if bits and first + bits.bit_length() > self.extent_count:
                return f"page {index} names an extent behind the volume"
            self._held.update_bits(first, bits)
            self._durable.update_bits(first, bits)
            if index == 0 and cursor < self.extent_count:
                self.cursor = cursor
        return ""


def encode_runs(extents: list[int]) -> list[list[int]] | str:
    """Sorted extents as [first, count]; "all" for too many runs."""
    runs: list[list[int]] = []
    for extent in extents:
        if runs and runs[-1][0] + runs[-1][1] == extent:
            runs[-1][1] += 1
        else:
            runs.append([extent, 1])
    return runs if len(runs) <= _RUNS_MAX else "all"


def decode_runs(value: object, extent_count: int) -> set[int]:
    """What `encode_runs` made. Raises ProtocolError."""
    if value == "all":
        return set(range(extent_count))
    if not isinstance(value, list) or len(value) > _RUNS_MAX:
        raise ProtocolError("no list of extents where those to be compared were due")
    extents: set[int] = set()
    end = 0
    for run in value:
        if not isinstance(run, list) or len(run) != 2 or not all(type(one) is int for one in run):
            raise ProtocolError("extents to be compared that can't be read")
        first, count = run
        # In their order: else so many runs of the whole volume would take hours to read.
        if first < end or count < 1 or first + count > extent_count:
            raise ProtocolError(f"extents {words(first)} and {words(count)} from there, out of order or of the volume")
        end = first + count
        extents.update(range(first, end))
    return extents

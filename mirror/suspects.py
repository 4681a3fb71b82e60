"""The suspects: blocks that were found different on the two replicas, while nobody knows which side is right.

Not dirty (invariant suspect-is-not-dirty): no resync takes its work from here, and none clears it. A block leaves only
when the operator has named the side that is right and both have the same, or when a client has written the whole block
again on both; either way both must be stable first (clear-after-stable). Both replicas keep them durably, so that they
outlive a promotion and the loss of either side.

    add                    found different: a suspect, durable with `persist`
    written                the whole block stands on both, in memory at least
    begin_round, end_round a flush of both covers what was written before it began
    rewritten              stable on both: the verifier clears it, here and at the peer

What is written and not stable yet is only in memory: a crash leaves it suspect, which costs another look. A block that
is dirty as well is resynced all the same, because a client's answered write may be in it; it stays suspect.

The caller holds the books for all but `persist`.
"""

import logging
from collections.abc import Iterable

from mirror.core import layout
from mirror.core.dirty_map import DirtyMap
from mirror.core.limits import EXTENTS_PER_PAGE, RANGES_SHOWN_MAX
from mirror.core.map_message import add_map
from mirror.core.map_pages import Bitmaps, FoundMap, read_map_pages
from mirror.durable_map import DurableMap
from mirror.runtime import Lock, Runtime
from mirror.store import Store

log = logging.getLogger(__name__)

Runs = list[tuple[int, int]]


class Suspects:
    """Those of one replica. `any` is False as long as there are none: all that the hot path looks at."""

    def __init__(self, runtime: Runtime, store: Store, books: Lock, found: DirtyMap, pages: dict[int, Bitmaps]) -> None:
        self.found = found
        self.any = bool(found.dirty_blocks)
        self.rewritten = DirtyMap(found.size_bytes)
        self._written = DirtyMap(found.size_bytes)
        self._flushing = DirtyMap(found.size_bytes)
        self._books = books
        self._durable = DurableMap(runtime, pages, layout.encode_suspects_page, store.suspects.write)

    def add(self, runs: Iterable[tuple[int, int]]) -> int:
        """Blocks found different; returns the bytes that were no suspects before."""
        before = self.found.dirty_bytes
        for offset, length in runs:
            self.found.mark(offset, length)
            for stage in (self._written, self._flushing, self.rewritten):
                stage.clear(offset, length)
        self.any = bool(self.found.dirty_blocks)
        return self.found.dirty_bytes - before

    def learn(self, runs: Iterable[tuple[int, int]]) -> None:
        """What the peer knows of; what a client has written again here meanwhile is about to be cleared there too."""
        for offset, length in runs:
            self.found.mark(offset, length)
        self.any = bool(self.found.dirty_blocks)

    @property
    def waits_for_flush(self) -> bool:
        """Some were written again whole, and are not stable yet."""
        return bool(self._written.dirty_blocks)

    @property
    def settling_bytes(self) -> int:
        """Those that were written again whole: there is something to do about them."""
        return self._written.dirty_bytes + self.rewritten.dirty_bytes

    def clear(self, runs: Iterable[tuple[int, int]]) -> None:
        for offset, length in runs:
            for stage in (self.found, self._written, self._flushing, self.rewritten):
                stage.clear(offset, length)
        self.any = bool(self.found.dirty_blocks)

    def written(self, offset: int, length: int) -> None:
        """Both replicas hold the same in this range: the suspects that lie wholly in it may go once it is stable."""
        self._written.mark_where(self.found, offset, length)

    def grow(self, size_bytes: int) -> None:
        """The volume has become larger, and the file has room for it (Store.grow_maps)."""
        for stage in (self.found, self._written, self._flushing, self.rewritten):
            stage.grow(size_bytes)

    def begin_round(self) -> None:
        """A flush of both begins."""
        self._flushing.merge(self._written)
        self._written.clear_all()

    def end_round(self) -> None:
        """It ended well, on both."""
        self.rewritten.merge(self._flushing)
        self._flushing.clear_all()

    def link_lost(self) -> None:
        """What was written may be lost on one side: it stays suspect."""
        self._written.clear_all()
        self._flushing.clear_all()

    def persist(self) -> None:
        """Make durable what is suspect now. Raises DeviceError."""
        with self._books:
            pages = {extent // EXTENTS_PER_PAGE for extent in self.found.extents()}
        self._durable.persist(pages | self._durable.pages(), self._page)

    def _page(self, page: int) -> Bitmaps:
        first = page * EXTENTS_PER_PAGE
        with self._books:
            return [self.found.bits(extent) for extent in range(first, first + EXTENTS_PER_PAGE)]

    def status(self) -> dict[str, object]:
        return {"bytes": self.found.dirty_bytes, **shown_ranges(self.found)}


def decode_extents(value: object, size_bytes: int) -> Runs:
    """The runs that a peer named as [extent, bits in hex]. Raises ProtocolError."""
    blocks = DirtyMap(size_bytes)
    add_map(blocks, value, "suspects", "no list of blocks where suspects were due")
    return list(blocks.runs())


def shown_ranges(blocks: DirtyMap) -> dict[str, object]:
    """The first ranges as [offset, length], and whether there are more."""
    ranges: list[list[int]] = []
    for offset, length in blocks.runs():
        if len(ranges) == RANGES_SHOWN_MAX:
            return {"ranges": ranges, "more": True}
        ranges.append([offset, length])
    return {"ranges": ranges, "more": False}


def read_map(store: Store, size_bytes: int) -> FoundMap:
    """The durable suspects; all blocks of damaged pages are among them."""
    found = read_map_pages(store.suspects.read(), layout.decode_suspects_page, size_bytes)
    geometry = layout.Geometry(size_bytes)
    for index, error in found.damaged.items():
        log.error("%s", error)
        for extent in geometry.extents_of_page(index):
            found.blocks.mark_extent(extent)
    return found


def open_suspects(runtime: Runtime, store: Store, books: Lock, size_bytes: int) -> tuple[Suspects, list[str]]:
    """What a start finds, and what the operator should know of it. Raises DeviceError."""
    if not store.suspects.exists:
        store.suspects.make()
        notes = []
        if store.unproven.exists:
            # Without either it is a replica of before there were such files.
            path = store.suspects.path
            notes = [f"{path} was missing: what it may have held is forgotten, and `nbdmirror verify` finds it again"]
        return Suspects(runtime, store, books, DirtyMap(size_bytes), {}), notes
    found = read_map(store, size_bytes)
    suspects = Suspects(runtime, store, books, found.blocks, found.pages)
    if not found.damaged:
        return suspects, []
    suspects.persist()
    pages = ", ".join(map(str, list(found.damaged)[:8]))
    return suspects, [f"pages of {store.suspects.path} can't be read: all their blocks are suspect (pages {pages})"]

"""The suspects: blocks that were found different on the two replicas, while nobody knows which side is right.

Not dirty (invariant suspect-is-not-dirty): no resync takes them for its work, dirty as well or not
(mirror.core.selection), and none clears them. A block leaves only when the operator has named the side that is right
and both have the same, or when a client has written the whole block again; either way what is right must be stable
first (clear-after-stable). Both replicas keep them durably, so that they outlive a promotion and the loss of either.

    add          found different: a suspect, durable with `persist`
    written      both replicas hold the same block, in memory at least: the verifier flushes both, then clears it there
                 and here
    clear        it is none any more

What is written and not cleared yet is only in memory: a crash leaves it suspect, which costs another look.

The caller holds the books for all but `persist`.
"""

import logging
from collections.abc import Iterable

from mirror.core import layout
from mirror.core.dirty_map import DirtyMap
from mirror.core.limits import EXTENTS_PER_PAGE, RANGES_SHOWN_MAX
from mirror.core.map_message import add_map
from mirror.core.map_pages import Bitmaps, read_map_pages
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
        self._books = books
        self._durable = DurableMap(runtime, pages, layout.encode_suspects_page, store.suspects.write)

    def touches(self, offset: int, length: int) -> bool:
        """Whether the range has a part in a suspect block."""
        return self.any and self.found.is_dirty(offset, length)

    def add(self, runs: Iterable[tuple[int, int]]) -> None:
        """Blocks found different."""
        for offset, length in runs:
            self.found.mark(offset, length)
            self.rewritten.clear(offset, length)
        self.any = bool(self.found.dirty_blocks)

    def clear(self, runs: Iterable[tuple[int, int]]) -> None:
        for offset, length in runs:
            self.found.clear(offset, length)
            self.rewritten.clear(offset, length)
        self.any = bool(self.found.dirty_blocks)

    def written(self, offset: int, length: int) -> None:
        """Both replicas hold the same in this range: the suspects that lie wholly in it may go once it is stable."""
        self.rewritten.mark_where(self.found, offset, length)

    def grow(self, size_bytes: int) -> None:
        """The volume has become larger, and the file has room for it (Store.grow_maps)."""
        self.found.grow(size_bytes)
        self.rewritten.grow(size_bytes)

    def link_lost(self) -> None:
        """What was written may be lost on one side: it stays suspect."""
        self.rewritten.clear_all()

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


def open_suspects(
    runtime: Runtime, store: Store, books: Lock, size_bytes: int
) -> tuple[Suspects, list[int], list[str]]:
    """What a start finds; the extents of which it can't be known, to be compared again; what the operator should know.

    A page that can't be read is neither empty nor wholly suspect: a resync would then leave out what a client wrote
    there while the peer was away. The peer may know more and tells it, the proof finds the rest. Raises DeviceError.
    """
    path = store.suspects.path
    if not store.suspects.exists:
        store.suspects.make()
        suspects = Suspects(runtime, store, books, DirtyMap(size_bytes), {})
        if not store.unproven.exists:
            # Without either it is a replica of before there were such files.
            return suspects, [], []
        note = f"{path} was missing: what it may have held is forgotten, and the whole volume is to be compared again"
        return suspects, [*range(layout.Geometry(size_bytes).extents)], [note]
    found = read_map_pages(store.suspects.read(), layout.decode_suspects_page, size_bytes)
    suspects = Suspects(runtime, store, books, found.blocks, found.pages)
    if not found.damaged:
        return suspects, [], []
    for error in found.damaged.values():
        log.error("%s", error)
    pages = ", ".join(map(str, list(found.damaged)[:8]))
    geometry = layout.Geometry(size_bytes)
    forgotten = [extent for index in found.damaged for extent in geometry.extents_of_page(index)]
    note = f"pages of {path} can't be read, so their extents are to be compared again (pages {pages})"
    return suspects, forgotten, [note]

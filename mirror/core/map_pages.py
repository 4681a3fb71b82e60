"""What stands on the disk of a map of blocks: its pages, read at a start or by an inspection."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import DamagedRecord, UnknownVersion
from mirror.core.limits import EXTENTS_PER_PAGE

# Bitmaps of a page's extents.
Bitmaps = list[int]
CLEAN_PAGE: Bitmaps = [0] * EXTENTS_PER_PAGE


class FoundMap(NamedTuple):
    """The blocks that sound pages name, the pages that name some, and why the others can't be believed.

    A ValueError stands for a sound page that names blocks behind the volume.
    """

    blocks: DirtyMap
    pages: dict[int, Bitmaps]
    damaged: dict[int, DamagedRecord | UnknownVersion | ValueError]


def read_map_pages(
    pages: Iterable[tuple[int, bytes]], decode: Callable[[bytes, int], Bitmaps], size_bytes: int
) -> FoundMap:
    """Read (index, page) of the map of a volume of this size; `decode` knows the kind of page."""
    found = FoundMap(DirtyMap(size_bytes), {}, {})
    for index, raw in pages:
        try:
            bitmaps = decode(raw, index)
            for extent, bits in enumerate(bitmaps, index * EXTENTS_PER_PAGE):
                if bits:
                    found.pages[index] = bitmaps
                    found.blocks.set_bits(extent, bits)
        except (DamagedRecord, UnknownVersion, ValueError) as error:
            found.damaged[index] = error
            # Nothing equals this, so the page is written again; and none of it is believed.
            found.pages[index] = []
            for extent in found.blocks.extents():
                if extent // EXTENTS_PER_PAGE == index:
                    found.blocks.set_bits(extent, 0)
    return found

"""Maps of blocks in the JSON that replicas send each other: [[extent, bits in hex], ...], a bounded part at a time."""

from collections.abc import Iterable

from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import ProtocolError
from mirror.core.limits import MAP_EXTENTS_SENT_MAX
from mirror.core.wire import words


def encode_map(blocks: DirtyMap, extents: Iterable[int]) -> list[list[object]]:
    """These extents of a map, as `add_map` reads them."""
    return [[extent, f"{blocks.bits(extent):x}"] for extent in extents]


def encode_part(blocks: DirtyMap, from_extent: int) -> tuple[list[list[object]], int | None]:
    """As much as one message takes from this extent on, and the extent to go on with, None when that was all."""
    extents = [extent for extent in blocks.extents() if extent >= from_extent]
    following = extents[MAP_EXTENTS_SENT_MAX] if len(extents) > MAP_EXTENTS_SENT_MAX else None
    return encode_map(blocks, extents[:MAP_EXTENTS_SENT_MAX]), following


def add_map(blocks: DirtyMap, value: object, what: str, missing: str) -> None:
    """Mark what a peer said. Raises ProtocolError: `missing`, or that `what` can't be read."""
    if not isinstance(value, list) or len(value) > MAP_EXTENTS_SENT_MAX:
        raise ProtocolError(missing)
    try:
        for extent, bits in value:
            if type(extent) is not int or not isinstance(bits, str):
                raise ValueError(f"{words(extent)} and {words(bits)} where an extent and its blocks were due")
            blocks.set_bits(extent, int(bits, 16) | blocks.bits(extent))
    except (TypeError, ValueError, IndexError) as error:
        raise ProtocolError(f"{what} that can't be read: {error}") from error

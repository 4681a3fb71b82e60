"""Small limits, set before anything of the product is imported: a volume of a megabyte has all that a large one has.

Everything that is bounded in the product is met in a short life only if its bound is small: logs of a few slots that
turn over, rings of a few records, maps of several pages, chunks and queues of a few blocks.
"""

import sys

SMALL = {
    "EXTENT_BYTES": 64 * 1024,
    "BLOCKS_PER_EXTENT": 16,
    "PIECE_BYTES_MAX": 128 * 1024,
    "LOG_SLOTS_MIN": 3,
    "LOG_SLOTS_DEFAULT": 6,
    "LOG_SLOTS_MAX": 16,
    "LOG_CHANGES_MAX": 6,
    "LOG_RING_RECORDS": 8,
    "LOG_SLICE": 3,
    "LOG_ROOM_WAIT_S": 0.0005,
    "LEFT_DIRTY_EXTENTS_MAX": 2,
    "COMMITS_MIN": 1,
    "COMMITS_ALIKE_MIN": 1,
    "EVEN_FLUSH_BYTES": 48 * 1024,
    "WRITE_BACK_WINDOW_BYTES": 16 * 1024,
    "EXTENTS_PER_PAGE": 4,
    "ZERO_PIECE_BYTES": 64 * 1024,
    "DURABLE_DESCRIPTORS": 2,
    "METADATA_PIECE_BYTES": 8 * 1024,
    "DATA_STREAMS": 4,
    "PARKED_MAX": 4,
    "SYNC_STREAMS": 2,
    "IN_FLIGHT_COUNT_MAX": 4,
    "IN_FLIGHT_BYTES_MAX": 64 * 1024,
    "SEND_BATCH_COUNT_MAX": 3,
    "READ_ERRORS_MAX": 2,
    "MAP_EXTENTS_SENT_MAX": 5,
    "RESYNC_CHUNK_BYTES": 32 * 1024,
    "RESYNC_HELD_CHUNK_BYTES": 8 * 1024,
    "RESYNC_RUN_BYTES": 4 * 1024,
    "RESYNC_EVIDENCE_BYTES": 4 * 1024,
    "RESYNC_STABLE_BYTES": 64 * 1024,
}

if "mirror.core.layout" not in sys.modules:
    from mirror.core import limits

    for _name, _value in SMALL.items():
        assert hasattr(limits, _name), f"no limit {_name} any more"
        setattr(limits, _name, _value)

from mirror.core import layout, limits  # noqa: E402  after the limits are set

assert SMALL["EXTENTS_PER_PAGE"] == layout.EXTENTS_PER_PAGE, "the product was imported with its own limits before"

"""What a start finds in the metadata, and what it means: two tables, every row with a name and a sentence.

First the two copies of the superblock (`choose_superblock`), because the chosen one says how large the map is and which
records of the log count; then the log and the map under it (`classify`).

Promises: every combination has exactly one row in each table; whatever is damaged makes more dirty, never less; no copy
is chosen while the other one may be a newer program's. Before anything rests on a chosen copy both are to be written
again (`rewrite`): else the next damage could bring back what was no longer true.

What lost: repairing while reading (the start could not be repeated after a crash in it, and `inspect` could not use the
same code), one table over everything (four times the rows for two questions that don't touch each other).
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from mirror.core.activity_log import DamagedLog, Rebuilt
from mirror.core.errors import DamagedRecord, MirrorError, UnknownVersion
from mirror.core.layout import Geometry, Superblock, decode_superblock
from mirror.core.limits import LOG_RING_RECORDS


@dataclass(frozen=True)
class Row:
    """A case: its name for the log, and a sentence on what makes it happen."""

    name: str
    sentence: str


# -- the copies of the superblock -------------------------------------------------------------------------------------


class Copy(enum.Enum):
    """What a copy can be beside the other one."""

    NEWER = "newer"
    OLDER = "older"
    EQUAL = "equal"
    # Sound, with the sequence of the other one, yet not the same.
    CONFLICTING = "conflicting"
    ALONE = "sound beside one that is not"
    DAMAGED = "damaged"
    UNKNOWN = "of an unknown version"


class Use(enum.Enum):
    FIRST = 0
    SECOND = 1
    REFUSE = None


@dataclass(frozen=True)
class CopiesRow(Row):
    use: Use
    rewrite: bool = False
    # Said to the operator; a mere crash between two writes is no news.
    warn: bool = False


_UNKNOWN_VERSION = CopiesRow(
    "unknown-version", "a copy of the superblock was written by a program of another version", Use.REFUSE
)

COPIES: dict[tuple[Copy, Copy], CopiesRow] = {
    (Copy.EQUAL, Copy.EQUAL): CopiesRow("copies-equal", "both copies of the superblock are sound and equal", Use.FIRST),
    (Copy.NEWER, Copy.OLDER): CopiesRow(
        "second-older", "a crash came between the writes of the two copies of the superblock", Use.FIRST, rewrite=True
    ),
    (Copy.OLDER, Copy.NEWER): CopiesRow(
        "first-older",
        "the first copy of the superblock is older, though it is written first: the disk lost a write",
        Use.SECOND,
        rewrite=True,
        warn=True,
    ),
    (Copy.DAMAGED, Copy.ALONE): CopiesRow(
        "first-damaged",
        "the first copy of the superblock is damaged (a crash tore its write, or the disk did); the second one is used",
        Use.SECOND,
        rewrite=True,
        warn=True,
    ),
    (Copy.ALONE, Copy.DAMAGED): CopiesRow(
        "second-damaged",
        "the second copy of the superblock is damaged (a crash tore its write, or the disk did); the first one is used",
        Use.FIRST,
        rewrite=True,
        warn=True,
    ),
    (Copy.CONFLICTING, Copy.CONFLICTING): CopiesRow(
        "copies-conflict", "both copies of the superblock are sound and of the same number, yet they differ", Use.REFUSE
    ),
    (Copy.DAMAGED, Copy.DAMAGED): CopiesRow("both-damaged", "both copies of the superblock are damaged", Use.REFUSE),
    (Copy.UNKNOWN, Copy.UNKNOWN): _UNKNOWN_VERSION,
    # Whichever is newer, an older program may not go back behind what a newer one has begun to write.
    (Copy.UNKNOWN, Copy.ALONE): _UNKNOWN_VERSION,
    (Copy.ALONE, Copy.UNKNOWN): _UNKNOWN_VERSION,
    (Copy.UNKNOWN, Copy.DAMAGED): _UNKNOWN_VERSION,
    (Copy.DAMAGED, Copy.UNKNOWN): _UNKNOWN_VERSION,
}


@dataclass(frozen=True)
class Copies:
    """Which superblock counts, or why none does; `rewrite`: write both copies before anything rests on it."""

    row: Row
    superblock: Superblock | None
    rewrite: bool
    warning: str
    refusal: MirrorError | None


_Found = Superblock | DamagedRecord | UnknownVersion


def choose_superblock(first_raw: bytes, second_raw: bytes) -> Copies:
    """Decide between the two copies as they stand in the metadata file."""
    first, second = _decode(first_raw), _decode(second_raw)
    row = COPIES[_compare(first, second), _compare(second, first)]
    chosen = {Use.FIRST: first, Use.SECOND: second, Use.REFUSE: None}[row.use]
    if isinstance(chosen, Superblock):
        return Copies(row, chosen, row.rewrite, row.sentence if row.warn else "", None)
    return Copies(row, None, False, "", _refusal(row, first, second))


def _decode(raw: bytes) -> _Found:
    try:
        return decode_superblock(raw)
    except (DamagedRecord, UnknownVersion) as error:
        return error


def _compare(one: _Found, other: _Found) -> Copy:
    if isinstance(one, DamagedRecord):
        return Copy.DAMAGED
    if isinstance(one, UnknownVersion):
        return Copy.UNKNOWN
    if not isinstance(other, Superblock):
        return Copy.ALONE
    if one == other:
        return Copy.EQUAL
    if one.sequence == other.sequence or one.replica_id != other.replica_id:
        return Copy.CONFLICTING
    return Copy.NEWER if one.sequence > other.sequence else Copy.OLDER


def _refusal(row: Row, first: _Found, second: _Found) -> MirrorError:
    for found in (first, second):
        if isinstance(found, UnknownVersion):
            return found
    whys = [found.why for found in (first, second) if isinstance(found, DamagedRecord)]
    return MirrorError(
        row.sentence + (f": {'; '.join(dict.fromkeys(whys))}" if whys else ""),
        remedy="restore the metadata file from a backup, or make this replica anew with `nbdmirror create --join`"
        " beside a good peer; the data itself was not touched",
    )


# -- the log and the map under it -------------------------------------------------------------------------------------


class Log(enum.Enum):
    EMPTY = "empty"
    EXTENTS = "extents"
    DAMAGED = "damaged"


class Dirty(enum.Enum):
    """What the log makes dirty."""

    NOTHING = "nothing"
    EXTENTS = "the log's extents"
    ALL = "all"


@dataclass(frozen=True)
class StateRow(Row):
    dirty: Dirty
    crashed: bool
    warn: bool = False


_CLEAN = StateRow(
    "clean", "the replica was stopped in order, so its log names nothing that counts", Dirty.NOTHING, False
)
_CLEAN_LOG_DAMAGED = StateRow(
    "clean-log-damaged",
    "the activity log is damaged; the replica was stopped in order, so nothing rested on it",
    Dirty.NOTHING,
    False,
    warn=True,
)
_LOG_DAMAGED = "the activity log can't be read after a crash, so any block may differ: all of the volume is compared"
_CLEAN_UNRESOLVED = StateRow(
    "clean-after-crash",
    "a primary that crashed was stopped in order before it met its peer again, so its crash is not resolved yet",
    Dirty.NOTHING,
    False,
)

# (clean, primary, log)
STATES: dict[tuple[bool, bool, Log], StateRow] = {
    (True, False, Log.EMPTY): _CLEAN,
    (True, False, Log.EXTENTS): _CLEAN,
    (True, False, Log.DAMAGED): _CLEAN_LOG_DAMAGED,
    (False, True, Log.EMPTY): StateRow(
        "primary-crashed-idle", "the primary crashed and nothing had been written in its reign", Dirty.NOTHING, True
    ),
    (False, True, Log.EXTENTS): StateRow(
        "primary-crashed", "the primary crashed; the extents of its log may differ from the peer's", Dirty.EXTENTS, True
    ),
    (False, True, Log.DAMAGED): StateRow("primary-crashed-log-damaged", _LOG_DAMAGED, Dirty.ALL, True, warn=True),
    (False, False, Log.EMPTY): StateRow(
        "secondary-crashed-idle", "the secondary crashed and nothing had been written to it", Dirty.NOTHING, True
    ),
    (False, False, Log.EXTENTS): StateRow(
        "secondary-crashed",
        "the secondary crashed; the extents of its log may hold what was not flushed, or lack it",
        Dirty.EXTENTS,
        True,
    ),
    (False, False, Log.DAMAGED): StateRow("secondary-crashed-log-damaged", _LOG_DAMAGED, Dirty.ALL, True, warn=True),
    (True, True, Log.EMPTY): _CLEAN_UNRESOLVED,
    (True, True, Log.EXTENTS): _CLEAN_UNRESOLVED,
    (True, True, Log.DAMAGED): _CLEAN_LOG_DAMAGED,
}

MAP_DAMAGED = Row(
    "map-pages-damaged",
    "pages of the dirty map can't be read (a crash tore a write, or the disk did): all their blocks count as dirty",
)
LOG_TORN = Row(
    "log-record-torn", "a crash tore the newest record of the log: what it would have granted was never written"
)


@dataclass(frozen=True)
class Recovery:
    """What to do before the replica is used: mark `dirty` and `pages`, make that durable, then mend the ring.

    `rows` name all that was found. `pages`: every extent of these map pages is dirty, whatever `dirty` says. `mend`:
    ring positions to be blanked. `crashed`: the last run did not end in a stop.
    """

    rows: tuple[Row, ...]
    crashed: bool
    crashed_primary: bool
    dirty: Dirty
    extents: frozenset[int]
    pages: tuple[int, ...]
    mend: tuple[int, ...]
    warnings: tuple[str, ...]


def classify(superblock: Superblock, log: Rebuilt | DamagedLog, damaged_pages: Sequence[int]) -> Recovery:
    """What the log (of the superblock's epoch) and the map mean."""
    if isinstance(log, Rebuilt) and max(log.extents, default=0) >= Geometry(superblock.size_bytes).extents:
        log = DamagedLog(f"it names extent {max(log.extents)}, which is outside the volume", ())
    damaged = isinstance(log, DamagedLog)
    kind = Log.DAMAGED if isinstance(log, DamagedLog) else Log.EXTENTS if log.extents else Log.EMPTY
    row = STATES[superblock.clean, superblock.primary, kind]
    rows: list[Row] = [row]
    warnings = [f"{row.sentence} ({log.why})" if isinstance(log, DamagedLog) else row.sentence] if row.warn else []
    mend: tuple[int, ...] = tuple(range(LOG_RING_RECORDS)) if damaged else ()
    if isinstance(log, Rebuilt) and log.torn is not None:
        rows.append(LOG_TORN)
        mend = (log.torn,)
    if damaged_pages:
        rows.append(MAP_DAMAGED)
        warnings.append(f"{MAP_DAMAGED.sentence} (pages {', '.join(map(str, damaged_pages[:8]))})")
    return Recovery(
        rows=tuple(rows),
        crashed=row.crashed,
        crashed_primary=superblock.primary,
        dirty=row.dirty,
        extents=log.extents if isinstance(log, Rebuilt) and row.dirty is Dirty.EXTENTS else frozenset(),
        pages=tuple(damaged_pages),
        mend=mend,
        warnings=tuple(warnings),
    )

"""A replica's metadata as it stands on disk, for `inspect`, and for `status` when nothing serves it. Changes nothing.

It uses the tables by which a start decides (mirror.core.recovery), so it can't say anything else than a start would.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirror.core import layout, recovery
from mirror.core.activity_log import ActivityLog, DamagedLog, Rebuilt
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import DamagedRecord, UnknownVersion
from mirror.core.layout import LogRecord, Superblock
from mirror.core.map_pages import read_map_pages
from mirror.core.recovery import Copies, Dirty, Recovery
from mirror.core.states import DiskState
from mirror.replica import state_at_rest, with_suspect_parts
from mirror.store import SUSPECTS_NAME, UNPROVEN_NAME, Store
from mirror.suspects import shown_ranges
from nbd_server.config import Config
from nbd_server.status import iso_time, last_resync, last_verify, resize, suspects_warning

Damage = DamagedRecord | UnknownVersion

# What it means that one of the maps is not there.
MISSING = {
    SUSPECTS_NAME: (
        "it is missing: which blocks were found different is forgotten here; the next serve makes it anew, the peer "
        "tells what it knows, and all of the volume is compared"
    ),
    UNPROVEN_NAME: (
        "it is missing: what was written since the last comparison is forgotten; the next serve makes it anew, and "
        "all of the volume is compared"
    ),
}


@dataclass(frozen=True)
class Body:
    """What the superblock leads to: the log, the map, and what a start would make of them."""

    log_records: list[LogRecord | Damage]
    log: Rebuilt | DamagedLog
    dirty: DirtyMap
    damaged_pages: dict[int, Damage]
    found: Recovery
    suspects: DirtyMap
    damaged_suspects: list[int]
    unproven_extents: int
    damaged_unproven: dict[int, Damage]
    # Names of files that are not there.
    missing: list[str]


@dataclass(frozen=True)
class Metadata:
    """DIR/meta. Without a superblock that counts there is no `body`."""

    first: Superblock | Damage
    second: Superblock | Damage
    copies: Copies
    body: Body | None


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[Store]:
    store = Store.open(directory, None)
    try:
        yield store
    finally:
        store.close()


def read(directory: Path) -> Metadata:
    """All of DIR/meta, damaged or not. Raises MirrorError when there is no such file."""
    with _opened(directory) as store:
        first, second = store.read_superblock_copies()
        copies = recovery.choose_superblock(first, second)
        body = None if copies.superblock is None else _read_body(store, copies.superblock)
    return Metadata(_superblock(first), _superblock(second), copies, body)


def _read_body(store: Store, superblock: Superblock) -> Body:
    store.set_size(superblock.size_bytes)
    raw_log = store.read_log()
    dirty, _, unreadable = read_map_pages(store.read_map(), layout.decode_map_page, superblock.size_bytes)
    # A ValueError: sound, but it names blocks behind the volume.
    damaged = {
        index: DamagedRecord(f"map page {index}", str(error)) if isinstance(error, ValueError) else error
        for index, error in unreadable.items()
    }
    log = ActivityLog.rebuild(raw_log, superblock.log_epoch)
    found = recovery.classify(superblock, log, list(damaged))
    suspects, damaged_suspects = DirtyMap(superblock.size_bytes), list[int]()
    if store.suspects.exists:
        pages = read_map_pages(store.suspects.read(), layout.decode_suspects_page, superblock.size_bytes)
        suspects, damaged_suspects = pages.blocks, list(pages.damaged)
    unproven_extents, damaged_unproven = _read_unproven(store)
    return Body(
        [_log_record(raw) for raw in raw_log],
        log,
        dirty,
        damaged,
        found,
        suspects,
        damaged_suspects,
        unproven_extents,
        damaged_unproven,
        [file.path.name for file in (store.suspects, store.unproven) if not file.exists],
    )


def _read_unproven(store: Store) -> tuple[int, dict[int, Damage]]:
    """How many extents the file names, and its damaged pages."""
    count, damaged = 0, dict[int, Damage]()
    if store.unproven.exists:
        for index, raw in store.unproven.read():
            try:
                count += layout.decode_unproven_page(raw, index)[0].bit_count()
            except (DamagedRecord, UnknownVersion) as error:
                damaged[index] = error
    return count, damaged


def _superblock(raw: bytes) -> Superblock | Damage:
    try:
        return layout.decode_superblock(raw)
    except (DamagedRecord, UnknownVersion) as error:
        return error


def _log_record(raw: bytes) -> LogRecord | Damage:
    try:
        return layout.decode_log_record(raw)
    except (DamagedRecord, UnknownVersion) as error:
        return error


def status(directory: Path, config: Config) -> dict[str, Any]:
    """The keys of `nbdmirror status`, from disk. Raises MirrorError when no superblock counts."""
    metadata = read(directory)
    known, body = metadata.copies.superblock, metadata.body
    if known is None or body is None:
        assert metadata.copies.refusal is not None
        raise metadata.copies.refusal
    suspects: dict[str, Any] = {"bytes": body.suspects.dirty_bytes, **shown_ranges(body.suspects)}
    peer_disk = known.peer_disk.value if known.peer_disk not in (None, DiskState.UP_TO_DATE) else None
    return {
        "name": known.name,
        "size": known.size_bytes,
        "serving": False,
        "role": None,
        "disk": state_at_rest(known, config.peer is not None).value,
        "connection": None,
        "peer": {"address": str(config.peer) if config.peer else None, "role": None, "disk": peer_disk},
        "protocol": config.protocol,
        "plan": None,
        "retry": None,
        "generation": f"{known.current:016x}",
        "dirty_bytes": with_suspect_parts(dirty_at_start(known, body), known).dirty_bytes,
        "resync": None,
        "last_resync": last_resync(known.last_resync),
        "suspects": suspects,
        "proof": None,
        "verify": None,
        "last_verify": last_verify(known.last_verify, running=False),
        "resize": resize(known, ""),
        "activity_log": {
            "extents": known.log_slots,
            "used": len(body.log.extents) if isinstance(body.log, Rebuilt) and body.found.crashed else 0,
            "hits": None,
            "misses": None,
            **dict.fromkeys(("miss_rate", "resync_s", "goal_s", "bytes_per_s", "reason", "smaller", "larger")),
        },
        "spin": {"setting": config.spin, "pays": None},
        "io": None,
        "latency": None,
        "clients": {},
        "compiled": None,
        "warnings": [
            *suspects_warning(suspects),
            *_data_warnings(config, directory, known),
            *_warnings(config, known, metadata.copies, body),
        ],
    }


def dirty_at_start(known: Superblock, body: Body) -> DirtyMap:
    """What a start would count as dirty: the map, damaged pages, and after a crash the extents of the log."""
    dirty = DirtyMap(known.size_bytes)
    dirty.merge(body.dirty)
    geometry = layout.Geometry(known.size_bytes)
    if body.found.dirty is Dirty.ALL:
        dirty.mark_all()
    for extent in body.found.extents:
        dirty.mark_extent(extent)
    for page in body.found.pages:
        for extent in geometry.extents_of_page(page):
            dirty.mark_extent(extent)
    return dirty


def _data_warnings(config: Config, directory: Path, known: Superblock) -> Iterator[str]:
    path = config.data_path(directory)
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        yield f"{path} can't be read: {error.strerror}"
        return
    if size < known.size_bytes:
        yield f"{path} has {size} bytes, the volume {known.size_bytes}: it was truncated or replaced"


def _warnings(config: Config, known: Superblock, copies: Copies, body: Body) -> Iterator[str]:
    if copies.warning:
        yield copies.warning
    if body.found.crashed:
        role = "primary" if known.primary else "secondary"
        yield f"it was not stopped in order while it was {role}: its next start recovers it"
    yield from body.found.warnings
    for name in body.missing:
        yield f"{name}: {MISSING[name]}"
    if config.peer is None:
        yield "this volume stands alone: it has no redundancy"
    elif known.redundancy_lost_at:
        yield f"redundancy is lost since {iso_time(known.redundancy_lost_at)}"
    if known.name != config.name:
        yield f"volume.toml names the volume {config.name!r}, its metadata {known.name!r}"

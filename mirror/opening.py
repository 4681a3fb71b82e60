"""How a replica comes back: read its metadata, decide by the table of `mirror.core.recovery` what it means, make that
durable.

Blocks that may differ are durably dirty before the log that named them is given up (invariant log-before-write), and
a new log epoch begins empty. What was parked on a copy in step when the process was killed is applied, because it may
have been answered, once its blocks are durably dirty, because its record may never have been written. Opening twice, or
crashing at any point of it, gives the same result.
"""

import logging
from pathlib import Path

from mirror.core import layout, recovery
from mirror.core.activity_log import ActivityLog
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import DeviceError, OperatorError
from mirror.core.layout import Superblock
from mirror.core.log_size import ReuseCurve
from mirror.core.map_pages import read_map_pages
from mirror.core.parked import ParkedWrite
from mirror.core.recovery import Dirty, Recovery
from mirror.core.states import DiskState
from mirror.replica import FORGOTTEN, Replica
from mirror.runtime import Runtime
from mirror.store import Store
from mirror.suspects import open_suspects
from mirror.unproven import Unproven

log = logging.getLogger(__name__)


def open_replica(
    runtime: Runtime,
    directory: Path,
    data_path: Path,
    *,
    name: str,
    protocol: str,
    log_slots: int | None,
    tracked: bool,
    memory_kept: bool,
) -> tuple[Replica, list[str]]:
    """The replica, and what its operator should know of it. Raises MirrorError that names what is wrong.

    `log_slots` None: as many as the log had before.
    """
    store = Store.open(directory, data_path, runtime=runtime)
    try:
        superblock, notes = read_superblock(store)
        if superblock.name != name:
            raise OperatorError(
                f"{directory}: volume.toml names the volume {name!r}, its metadata {superblock.name!r}",
                remedy=f'write name = "{superblock.name}" in volume.toml: a volume keeps the name it was created with',
            )
        store.set_size(superblock.size_bytes)
        dirty, map_pages, damaged_pages = read_map_pages(
            store.read_map(), layout.decode_map_page, superblock.size_bytes
        )
        for index, damage in damaged_pages.items():
            log.error("page %d of the dirty map: %s", index, damage)
        ring = ActivityLog.rebuild(store.read_log(), superblock.log_epoch)
        found = recovery.classify(superblock, ring, list(damaged_pages))
        _mark(dirty, found, superblock.size_bytes)
        for row in found.rows:
            log.info("start: %s (%s)", row.name, row.sentence)
        known_boot = superblock.boot_id != FORGOTTEN
        same_boot = superblock.boot_id == runtime.boot_id()
        kept = known_boot and (not found.crashed or (memory_kept and same_boot))
        parked: dict[int, ParkedWrite] = {}
        if same_boot and found.crashed and superblock.disk is DiskState.UP_TO_DATE:
            try:
                # First: the disk may have lost some of it, also where it seems to hold nothing.
                store.parked.check_no_write_lost()
                parked = store.parked.read(superblock.log_epoch)
            except DeviceError as error:
                log.error("what was parked may be lost: %s", error)
                kept = False
        for write in parked.values():
            dirty.mark(write.offset, len(write.data))
        books = runtime.lock()
        extents = layout.Geometry(superblock.size_bytes).extents
        slots = superblock.log_slots if log_slots is None else log_slots
        activity_log = ActivityLog(slots, epoch=superblock.log_epoch + 1, reuse=ReuseCurve(extents))
        suspects, forgotten, suspect_notes = open_suspects(runtime, store, books, superblock.size_bytes)
        unproven = Unproven(runtime, store, books, extents, activity_log)
        notes += [*suspect_notes, *unproven.load(ring, forgotten)]
        # Only now: what a page held that can't be read is to be compared, and that is durable.
        suspects.persist()
        replica = Replica(
            runtime,
            store,
            superblock,
            dirty,
            activity_log,
            tracked=tracked,
            crashed_primary=found.crashed_primary,
            kept_memory=kept,
            map_pages=map_pages,
            books=books,
            suspects=suspects,
            unproven=unproven,
        )
        replica.persist_map()
        _apply_parked(replica, parked)
        store.reset_log(found.mend)
        replica.update(
            log_epoch=superblock.log_epoch + 1,
            log_slots=slots,
            protocol=protocol,
            clean=False,
            # Once forgotten, always forgotten until the peer has brought everything back, or counts no more (duty g9).
            boot_id=runtime.boot_id() if kept else FORGOTTEN,
            incarnation=superblock.incarnation if kept else runtime.random_number(),
        )
    except BaseException:
        store.close()
        raise
    return replica, [*notes, *found.warnings]


def _apply_parked(replica: Replica, parked: dict[int, ParkedWrite]) -> None:
    """Writes that the peer may have answered; nothing has been written to their blocks since they came."""
    if not parked:
        return
    try:
        for slot, write in parked.items():
            replica.store.write(write.data, write.offset, False)
            replica.store.parked.drop(slot)
    except DeviceError as error:
        replica.drop_out(error)
    else:
        log.info("start: %d writes were parked and are applied now", len(parked))


def read_superblock(store: Store) -> tuple[Superblock, list[str]]:
    """The superblock that counts, and what there is to say about its copies; both copies are whole afterwards."""
    choice = recovery.choose_superblock(*store.read_superblock_copies())
    if choice.superblock is None:
        assert choice.refusal is not None
        raise choice.refusal
    if choice.rewrite:
        store.write_superblock(layout.encode_superblock(choice.superblock))
    return choice.superblock, [choice.warning] if choice.warning else []


def _mark(dirty: DirtyMap, found: Recovery, size_bytes: int) -> None:
    geometry = layout.Geometry(size_bytes)
    if found.dirty is Dirty.ALL:
        dirty.mark_all()
    elif found.dirty is Dirty.EXTENTS:
        for extent in found.extents:
            dirty.mark_extent(extent)
    for page in found.pages:
        for extent in geometry.extents_of_page(page):
            dirty.mark_extent(extent)

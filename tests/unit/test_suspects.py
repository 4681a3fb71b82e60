"""Suspects and unproven extents: their stages, their files, what damage means, and what is durable before what."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from mirror.core import layout
from mirror.core.activity_log import ActivityLog, DamagedLog, Rebuilt
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import DamagedRecord, ProtocolError
from mirror.core.limits import BLOCK_BYTES, EXTENT_BYTES, EXTENTS_PER_PAGE, EXTENTS_PER_UNPROVEN_PAGE, RECORD_BYTES
from mirror.log_writer import LogWriter
from mirror.runtime import Runtime
from mirror.store import DATA_NAME, SUSPECTS_NAME, UNPROVEN_NAME, Store, create_replica_files
from mirror.suspects import Suspects, decode_extents, open_suspects
from mirror.unproven import Unproven, decode_runs, encode_runs

# Two pages of suspects.
SIZE_BYTES = (EXTENTS_PER_PAGE + 5) * EXTENT_BYTES
EXTENTS = EXTENTS_PER_PAGE + 5
SECOND_PAGE = EXTENTS_PER_PAGE * EXTENT_BYTES


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    create_replica_files(tmp_path, SIZE_BYTES, None, bytes(RECORD_BYTES))
    return tmp_path


def opened(directory: Path, forgotten: list[int] | None = None) -> tuple[Store, Suspects, list[str]]:
    """Those whose extents are to be compared again go to `forgotten`."""
    runtime = Runtime()
    store = Store.open(directory, directory / DATA_NAME, SIZE_BYTES, runtime)
    suspects, extents, notes = open_suspects(runtime, store, runtime.lock(), SIZE_BYTES)
    if forgotten is None:
        assert extents == []
    else:
        forgotten[:] = extents
    return store, suspects, notes


def found(suspects: Suspects) -> list[tuple[int, int]]:
    return list(suspects.found.runs())


# -- suspects ---------------------------------------------------------------------------------------------------------


def test_they_are_durable_over_a_restart_and_so_is_their_clearing(directory: Path) -> None:
    store, suspects, notes = opened(directory)
    assert (suspects.any, notes) == (False, [])
    suspects.add([(4096, 4096), (SECOND_PAGE, 8192)])
    assert suspects.any
    suspects.persist()
    store.close()
    store, suspects, notes = opened(directory)
    assert (suspects.any, notes) == (True, [])
    assert found(suspects) == [(4096, 4096), (SECOND_PAGE, 8192)]
    suspects.clear([(SECOND_PAGE, 8192)])
    suspects.persist()
    store.close()
    store, suspects, _ = opened(directory)
    assert found(suspects) == [(4096, 4096)]
    store.close()


@pytest.mark.parametrize("damage", ["flip", "short", "zero"])
def test_a_damaged_page_is_neither_empty_nor_suspect_but_to_be_compared(directory: Path, damage: str) -> None:
    """All suspect would leave out what a client wrote there alone (it is dirty, and no resync copies a suspect)."""
    store, suspects, _ = opened(directory)
    suspects.add([(4096, 4096), (SECOND_PAGE, 8192)])
    suspects.persist()
    store.close()
    path = directory / SUSPECTS_NAME
    if damage == "short":
        os.truncate(path, RECORD_BYTES)
    else:
        with path.open("r+b") as file:
            file.seek(RECORD_BYTES + 100 if damage == "flip" else RECORD_BYTES)
            file.write(b"!" if damage == "flip" else bytes(RECORD_BYTES))
    forgotten: list[int] = []
    for _ in range(2):
        # The second time too, as long as nobody has made the page durable.
        store, suspects, notes = opened(directory, forgotten)
        assert found(suspects) == [(4096, 4096)]
        assert forgotten == list(range(EXTENTS_PER_PAGE, EXTENTS))
        assert "compared again" in notes[0]
        store.close()
    store, suspects, _ = opened(directory, forgotten)
    suspects.persist()
    store.close()
    store, suspects, notes = opened(directory)
    assert (found(suspects), notes) == ([(4096, 4096)], [])
    store.close()


def test_an_old_replica_has_none_a_lost_file_is_told(directory: Path) -> None:
    (directory / SUSPECTS_NAME).unlink()
    forgotten: list[int] = []
    store, suspects, notes = opened(directory, forgotten)
    assert not suspects.any
    assert "missing" in notes[0]
    assert forgotten == list(range(EXTENTS))
    store.close()
    (directory / SUSPECTS_NAME).unlink()
    (directory / UNPROVEN_NAME).unlink()
    store, suspects, notes = opened(directory)
    assert (suspects.any, notes) == (False, [])
    store.close()


def test_a_block_may_go_only_when_it_was_written_whole(directory: Path) -> None:
    store, suspects, _ = opened(directory)
    suspects.add([(0, 3 * BLOCK_BYTES)])
    suspects.written(100, 2 * BLOCK_BYTES)  # whole is only the block in the middle
    assert list(suspects.rewritten.runs()) == [(BLOCK_BYTES, BLOCK_BYTES)]
    suspects.add([(BLOCK_BYTES, BLOCK_BYTES)])  # found different once more
    assert not suspects.rewritten.dirty_blocks
    suspects.written(0, BLOCK_BYTES)
    suspects.link_lost()
    assert not suspects.rewritten.dirty_blocks
    assert suspects.found.dirty_bytes == 3 * BLOCK_BYTES
    suspects.written(8 * BLOCK_BYTES, BLOCK_BYTES)
    assert not suspects.rewritten.dirty_blocks, "never suspect"
    assert suspects.touches(3 * BLOCK_BYTES - 1, 1)
    assert not suspects.touches(3 * BLOCK_BYTES, BLOCK_BYTES)
    store.close()


def test_what_a_peer_says_is_checked() -> None:
    assert decode_extents([[1, "3"]], SIZE_BYTES) == [(EXTENT_BYTES, 2 * BLOCK_BYTES)]
    for wrong in (
        None,
        "x",
        [[1]],
        [["1", "3"]],
        [[EXTENTS, "1"]],
        [[0, "-1"]],
        [[0, "xyz"]],
        [[0, 3]],
        [1],
        [[True, "1"]],
    ):
        with pytest.raises(ProtocolError):
            decode_extents(wrong, SIZE_BYTES)


def test_pages_are_not_taken_for_those_of_another_kind() -> None:
    page = layout.encode_map_page(0, [1] * EXTENTS_PER_PAGE)
    with pytest.raises(DamagedRecord):
        layout.decode_suspects_page(page, 0)
    with pytest.raises(DamagedRecord):
        layout.decode_unproven_page(page, 0)
    suspects_page = layout.encode_suspects_page(0, [5] * EXTENTS_PER_PAGE)
    assert layout.decode_suspects_page(suspects_page, 0) == [5] * EXTENTS_PER_PAGE
    with pytest.raises(DamagedRecord):
        layout.decode_suspects_page(suspects_page, 1)
    unproven = layout.encode_unproven_page(0, 1 << EXTENTS_PER_UNPROVEN_PAGE - 1, cursor=7)
    assert layout.decode_unproven_page(unproven, 0) == (1 << EXTENTS_PER_UNPROVEN_PAGE - 1, 7)
    for damaged in (unproven[:-1], bytes(RECORD_BYTES), unproven[:200] + b"!" + unproven[201:]):
        with pytest.raises(DamagedRecord):
            layout.decode_unproven_page(damaged, 0)


def test_maps_grow_with_blank_pages_and_may_be_grown_again(directory: Path) -> None:
    store, suspects, _ = opened(directory)
    suspects.add([(0, 4096)])
    suspects.persist()
    larger = 4 * SIZE_BYTES
    for _ in range(2):
        store.grow_maps(larger)
    # A live replica: from now on its new blocks may be suspect, too.
    suspects.grow(larger)
    suspects.add([(larger - BLOCK_BYTES, BLOCK_BYTES)])
    suspects.persist()
    store.close()
    runtime = Runtime()
    os.truncate(directory / DATA_NAME, larger)
    store = Store.open(directory, directory / DATA_NAME, larger, runtime)
    suspects, _, notes = open_suspects(runtime, store, runtime.lock(), larger)
    assert (found(suspects), notes) == ([(0, 4096), (larger - BLOCK_BYTES, BLOCK_BYTES)], [])
    store.close()


# -- unproven ---------------------------------------------------------------------------------------------------------


def unproven_of(directory: Path, ring: Rebuilt | DamagedLog, slots: int = 4) -> tuple[Store, ActivityLog, Unproven]:
    runtime = Runtime()
    store = Store.open(directory, directory / DATA_NAME, SIZE_BYTES, runtime)
    activity_log = ActivityLog(slots, epoch=1)
    unproven = Unproven(runtime, store, runtime.lock(), EXTENTS, activity_log)
    unproven.load(ring)
    return store, activity_log, unproven


def ring_of(*extents: int) -> Rebuilt:
    return Rebuilt(frozenset(extents), 1, (), None)


def test_after_a_crash_they_are_the_durable_bits_and_what_the_ring_names(directory: Path) -> None:
    store, _, unproven = unproven_of(directory, ring_of())
    assert unproven.extents() == []
    assert unproven.evict([3]) is False, "its bit is not durable yet"
    unproven.persist()
    assert unproven.evict([3]) is True
    assert unproven.evict([4]) is False
    store.close()
    store, _, unproven = unproven_of(directory, ring_of(7))
    assert unproven.extents() == [3, 7]
    store.close()
    store, _, unproven = unproven_of(directory, ring_of())
    assert unproven.extents() == [3, 7], "the ring of the former epoch is durable as bits"
    store.close()


@pytest.mark.parametrize("damage", ["page", "missing", "ring"])
def test_what_is_damaged_makes_all_of_them_unproven(directory: Path, damage: str) -> None:
    path = directory / UNPROVEN_NAME
    if damage == "page":
        path.write_bytes(bytes(RECORD_BYTES))
    elif damage == "missing":
        path.unlink()
    store, _, unproven = unproven_of(directory, DamagedLog("torn", ()) if damage == "ring" else ring_of())
    assert unproven.extents() == list(range(EXTENTS))
    store.close()


def test_what_is_written_while_it_is_proven_counts_again(directory: Path) -> None:
    store, activity_log, unproven = unproven_of(directory, ring_of(1, 2, 3))
    unproven.take(1)
    unproven.take(2)
    unproven.evict([2])  # written again, and out of the log, while it is compared
    unproven.proven([1, 2])
    assert unproven.extents() == [2, 3]
    unproven.take(3)
    unproven.persist()
    store.close()
    store, activity_log, unproven = unproven_of(directory, ring_of())
    assert unproven.extents() == [2, 3], "a proof that was cut short proves nothing"
    unproven.take(2)
    unproven.give_back()
    assert unproven.extents() == [2, 3]
    assert activity_log.hot_extents() == set()
    store.close()


def test_extents_in_the_log_always_count(directory: Path) -> None:
    store, activity_log, unproven = unproven_of(directory, ring_of())
    transaction = activity_log.plan([(5, 5)])
    assert transaction is not None
    assert not isinstance(transaction, type(activity_log))
    activity_log.commit(transaction)  # type: ignore[arg-type]
    unproven.take(5)
    unproven.proven([5])
    assert unproven.extents() == [5]
    store.close()


def test_a_volume_that_grows_while_they_are_made_durable(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _, unproven = unproven_of(directory, ring_of())
    write, more = store.unproven.write, EXTENTS + 8

    def write_while_it_grows(pages: Iterable[tuple[int, bytes]]) -> None:
        write(pages)
        with unproven._books:
            unproven.grow(more)

    monkeypatch.setattr(store.unproven, "write", write_while_it_grows)
    unproven.add([3])
    unproven.persist()
    assert unproven.evict([3]) is True
    assert unproven.evict([more - 1]) is False
    assert unproven.extents() == [3, more - 1]
    store.close()


def test_runs_on_the_wire() -> None:
    assert encode_runs([1, 2, 3, 7]) == [[1, 3], [7, 1]]
    assert decode_runs([[1, 3], [7, 1]], 8) == {1, 2, 3, 7}
    assert decode_runs("all", 3) == {0, 1, 2}
    for wrong in (
        None,
        [[1]],
        [[-1, 2]],
        [[7, 2]],
        [[0, 0]],
        [["0", 1]],
        [[True, 1]],
        [[0, 2], [1, 2]],
        [[3, 1], [0, 1]],
        "some",
    ):
        with pytest.raises(ProtocolError):
            decode_runs(wrong, 8)


def test_a_bit_is_durable_before_the_record_that_evicts_its_extent(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over every record of a log that turns over often: a crash right after it finds all former extents again."""
    store, activity_log, unproven = unproven_of(directory, ring_of(), slots=2)
    books = unproven._books
    changed = Runtime().condition(books)
    replica = type(
        "R",
        (),
        {
            "books": books,
            "changed": changed,
            "log": activity_log,
            "unproven": unproven,
            "store": store,
            "runtime": Runtime(),
        },
    )()
    writer = LogWriter(replica, lambda: None, lambda: None)
    wrote, written = store.write_log_record, list[str]()
    held: set[int] = set()

    def write_log_record(position: int, record: bytes) -> None:
        wrote(position, record)
        written.append("record")
        durable = set()
        for index, raw in store.unproven.read():
            bits, _ = layout.decode_unproven_page(raw, index)
            durable |= {extent for extent in range(EXTENTS) if bits >> extent & 1}
        ring = ActivityLog.rebuild(store.read_log(), 1)
        assert isinstance(ring, Rebuilt)
        assert held <= durable | ring.extents

    write = store.unproven.write
    monkeypatch.setattr(store, "write_log_record", write_log_record)
    monkeypatch.setattr(store.unproven, "write", lambda pages: (written.append("bits"), write(pages)))
    for extent in (0, 1, 2, 3, 0, 1, 2, 3, 4, 5):
        writer.hold(extent, extent)
        held.add(extent)
        with books:
            activity_log.release(extent, extent, 0)
    assert written.count("record") == 10
    assert written.count("bits") <= 4, "once for a turnover of the log, not once an eviction"
    store.close()


def test_dirty_maps_of_others_are_taken_out() -> None:
    one, other = DirtyMap(SIZE_BYTES), DirtyMap(SIZE_BYTES)
    other.mark(0, 4 * BLOCK_BYTES)
    one.mark_where(other, 1, 3 * BLOCK_BYTES)
    assert list(one.runs()) == [(BLOCK_BYTES, 2 * BLOCK_BYTES)]

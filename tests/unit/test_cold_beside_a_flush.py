"""A cold write does not wait for a flush that takes long: extents give way with their dirty bits durable."""

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirror.core import layout
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import DeviceError
from mirror.core.limits import EXTENT_BYTES, EXTENTS_PER_PAGE, LOG_SLOTS_MIN
from mirror.core.states import DiskState
from nbd_server.volume import Volume
from tests.pair import PATIENCE_S, HeldOperation, pair, session_of

DATA = memoryview(b"\x3c" * 4096)
SIZE_BYTES = 4 * LOG_SLOTS_MIN * EXTENT_BYTES


@pytest.fixture
def volumes(tmp_path: Path) -> Iterator[tuple[Volume, Volume]]:
    with pair(tmp_path, size_bytes=SIZE_BYTES, activity_log_extents=LOG_SLOTS_MIN) as both:
        yield both


def durably_dirty(volume: Volume) -> DirtyMap:
    """What its metadata file says."""
    found = DirtyMap(SIZE_BYTES)
    for page, raw in volume._replica.store.read_map():
        for extent, bits in enumerate(layout.decode_map_page(raw, page), page * EXTENTS_PER_PAGE):
            if bits:
                found.set_bits(extent, bits)
    return found


def write_to(volume: Volume, extents: range) -> None:
    for extent in extents:
        volume.write(DATA, extent * EXTENT_BYTES, False)


def await_room(volume: Volume) -> None:
    """Until no thread makes room in its log."""
    replica = volume._replica
    with replica.books:
        assert replica.changed.wait_for(lambda: not volume._primary._log_writer._making_room, PATIENCE_S)


@pytest.mark.parametrize("side", [0, 1], ids=["own disk", "peer's disk"])
def test_cold_writes_go_on_beside_a_flush_that_hangs(
    volumes: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    first, _ = volumes
    log = first._replica.log
    held = HeldOperation(volumes[side], "flush", monkeypatch)
    extents = range(3 * LOG_SLOTS_MIN)
    writer = threading.Thread(target=write_to, args=(first, extents))
    writer.start()
    writer.join(PATIENCE_S / 2)
    assert not writer.is_alive(), "they wait for the flush"
    assert held.begun.is_set()
    assert not held.released.is_set()
    # Whatever left the log while it was not stable on both is durably dirty (invariant log-before-write).
    on_disk = durably_dirty(first)
    gone = [extent for extent in extents if extent not in log.hot_extents()]
    assert len(gone) >= len(extents) - LOG_SLOTS_MIN
    assert all(on_disk.is_dirty(extent * EXTENT_BYTES, 4096) for extent in gone)
    held.released.set()
    await_room(first)
    first.flush()
    assert session_of(first).ended is False
    # What the flush made stable is not dirty any more, on disk either, once the thread that made room has ended.
    write_to(first, range(3 * LOG_SLOTS_MIN, 4 * LOG_SLOTS_MIN))
    await_room(first)
    assert not first._primary._log_writer._left_dirty
    assert not any(durably_dirty(first).is_dirty(extent * EXTENT_BYTES, 4096) for extent in gone)


def test_a_map_that_can_not_be_written_fails_the_replica(
    volumes: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the volume goes on through the peer, as when its log can't be written."""
    first, second = volumes
    held = HeldOperation(second, "flush", monkeypatch)
    store = first._replica.store

    def refuse(_pages: object) -> None:
        raise DeviceError("meta", "write", errno.EIO, "Input/output error")

    monkeypatch.setattr(store, "write_map_pages", refuse)
    monkeypatch.setattr(first._replica._durable, "_write", refuse)
    writer = threading.Thread(target=write_to, args=(first, range(3 * LOG_SLOTS_MIN)))
    writer.start()
    assert held.begun.wait(PATIENCE_S)
    writer.join(PATIENCE_S / 2)
    held.released.set()
    writer.join(PATIENCE_S)
    assert not writer.is_alive()
    assert first._replica.disk_state(True) is DiskState.FAILED
    whole = memoryview(bytearray(4096))
    first.read_into(whole, (3 * LOG_SLOTS_MIN - 1) * EXTENT_BYTES)
    assert whole == DATA


@pytest.mark.parametrize("side", [0, 1], ids=["own disk", "peer's disk"])
def test_nor_does_the_first_cold_write_after_hot_ones_over_the_whole_log(
    volumes: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    """Nobody makes room then, and nothing in the log is stable."""
    first, _ = volumes
    log = first._replica.log
    write_to(first, range(2 * LOG_SLOTS_MIN - 1, -1, -2))
    await_room(first)
    first.flush()
    for extent in sorted(log.hot_extents()):
        write_to(first, range(extent, extent + 1))
    await_room(first)
    assert len(log.victims_waiting()) == LOG_SLOTS_MIN
    held = HeldOperation(volumes[side], "flush", monkeypatch)
    writer = threading.Thread(target=write_to, args=(first, range(3 * LOG_SLOTS_MIN, 3 * LOG_SLOTS_MIN + 1)))
    writer.start()
    writer.join(PATIENCE_S / 2)
    assert not writer.is_alive(), "it waits for the flush"
    assert held.begun.is_set()
    held.released.set()


def test_bits_whose_mending_failed_are_written_again(
    volumes: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a write that failed the disk may have either: an extent that leaves again must not rely on the former bits."""
    first, _ = volumes
    primary, replica = first._primary, first._replica
    writer = primary._log_writer

    def leave() -> bool:
        write_to(first, range(40, 41))
        with replica.books:
            assert 40 in replica.log.victims_waiting()
            writer._leave_dirty([40])
        return durably_dirty(first).is_dirty(40 * EXTENT_BYTES, 4096)

    assert leave()
    first.flush()
    really = replica._durable._write

    def fail_late(pages: Any) -> None:
        really(pages)
        raise DeviceError("meta", "write", errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(replica._durable, "_write", fail_late)
        with pytest.raises(DeviceError):
            writer.mend_left_dirty()
    assert not durably_dirty(first).is_dirty(40 * EXTENT_BYTES, 4096)
    assert leave()

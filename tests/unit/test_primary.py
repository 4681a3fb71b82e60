"""The primary on real files, alone: what a flush may be elided for, and what the log may forget."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirror import log_sizer
from mirror.change import Change
from mirror.core import layout
from mirror.core.errors import DeviceError, OperatorError, PeerError
from mirror.core.generation import DAY0, Kind
from mirror.core.layout import Superblock
from mirror.core.limits import EXTENT_BYTES, LOG_SLOTS_MIN
from mirror.core.spin import Spin
from mirror.core.states import DiskState, Role
from mirror.core.wire import MessageType
from mirror.log_sizer import LogSizer
from mirror.opening import open_replica
from mirror.primary import Gate, Primary
from mirror.replica import Replica
from mirror.runtime import Runtime
from mirror.store import create_replica_files, metadata_file
from mirror.trace import Trace

SIZE = 4 * LOG_SLOTS_MIN * EXTENT_BYTES
BLOCK = memoryview(b"\xa5" * 4096)


def _create(directory: Path) -> None:
    superblock = Superblock(
        sequence=1,
        name="vol",
        size_bytes=SIZE,
        replica_id=b"r" * 16,
        volume_id=b"v" * 16,
        kind=Kind.ESTABLISHED,
        disk=DiskState.UP_TO_DATE,
        peer_disk=DiskState.UP_TO_DATE,
        current=DAY0,
        base=0,
        history=(),
        primary=False,
        clean=True,
        met_peer=True,
        incarnation=1,
        boot_id=b"b" * 16,
        log_slots=LOG_SLOTS_MIN,
        log_epoch=1,
        protocol="C",
        redundancy_lost_at=0.0,
        last_resync=None,
    )
    create_replica_files(directory, SIZE, None, layout.encode_superblock(superblock))


def _open(directory: Path, tracked: bool = True) -> Primary:
    replica, _ = open_replica(
        Runtime(),
        directory,
        directory / "data",
        name="vol",
        protocol="C",
        log_slots=LOG_SLOTS_MIN,
        tracked=tracked,
        memory_kept=False,
    )
    primary = Primary(replica, "C", Trace(), Spin("off"))
    replica.role = Role.PRIMARY
    replica.update(primary=True)
    primary.set_gate(Gate.OPEN)
    return primary


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[Primary]:
    _create(tmp_path)
    primary = _open(tmp_path)
    yield primary
    primary.replica.store.close()


@pytest.mark.parametrize("tracked", [True, False])
def test_a_flush_that_ran_beside_a_write_does_not_stand_for_the_next_one(
    tmp_path: Path, tracked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _create(tmp_path)
    primary = _open(tmp_path, tracked)
    store, flushes = primary.replica.store, []
    really_write, really_flush = store.write, store.flush

    def write_after_a_flush(*arguments: Any) -> None:
        primary.flush()  # another client's, which begins and ends before this write reaches the disk
        really_write(*arguments)

    def count_flush() -> None:
        flushes.append(1)
        really_flush()

    monkeypatch.setattr(store, "write", write_after_a_flush)
    monkeypatch.setattr(store, "flush", count_flush)
    primary.write(BLOCK, 0, False)
    before = len(flushes)
    primary.flush()
    assert len(flushes) == before + 1
    primary.flush()
    assert len(flushes) == before + 1, "nothing was written since"
    store.close()


def test_every_block_written_alone_is_dirty_after_a_crash_however_often_the_log_turned_over(tmp_path: Path) -> None:
    _create(tmp_path)
    primary = _open(tmp_path)
    extents = [number * 7 % (4 * LOG_SLOTS_MIN) for number in range(4 * LOG_SLOTS_MIN)]
    for extent in extents:
        primary.write(BLOCK, extent * EXTENT_BYTES, False)
    assert primary.replica.log.used <= LOG_SLOTS_MIN
    # Crash: nothing is closed, a new process reads what is on disk.
    again, _ = open_replica(
        Runtime(),
        tmp_path,
        tmp_path / "data",
        name="vol",
        protocol="C",
        log_slots=LOG_SLOTS_MIN,
        tracked=True,
        memory_kept=False,
    )
    assert again.crashed_primary
    assert all(again.dirty.is_dirty(extent * EXTENT_BYTES, 4096) for extent in extents)
    again.store.close()
    primary.replica.store.close()


def test_a_write_alone_is_answered_only_after_the_new_generation_is_durable(primary: Primary, tmp_path: Path) -> None:
    before = primary.replica.superblock
    primary.write(BLOCK, 0, False)
    copies = primary.replica.store.read_superblock_copies()
    for known in map(layout.decode_superblock, copies):
        assert known.current != before.current
        assert known.base == before.current
        assert known.peer_disk is DiskState.OUTDATED


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


def _again(directory: Path, log_slots: int | None = None) -> Replica:
    """What a new process finds after a crash."""
    replica, _ = open_replica(
        Runtime(),
        directory,
        directory / "data",
        name="vol",
        protocol="C",
        log_slots=log_slots,
        tracked=True,
        memory_kept=False,
    )
    return replica


@pytest.mark.parametrize("sizes", [(2 * LOG_SLOTS_MIN,), (2 * LOG_SLOTS_MIN, LOG_SLOTS_MIN), (8192, 64, 128)])
def test_the_log_changes_its_size_and_what_was_written_before_is_known_after_a_crash(
    tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    _create(tmp_path)
    primary = _open(tmp_path)
    sizer = LogSizer(primary, None, _nothing)
    written = []
    for number, size in enumerate(sizes):
        for extent in range(number * 70, number * 70 + 70):
            primary.write(BLOCK, extent * EXTENT_BYTES, False)
            written.append(extent)
        epoch = primary.replica.superblock.log_epoch
        assert sizer.change(size)
        log, known = primary.replica.log, primary.replica.superblock
        assert (log.slots, log.epoch, log.used) == (known.log_slots, known.log_epoch, 0) == (size, epoch + 1, 0)
        primary.write(BLOCK, EXTENT_BYTES, False)
    proven = set(primary.replica.unproven.extents())
    again = _again(tmp_path)
    assert again.crashed_primary
    assert again.superblock.log_slots == sizes[-1], "a size that was chosen is kept over a start"
    assert all(again.dirty.is_dirty(extent * EXTENT_BYTES, 4096) for extent in written)
    assert proven <= set(again.unproven.extents()), "what left the old log is still to be compared"
    again.store.close()
    primary.replica.store.close()


def test_a_secondary_does_not_say_that_its_log_has_the_wrong_size(primary: Primary) -> None:
    """It keeps the size that it has, whatever the goal, until it is primary."""
    sizer = LogSizer(primary, 1.0, _nothing)
    assert sizer.status()["reason"] == "no log is smaller, though the goal asks for it"
    primary.replica.role = Role.SECONDARY
    assert sizer.status()["reason"] == "a primary chooses, within 10 s once it is one"
    assert LogSizer(primary, None, _nothing).status()["reason"] is None


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_a_crash_between_the_superblock_and_its_log_finds_one_log_whole(
    tmp_path: Path, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the process died after so many copies of the superblock."""
    _create(tmp_path)
    primary = _open(tmp_path)
    for extent in range(LOG_SLOTS_MIN + 3):
        primary.write(BLOCK, extent * EXTENT_BYTES, False)

    class Died(Exception):
        pass

    really_write, left = metadata_file.write_all, [copies]

    def write_some(fd: int, data: bytes, offset: int, flags: int = 0) -> None:
        if offset in layout.Geometry.superblock_offsets:
            if not left[0]:
                raise Died
            left[0] -= 1
        really_write(fd, data, offset, flags)
        if offset in layout.Geometry.superblock_offsets and not left[0]:
            raise Died

    monkeypatch.setattr(metadata_file, "write_all", write_some)
    with pytest.raises(Died):
        LogSizer(primary, None, _nothing).change(4 * LOG_SLOTS_MIN)
    monkeypatch.undo()
    again = _again(tmp_path)
    assert again.superblock.log_slots == (4 * LOG_SLOTS_MIN if copies else LOG_SLOTS_MIN)
    assert all(again.dirty.is_dirty(extent * EXTENT_BYTES, 4096) for extent in range(LOG_SLOTS_MIN + 3))
    again.store.close()
    primary.replica.store.close()


def test_when_the_superblock_cant_be_written_no_log_is_relied_on(
    primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary.write(BLOCK, 0, False)

    def refuse(_record: bytes) -> None:
        raise DeviceError("meta", "write", errno.EIO, "no")

    monkeypatch.setattr(primary.replica.store, "write_superblock", refuse)
    with pytest.raises(DeviceError):
        LogSizer(primary, None, _nothing).change(4 * LOG_SLOTS_MIN)
    assert primary.replica.failed
    with pytest.raises(PeerError):
        primary.write(BLOCK, EXTENT_BYTES, False)


def test_a_change_of_the_log_is_put_off_while_a_write_does_not_end(
    primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_sizer, "PAUSE_S", 0.01)
    primary.write(BLOCK, 0, False)
    ticket, first, last = primary._begin(Change(MessageType.WRITE, 0, 5 * EXTENT_BYTES, 4096))
    epoch = primary.replica.superblock.log_epoch
    assert not LogSizer(primary, None, _nothing).change(4 * LOG_SLOTS_MIN)
    assert (primary.replica.superblock.log_epoch, primary.replica.log.used) == (epoch, 2)
    primary.unlock(ticket, first, last)
    primary._leave()
    primary.write(BLOCK, 5 * EXTENT_BYTES, False)
    assert LogSizer(primary, None, _nothing).change(4 * LOG_SLOTS_MIN)


def test_the_size_is_chosen_by_what_is_written(primary: Primary) -> None:
    """A volume of 256 extents, all of which are written, and a log of 64."""
    sizer = LogSizer(primary, 30.0, _nothing)
    assert sizer.status()["reason"] == "too few writes were measured"
    for number in range(2048):
        primary.write(BLOCK, number * 7 % 256 * EXTENT_BYTES, False)
    status = sizer.status()
    assert status["miss_rate"] > 0.8
    assert (status["larger"]["extents"], status["larger"]["resync_s"]) == (128, 5.1)
    assert status["smaller"] is None
    assert sizer._decide().slots == 256
    assert LogSizer(primary, 8.0, _nothing)._decide().rule == "goal"


def test_requests_do_without_the_threads_that_only_help_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: set[str] = set()

    def spawn(_self: Runtime, name: str, *_: object) -> None:
        refused.add(name)
        raise OperatorError("can't start the thread")

    _create(tmp_path)
    primary = _open(tmp_path)
    monkeypatch.setattr(Runtime, "spawn", spawn)
    for offset in range(0, SIZE, EXTENT_BYTES):
        primary.write(BLOCK, offset, False)
    assert refused == {"log-ahead", "make-room"}
    assert primary.running() == primary.unanswered() == 0
    assert primary.replica.log.quiet
    primary.replica.store.close()

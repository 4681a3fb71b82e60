"""The primary on real files, alone: what a flush may be elided for, and what the log may forget."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirror.core import layout
from mirror.core.generation import DAY0, Kind
from mirror.core.layout import Superblock
from mirror.core.limits import EXTENT_BYTES, LOG_SLOTS_MIN
from mirror.core.spin import Spin
from mirror.core.states import DiskState, Role
from mirror.opening import open_replica
from mirror.primary import Gate, Primary
from mirror.runtime import Runtime
from mirror.store import create_replica_files
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

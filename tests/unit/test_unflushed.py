"""What a flush of much gives to the disk, piece by piece, and that it tells of whatever is lost on the way."""

import ctypes
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirror.core.errors import DeviceError
from mirror.core.limits import EVEN_FLUSH_BYTES, EXTENT_BYTES, WRITE_BACK_WINDOW_BYTES
from mirror.core.unflushed import Unflushed
from mirror.store import Store, create_replica_files, data_file

SIZE_BYTES = 64 * EXTENT_BYTES
SUPERBLOCK = bytes(4096)
BEGIN, AWAIT = "begin", "await"


def unflushed(*writes: tuple[int, int]) -> Unflushed:
    one = Unflushed()
    one.grow(SIZE_BYTES)
    for offset, length in writes:
        one.wrote(offset, length)
    return one


def test_little_is_left_to_the_flush() -> None:
    assert unflushed().take() == ([], 0)
    assert unflushed((0, EVEN_FLUSH_BYTES - 1)).take() == ([], 0)


def test_extents_are_named_once_and_in_order() -> None:
    rng = random.Random(1)
    one, touched = unflushed(), set()
    for _ in range(500):
        offset = rng.randrange(SIZE_BYTES - EXTENT_BYTES)
        length = rng.randrange(1, EXTENT_BYTES)
        one.wrote(offset, length)
        touched |= {offset // EXTENT_BYTES, (offset + length - 1) // EXTENT_BYTES}
    extents, at_once = one.take()
    assert extents == sorted(touched)
    assert at_once == 1
    assert one.take() == ([], 0), "the next flush begins anew"


def test_scattered_data_goes_many_extents_at_once() -> None:
    written = EVEN_FLUSH_BYTES // 32
    extents, at_once = unflushed(*((extent * EXTENT_BYTES, written) for extent in range(32))).take()
    assert extents == list(range(32))
    assert at_once == WRITE_BACK_WINDOW_BYTES // written


def test_it_grows_with_the_volume() -> None:
    one = unflushed()
    one.grow(SIZE_BYTES + 9 * EXTENT_BYTES)
    one.wrote(SIZE_BYTES + 8 * EXTENT_BYTES, EVEN_FLUSH_BYTES // 2)
    one.wrote(SIZE_BYTES - 1, EVEN_FLUSH_BYTES // 2)
    extents, _ = one.take()
    assert extents[0] == 63
    assert 72 in extents


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    create_replica_files(tmp_path, SIZE_BYTES, None, SUPERBLOCK)
    one = Store.open(tmp_path, tmp_path / "data", SIZE_BYTES)
    yield one
    one.close()


class Disk:
    """In place of the kernel's sync_file_range: notes the calls, carries them out, fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int]] = []
        self.refuses: dict[str, int] = {}
        self._call = data_file._libc_sync_file_range
        monkeypatch.setattr(data_file, "_libc_sync_file_range", self)

    def __call__(self, fd: int, offset: int, length: int, flags: int) -> int:
        assert offset % EXTENT_BYTES == 0
        assert length == EXTENT_BYTES
        what = AWAIT if flags == data_file._AWAIT_WRITE_BACK else BEGIN
        self.calls.append((what, offset // EXTENT_BYTES))
        if what in self.refuses:
            ctypes.set_errno(self.refuses[what])
            return -1
        return int(self._call(fd, offset, length, flags))


def write_much(store: Store) -> None:
    for extent in (3, 9, 4, 60):
        store.write(os.urandom(EVEN_FLUSH_BYTES // 4 + 1), extent * EXTENT_BYTES)


def test_a_flush_of_much_has_never_more_than_a_window_on_its_way(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    write_much(store)
    store.flush()
    assert [extent for what, extent in disk.calls if what == BEGIN] == [3, 4, 9, 60]
    begun = awaited = 0
    for what, _ in disk.calls:
        begun, awaited = begun + (what == BEGIN), awaited + (what == AWAIT)
        assert (begun - awaited) * (EVEN_FLUSH_BYTES // 4) <= WRITE_BACK_WINDOW_BYTES + EVEN_FLUSH_BYTES // 4
    assert awaited > 0
    disk.calls.clear()
    store.write(b"x" * 4096, 0)
    store.flush()
    assert not disk.calls


@pytest.mark.parametrize(
    ("what", "number"),
    [(BEGIN, errno.EIO), *((AWAIT, one) for one in (errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EAGAIN, errno.EPERM))],
)
def test_what_is_lost_in_a_piece_is_lost_for_good(
    store: Store, monkeypatch: pytest.MonkeyPatch, what: str, number: int
) -> None:
    """The call that waits takes the news of a failed write-back from the flush behind it (invariant flush).

    Linux tells the very error that the write-back met.
    """
    disk = Disk(monkeypatch)
    disk.refuses = {what: number}
    write_much(store)
    for _ in range(2):
        with pytest.raises(DeviceError):
            store.flush()
        disk.refuses = {}
    with pytest.raises(DeviceError):
        store.write(b"x", 0, True)


@pytest.mark.parametrize("what", [BEGIN, AWAIT])
def test_where_pieces_are_not_possible_the_flush_does_all(
    store: Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    disk = Disk(monkeypatch)
    disk.refuses = {what: errno.ENOSYS}
    write_much(store)
    store.flush()
    assert disk.calls[-1][0] == what

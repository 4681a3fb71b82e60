"""The real files when the system refuses: short transfers, full disks, failed write-back, missing abilities, bad files.

What a store does when all is well is in tests/conformance/test_store.py.
"""

import ctypes
import errno as codes
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mirror.core.errors import DamagedRecord, DeviceError, OperatorError
from mirror.core.layout import (
    Geometry,
    blank_log_record,
    decode_log_record,
    decode_map_page,
    encode_map_page,
)
from mirror.core.limits import BLOCK_BYTES, DURABLE_DESCRIPTORS, EXTENT_BYTES, LOG_RING_RECORDS, MIB, RECORD_BYTES
from mirror.runtime import Runtime
from mirror.store import DATA_NAME, META_NAME, REPLICA_FILES, Store, create_replica_files, data_file

SIZE = EXTENT_BYTES + 3 * BLOCK_BYTES
SUPERBLOCK = b"\x01" * RECORD_BYTES
NEXT_SUPERBLOCK = b"\x02" * RECORD_BYTES

Make = Callable[..., Store]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Store] = []

    def make_store(directory: Path = tmp_path, size_bytes: int = SIZE) -> Store:
        create_replica_files(directory, size_bytes, None, SUPERBLOCK)
        made.append(Store.open(directory, directory / DATA_NAME, size_bytes))
        return made[-1]

    yield make_store
    for store in made:
        store.close()


class Calls:
    """Stands in for functions of `os`: notes each call, and refuses or shortens what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.seen: list[tuple[str, int]] = []

    def spy(self, name: str, refuse: Callable[[int], int] = lambda number: 0) -> list[tuple[Any, ...]]:
        """Note calls of os.`name`; `refuse` gives an errno, or 0, for the n-th of them. Returns their arguments."""
        real = getattr(os, name)
        arguments: list[tuple[Any, ...]] = []

        def stand_in(*given: Any) -> Any:
            arguments.append(given)
            self.seen.append((name, given[0]))
            number = refuse(len(arguments))
            if number:
                raise OSError(number, os.strerror(number))
            return real(*given)

        self._monkeypatch.setattr(os, name, stand_in)
        return arguments


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


# -- short transfers --------------------------------------------------------------------------------------------------


def test_short_writes_and_reads_are_continued(make: Make, monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    store = make()
    pwrite, pwritev, pread, preadv = os.pwrite, os.pwritev, os.pread, os.preadv

    def cut(buffer: Any) -> memoryview:
        view = memoryview(buffer).cast("B")
        return view[: rng.randint(1, max(1, len(view)))]

    monkeypatch.setattr(os, "pwrite", lambda fd, buffer, at: pwrite(fd, cut(buffer), at))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at, flags=0: pwritev(fd, [cut(buffers[0])], at, flags))
    monkeypatch.setattr(os, "pread", lambda fd, length, at: pread(fd, rng.randint(1, length), at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [cut(buffers[0])], at))
    twin = bytearray(SIZE)
    for _ in range(50):
        length = rng.choice([1, BLOCK_BYTES, 3 * BLOCK_BYTES + 5])
        offset = rng.randrange(SIZE - length + 1)
        contents = rng.randbytes(length)
        store.write(memoryview(contents), offset, rng.random() < 0.3)
        twin[offset : offset + length] = contents
        buffer = bytearray(length + 4 & ~3)
        store.read_into(memoryview(buffer).cast("I"), min(offset, SIZE - len(buffer)))
        assert buffer == twin[min(offset, SIZE - len(buffer)) :][: len(buffer)]
    assert store.read(SIZE, 0) == twin
    store.write_log_record(3, blank_log_record())
    store.write_superblock(NEXT_SUPERBLOCK)
    store.write_map_pages([(0, encode_map_page(0, [5]))])
    assert store.read_superblock_copies() == (NEXT_SUPERBLOCK, NEXT_SUPERBLOCK)
    assert {decode_log_record(raw).epoch for raw in store.read_log()} == {0}
    assert decode_map_page(store.read_map_page(0), 0)[0] == 5


def test_a_write_that_goes_nowhere_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    monkeypatch.setattr(os, "pwrite", lambda fd, buffer, at: 0)
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at, flags=0: 0)
    for durable in (False, True):
        with pytest.raises(DeviceError):
            store.write(b"x", 0, durable)


def test_a_file_that_was_cut_short_is_an_error_not_zeroes(make: Make, tmp_path: Path) -> None:
    store = make()
    os.truncate(tmp_path / DATA_NAME, SIZE - 1)
    for read in (lambda: store.read(BLOCK_BYTES, SIZE - BLOCK_BYTES), lambda: store.read_into(bytearray(SIZE), 0)):
        with pytest.raises(DeviceError, match="ends within the volume") as caught:
            read()
        assert caught.value.errno == codes.EIO


# -- failed write-back ------------------------------------------------------------------------------------------------


def test_a_failed_flush_is_never_followed_by_a_good_one(make: Make, calls: Calls, tmp_path: Path) -> None:
    store = make()
    store.write(b"x" * BLOCK_BYTES, 0)
    # The kernel tells of the lost write once; the second time it would say that all is well.
    flushes = calls.spy("fdatasync", lambda number: codes.EIO if number == 1 else 0)
    for _ in range(3):
        with pytest.raises(DeviceError) as caught:
            store.flush()
        assert (caught.value.errno, caught.value.path) == (codes.EIO, str(tmp_path / DATA_NAME))
    assert len(flushes) == 1
    for fail in (
        lambda: store.write(b"x", 0, True),
        lambda: store.zero(0, 1, False, True),
        lambda: store.trim(0, 1, True),
    ):
        with pytest.raises(DeviceError):
            fail()
    # What promises nothing goes on, and so does the metadata: that the disk failed has to be recorded.
    store.write(b"y", 0)
    assert store.read(1, 0) == b"y"
    store.write_superblock(NEXT_SUPERBLOCK)


def test_a_failed_durable_write_fails_every_later_flush(make: Make, calls: Calls) -> None:
    store = make()
    calls.spy("pwritev", lambda number: codes.EIO if number == 1 else 0)
    with pytest.raises(DeviceError):
        store.write(b"x", 0, True)
    for _ in range(2):
        with pytest.raises(DeviceError):
            store.flush()
        with pytest.raises(DeviceError):
            store.write(b"x", 0, True)


def test_a_flush_beside_a_failing_one_does_not_succeed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two flushes on one description only the first is told; the other may not overtake its news."""
    store = make()
    entered, go_on = threading.Event(), threading.Event()
    real = os.fdatasync
    first = [True]

    def fdatasync(fd: int) -> None:
        if first.pop() if first else False:
            entered.set()
            assert go_on.wait(20)
            raise OSError(codes.EIO, "told once")
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    outcomes: list[str] = []

    def flush() -> None:
        try:
            store.flush()
            outcomes.append("good")
        except DeviceError:
            outcomes.append("failed")

    threads = [threading.Thread(target=flush) for _ in range(3)]
    threads[0].start()
    assert entered.wait(20)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert outcomes == ["failed"] * 3


def test_a_durable_write_beside_a_failing_flush_does_not_succeed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    real = os.pwritev

    def pwritev(fd: int, buffers: Any, offset: int, flags: int) -> int:
        done = real(fd, buffers, offset, flags)
        with pytest.raises(DeviceError):
            store.flush()
        return done

    def fdatasync(fd: int) -> None:
        raise OSError(codes.EIO, "told once")

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(DeviceError):
        store.write(b"x", 0, True)


def test_each_running_durable_write_has_a_description_of_its_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    real = os.pwritev
    used: list[int] = []
    flushed: list[int] = []

    def pwritev(fd: int, buffers: Any, offset: int, flags: int) -> int:
        used.append(fd)
        assert flags == os.RWF_DSYNC
        # The next one begins while this one runs.
        store.write(b"y", len(used), True)
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    store.write(b"x", 0, True)
    assert len(set(used)) == len(used) == DURABLE_DESCRIPTORS
    # The one for which no description was left wrote, then flushed.
    assert flushed == [store.data_fd]
    assert store.data_fd not in used
    assert store.read(len(used) + 1, 0) == b"x" + b"y" * len(used)


def losetup(*arguments: str | Path) -> str:
    return subprocess.run(["/sbin/losetup", *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small filesystem takes root")
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.fixture
def lying_device(small_filesystem: Path) -> Iterator[Path]:
    """A block device of 16 MiB that can keep less than 1 MiB: writes succeed, their write-back does not."""
    image = small_filesystem / "image"
    image.touch()
    os.truncate(image, 16 * MIB)
    device = Path(losetup("--find", "--show", image))
    yield device
    losetup("--detach", device)


@pytest.fixture
def lying_store(lying_device: Path, tmp_path: Path) -> Iterator[Store]:
    """One whose data is on that device."""
    directory = tmp_path / "replica"
    directory.mkdir()
    create_replica_files(directory, 16 * MIB, lying_device, SUPERBLOCK)
    store = Store.open(directory, lying_device, 16 * MIB)
    yield store
    store.close()


def test_the_kernel_forgets_a_failed_write_back_and_the_store_does_not(lying_device: Path, lying_store: Store) -> None:
    store = lying_store
    held = os.open(lying_device, os.O_RDWR)
    try:
        store.write(os.urandom(4 * MIB), 0)
        with pytest.raises(DeviceError) as caught:
            store.flush()
        assert caught.value.errno in (codes.EIO, codes.ENOSPC)
        # Each description is told once: the parent's, too.
        with pytest.raises(OSError, match=os.strerror(caught.value.errno)):
            os.fsync(held)
        os.fdatasync(held)
        os.fdatasync(store.data_fd)
        with pytest.raises(DeviceError):
            store.flush()
        with pytest.raises(DeviceError):
            store.write(b"x", 0, True)
    finally:
        os.close(held)


def test_a_durable_write_whose_write_back_fails_is_an_error(lying_store: Store) -> None:
    with pytest.raises(DeviceError):
        lying_store.write(os.urandom(8 * MIB), 0, True)
    with pytest.raises(DeviceError):
        lying_store.flush()


def test_a_flush_of_much_whose_write_back_fails_is_an_error(lying_store: Store) -> None:
    lying_store.write(os.urandom(12 * MIB), 0)
    for _ in range(3):
        with pytest.raises(DeviceError):
            lying_store.flush()


def test_what_a_write_back_loses_at_its_beginning_is_no_secret(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells nobody else of a delayed block that it can't allocate, and drops the page."""
    store = make()
    number = codes.ENOMEM

    def sync_file_range(*_: int) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(data_file, "_libc_sync_file_range", sync_file_range)
    store.write(b"x", 0)
    store.write_back_soon(0, 1)
    store.flush()
    number = codes.ENOSPC
    store.write(b"x", 0)
    for refused in (lambda: store.write_back_soon(0, 1), store.flush, store.flush):
        with pytest.raises(DeviceError) as caught:
            refused()
        assert caught.value.errno == codes.EIO
    with pytest.raises(DeviceError):
        store.write(b"x", 0, True)


def test_a_flush_waits_for_what_a_write_back_that_runs_may_lose(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    begun, dropped = threading.Event(), threading.Event()

    def sync_file_range(*_: int) -> int:
        begun.set()
        assert dropped.wait(10)
        ctypes.set_errno(codes.EIO)
        return -1

    monkeypatch.setattr(data_file, "_libc_sync_file_range", sync_file_range)
    store.write(b"x", 0)
    with ThreadPoolExecutor() as others:
        writing = others.submit(store.write_back_soon, 0, 1)
        assert begun.wait(10)
        threading.Timer(0.2, dropped.set).start()
        with pytest.raises(DeviceError):
            store.flush()
        assert isinstance(writing.exception(10), DeviceError)


# -- full disks -------------------------------------------------------------------------------------------------------


def test_a_full_filesystem_refuses_data_but_not_metadata(small_filesystem: Path, make: Make) -> None:
    store = make(small_filesystem, 16 * MIB)
    piece = os.urandom(64 * 1024)
    errors = []
    for at in range(0, 2 * MIB, len(piece)):
        try:
            store.write(piece, at)
        except DeviceError as error:
            errors.append(error.errno)
    assert len(errors) > 16
    assert set(errors) == {codes.ENOSPC}
    for refused in (lambda: store.write(piece, 4 * MIB, True), lambda: store.zero(4 * MIB, MIB, False)):
        with pytest.raises(DeviceError) as caught:
            refused()
        assert caught.value.errno == codes.ENOSPC
    # A full disk has lost nothing: it is not a failed one, and it can be logged to.
    store.flush()
    for position in range(LOG_RING_RECORDS):
        store.write_log_record(position, blank_log_record())
    store.write_superblock(NEXT_SUPERBLOCK)
    store.write_map_pages([(0, encode_map_page(0, [1]))])
    store.trim(0, 128 * 1024 + 1)
    store.write(piece, 0, True)
    assert store.read(len(piece), 0) == piece


@pytest.mark.parametrize("refused_again", [False, True])
def test_a_durable_write_on_a_full_disk_asks_the_flush_what_was_lost(
    make: Make, calls: Calls, refused_again: bool
) -> None:
    store = make()
    calls.spy("pwritev", lambda number: codes.ENOSPC)
    calls.spy("pwrite", lambda number: codes.ENOSPC if refused_again else 0)
    flushes = calls.spy("fdatasync")
    if refused_again:
        with pytest.raises(DeviceError) as caught:
            store.write(b"x", 0, True)
        assert caught.value.errno == codes.ENOSPC
        assert flushes == []
    else:
        store.write(b"x", 0, True)
        assert len(flushes) == 1
    store.flush()


def test_a_full_disk_at_write_back_is_a_loss(make: Make, calls: Calls) -> None:
    store = make()
    calls.spy("pwritev", lambda number: codes.ENOSPC)
    calls.spy("fdatasync", lambda number: codes.ENOSPC if number == 1 else 0)
    with pytest.raises(DeviceError):
        store.write(b"x", 0, True)
    with pytest.raises(DeviceError) as caught:
        store.flush()
    assert caught.value.errno == codes.ENOSPC


# -- zeroing without the means ----------------------------------------------------------------------------------------

HOLE, ZERO_RANGE = 0x02, 0x10


@pytest.mark.parametrize("number", [codes.EOPNOTSUPP, codes.ENOSYS, codes.EINVAL])
@pytest.mark.parametrize("missing", [(), (HOLE,), (ZERO_RANGE,), (HOLE, ZERO_RANGE)])
@pytest.mark.parametrize("may_trim", [False, True])
def test_zeroes_are_read_whatever_the_file_can_do(
    make: Make, monkeypatch: pytest.MonkeyPatch, may_trim: bool, missing: tuple[int, ...], number: int
) -> None:
    store = make()
    real = data_file._fallocate

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        if any(mode & one for one in missing):
            raise OSError(number, os.strerror(number))
        real(fd, mode, offset, length)

    monkeypatch.setattr(data_file, "_fallocate", fallocate)
    for _ in range(2):
        store.write(b"\xa5" * SIZE, 0)
        store.zero(5, SIZE - 10, may_trim)
        assert store.read(SIZE, 0) == b"\xa5" * 5 + bytes(SIZE - 10) + b"\xa5" * 5


@pytest.mark.parametrize(
    ("number", "asked_again"), [(codes.EOPNOTSUPP, False), (codes.ENOSYS, False), (codes.EINVAL, True)]
)
@pytest.mark.parametrize("may_trim", [False, True])
def test_what_can_never_be_is_asked_for_once(
    make: Make, monkeypatch: pytest.MonkeyPatch, may_trim: bool, number: int, asked_again: bool
) -> None:
    store = make()
    asked: list[int] = []

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        asked.append(mode)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(data_file, "_fallocate", fallocate)
    store.zero(0, SIZE, may_trim)
    assert len(asked) == 2
    store.zero(0, SIZE, may_trim)
    assert len(asked) == (4 if asked_again else 2)


@pytest.mark.parametrize("number", [codes.EIO, codes.ENOSPC, codes.EPERM])
@pytest.mark.parametrize("verb", ["zero", "trim"])
def test_an_error_while_zeroing_is_a_device_error(
    make: Make, monkeypatch: pytest.MonkeyPatch, verb: str, number: int
) -> None:
    store = make()

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(data_file, "_fallocate", fallocate)
    with pytest.raises(DeviceError) as caught:
        store.trim(0, SIZE) if verb == "trim" else store.zero(0, SIZE, False)
    assert caught.value.errno == number
    assert verb in caught.value.message


def test_an_error_while_zeroes_are_written_is_a_device_error(
    make: Make, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    store = make()

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(codes.EOPNOTSUPP, "no")

    monkeypatch.setattr(data_file, "_fallocate", fallocate)
    pieces = calls.spy("pwritev", lambda number: codes.EIO if number == 3 else 0)
    with pytest.raises(DeviceError) as caught:
        store.trim(0, SIZE)
    assert caught.value.errno == codes.EIO
    assert len(pieces) == 3


def test_fast_zero_is_not_promised_where_only_writing_is_left(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(codes.EOPNOTSUPP, "no")

    assert make().can_fast_zero
    monkeypatch.setattr(data_file, "_fallocate", fallocate)
    store = Store.open(tmp_path, tmp_path / DATA_NAME, SIZE)
    assert not store.can_fast_zero
    store.close()


def test_asking_for_fast_zero_changes_nothing(make: Make, tmp_path: Path) -> None:
    make().write(b"x" * SIZE, 0, True)
    before = (tmp_path / DATA_NAME).stat()
    Store.open(tmp_path, tmp_path / DATA_NAME, SIZE).close()
    after = (tmp_path / DATA_NAME).stat()
    assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)
    assert (tmp_path / DATA_NAME).read_bytes() == b"x" * SIZE


def test_a_hole_that_moves_while_it_is_described_does_not_stop_the_walk(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    # Data begins here and a hole begins here: somebody punches and fills as fast as we look.
    monkeypatch.setattr(os, "lseek", lambda fd, at, what: at)
    found = store.extents(100, 3 * BLOCK_BYTES)
    assert (found[0][0], found[-1][0] + found[-1][1]) == (100, 100 + 3 * BLOCK_BYTES)


# -- metadata ---------------------------------------------------------------------------------------------------------


def test_the_second_superblock_is_written_only_when_the_first_is_durable(make: Make, calls: Calls) -> None:
    store = make()
    writes = calls.spy("pwritev", lambda number: codes.EIO if number == 2 else 0)
    with pytest.raises(DeviceError):
        store.write_superblock(NEXT_SUPERBLOCK)
    assert [(offset, flags) for _, _, offset, flags in writes] == [(0, os.RWF_DSYNC), (RECORD_BYTES, os.RWF_DSYNC)]
    assert store.read_superblock_copies() == (NEXT_SUPERBLOCK, SUPERBLOCK)


def test_a_log_record_is_one_durable_write(make: Make, calls: Calls) -> None:
    store = make()
    writes = calls.spy("pwritev")
    store.write_log_record(5, blank_log_record())
    assert [(offset, flags) for _, _, offset, flags in writes] == [(Geometry.log_record_offset(5), os.RWF_DSYNC)]
    assert [name for name, _ in calls.seen] == ["pwritev"]


def test_map_pages_are_written_in_runs_and_flushed_once(make: Make, calls: Calls, tmp_path: Path) -> None:
    size = 31 * EXTENT_BYTES * 6
    store = make(size_bytes=size)
    geometry = Geometry(size)
    writes = calls.spy("pwritev")
    calls.spy("fdatasync")
    store.write_map_pages((index, encode_map_page(index, [1])) for index in (0, 1, 2, 5))
    assert [offset for _, _, offset, _ in writes] == [geometry.map_page_offset(0), geometry.map_page_offset(5)]
    assert [name for name, _ in calls.seen] == ["pwritev", "pwritev", "fdatasync"]


def test_log_and_map_do_not_take_the_news_of_a_failure_from_each_other(make: Make, calls: Calls) -> None:
    store = make()
    calls.spy("pwritev")
    store.write_log_record(0, blank_log_record())
    store.write_map_pages([(0, encode_map_page(0, []))])
    assert len({fd for _, fd in calls.seen}) == 2


@pytest.mark.parametrize("write", ["superblock", "log", "map"])
def test_a_metadata_write_that_fails_is_a_device_error_and_may_be_tried_again(
    make: Make, calls: Calls, tmp_path: Path, write: str
) -> None:
    store = make()
    attempts = {
        "superblock": lambda: store.write_superblock(NEXT_SUPERBLOCK),
        "log": lambda: store.write_log_record(0, blank_log_record()),
        "map": lambda: store.write_map_pages([(0, encode_map_page(0, []))]),
    }
    calls.spy("pwritev", lambda number: codes.EIO if number == 1 else 0)
    with pytest.raises(DeviceError) as caught:
        attempts[write]()
    assert (caught.value.path, caught.value.errno) == (str(tmp_path / META_NAME), codes.EIO)
    attempts[write]()


def test_an_unreadable_record_costs_none_of_its_neighbours(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 31 * EXTENT_BYTES * 4
    store = make(size_bytes=size)
    geometry = Geometry(size)
    bad = {0, Geometry.log_record_offset(7), geometry.map_page_offset(2)}
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if any(offset <= one < offset + length for one in bad):
            raise OSError(codes.EIO, "bad sector")
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert store.read_superblock_copies() == (b"", SUPERBLOCK)
    assert [position for position, raw in enumerate(store.read_log()) if not raw] == [7]
    assert [index for index, raw in store.read_map() if not raw] == [2]
    with pytest.raises(DamagedRecord):
        decode_map_page(store.read_map_page(2), 2)
    decode_map_page(store.read_map_page(1), 1)


# -- opening and making -----------------------------------------------------------------------------------------------


def descriptors() -> set[int]:
    # The listing's own descriptor is gone by the time that it is looked at.
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


def test_a_store_leaves_no_descriptor(make: Make, tmp_path: Path) -> None:
    make()
    before = descriptors()
    store = Store.open(tmp_path, tmp_path / DATA_NAME, SIZE)
    # The data; the metadata and its log; the two maps; what is parked.
    assert len(descriptors()) == len(before) + 1 + DURABLE_DESCRIPTORS + 2 + 2 + 1
    store.write(b"x", 0, True)
    store.close()
    for data_path in (tmp_path / "absent", tmp_path, Path("/dev/null")):
        with pytest.raises(OperatorError):
            Store.open(tmp_path, data_path, SIZE)
    with pytest.raises(OperatorError):
        Store.open(tmp_path, tmp_path / DATA_NAME, SIZE + 1)
    assert descriptors() == before


def test_descriptors_are_not_inherited(make: Make) -> None:
    before = descriptors()
    make()
    opened = descriptors() - before
    assert len(opened) > DURABLE_DESCRIPTORS
    assert not any(os.get_inheritable(fd) for fd in opened)


def test_a_truncated_data_file_is_named(make: Make, tmp_path: Path) -> None:
    make()
    os.truncate(tmp_path / DATA_NAME, SIZE - BLOCK_BYTES)
    with pytest.raises(OperatorError, match=str(SIZE - BLOCK_BYTES)) as caught:
        Store.open(tmp_path, tmp_path / DATA_NAME, SIZE)
    assert str(tmp_path / DATA_NAME) in caught.value.message
    assert caught.value.remedy


def test_the_size_may_come_from_the_superblock(make: Make, tmp_path: Path) -> None:
    make()
    store = Store.open(tmp_path, tmp_path / DATA_NAME)
    assert store.read_superblock_copies() == (SUPERBLOCK, SUPERBLOCK)
    with pytest.raises(AssertionError):
        store.read_map_page(0)
    with pytest.raises(ValueError, match="outside"):
        store.read(1, 0)
    with pytest.raises(OperatorError):
        store.set_size(2 * SIZE)
    store.set_size(SIZE)
    assert store.size_bytes == SIZE
    assert store.read(1, SIZE - 1) == b"\0"
    store.close()


def test_metadata_can_be_inspected_without_the_data(make: Make, tmp_path: Path) -> None:
    make()
    (tmp_path / DATA_NAME).unlink()
    store = Store.open(tmp_path, None, SIZE)
    assert len(list(store.read_map())) == 1
    assert len(store.read_log()) == LOG_RING_RECORDS
    store.close()


@pytest.mark.parametrize("there", [DATA_NAME, META_NAME])
def test_nothing_that_exists_is_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_bytes(b"precious")
    with pytest.raises(OperatorError, match="exists already"):
        create_replica_files(tmp_path, SIZE, None, SUPERBLOCK)
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_bytes() == b"precious"


def test_what_was_made_is_removed_when_the_metadata_does_not_fit(small_filesystem: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        create_replica_files(small_filesystem, 31 * EXTENT_BYTES * 256, None, SUPERBLOCK)
    assert caught.value.errno == codes.ENOSPC
    assert list(small_filesystem.iterdir()) == []


def test_metadata_is_allocated_first_the_superblock_written_last_and_all_is_durable(
    tmp_path: Path, calls: Calls
) -> None:
    writes = calls.spy("pwritev")
    calls.spy("posix_fallocate")
    calls.spy("fdatasync")
    calls.spy("fsync")
    create_replica_files(tmp_path, SIZE, None, SUPERBLOCK)
    assert [offset for _, _, offset, _ in writes][-2:] == [0, RECORD_BYTES]
    names = [name for name, _ in calls.seen]
    # Data; two maps; what is parked; room for all metadata, ring, map; superblocks; the directory.
    assert names == [
        "fsync",
        *(2 * ["posix_fallocate", "pwritev", "fsync"]),
        *("posix_fallocate", "fsync"),
        "posix_fallocate",
        "pwritev",
        "pwritev",
        "fdatasync",
        "pwritev",
        "pwritev",
        "fsync",
        "fsync",
    ]


def test_a_backing_keeps_its_contents_and_must_be_large_enough(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"x" * SIZE)
    directory = tmp_path / "replica"
    directory.mkdir()
    with pytest.raises(OperatorError, match="fewer than"):
        create_replica_files(directory, SIZE + BLOCK_BYTES, backing, SUPERBLOCK)
    with pytest.raises(OperatorError, match="does not exist"):
        create_replica_files(directory, SIZE, tmp_path / "absent", SUPERBLOCK)
    assert list(directory.iterdir()) == []
    create_replica_files(directory, SIZE, backing, SUPERBLOCK)
    assert sorted(path.name for path in directory.iterdir()) == sorted({*REPLICA_FILES} - {DATA_NAME})
    assert backing.read_bytes() == b"x" * SIZE


def test_files_are_private(make: Make, tmp_path: Path) -> None:
    make()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_volume_of_a_tebibyte_is_made_and_read_in_a_moment(make: Make) -> None:
    store = make(size_bytes=1 << 40)
    store.write(b"x", (1 << 40) - 1)
    assert store.extents(0, 1 << 40)[0][2]
    assert sum(1 for _ in store.read_map()) == Geometry(1 << 40).pages


def test_a_device_whose_pages_are_busy_is_zeroed_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fallocate on a device that is held with O_EXCL gives EBUSY while pages are written back."""
    (tmp_path / "data").write_bytes(b"x" * 16384)
    data = data_file.DataFile(tmp_path / "data", Runtime(), own=True)
    data.set_size(16384)

    def busy(*_: int) -> None:
        raise OSError(codes.EBUSY, "busy")

    monkeypatch.setattr(data_file, "_fallocate", busy)
    data.trim(4096, 4096)
    data.zero(8192, 4096, False)
    assert data.read(16384, 0) == b"x" * 4096 + bytes(8192) + b"x" * 4096
    data.close()

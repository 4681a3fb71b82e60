"""What every store does, real or simulated: one suite for all.

An implementation is a `Place`: it makes a store of a given size, and opens it again as a restarted process would.
"""

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

import mirror.store
from mirror.core.errors import DamagedRecord
from mirror.core.generation import Kind
from mirror.core.layout import (
    Geometry,
    LogRecord,
    Superblock,
    decode_log_record,
    decode_map_page,
    decode_superblock,
    encode_log_record,
    encode_map_page,
    encode_superblock,
)
from mirror.core.limits import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    EXTENTS_ANSWER_MAX,
    EXTENTS_PER_PAGE,
    KIB,
    LOG_RING_RECORDS,
    MIB,
    RECORD_BYTES,
    ZERO_PIECE_BYTES,
)
from mirror.core.states import DiskState
from mirror.store import (
    DATA_NAME,
    META_NAME,
    Store,
    create_replica_files,
    data_file,
    files,
    map_file,
    metadata_file,
    parked_file,
)
from tests.sim.disk import Disk, OsModule
from tests.sim.scheduler import Scheduler

SIZE = EXTENT_BYTES + 3 * BLOCK_BYTES


def superblock(sequence: int = 1, size_bytes: int = SIZE) -> bytes:
    return encode_superblock(
        Superblock(
            sequence=sequence,
            name="vol",
            size_bytes=size_bytes,
            replica_id=bytes(range(16)),
            volume_id=bytes(16),
            kind=Kind.FRESH,
            disk=DiskState.UP_TO_DATE,
            peer_disk=None,
            current=1,
            base=0,
            history=(),
            primary=False,
            clean=True,
            met_peer=False,
            incarnation=1,
            boot_id=bytes(16),
            log_slots=64,
            log_epoch=1,
            protocol="C",
            redundancy_lost_at=0.0,
            last_resync=None,
        )
    )


class Place(Protocol):
    def create(self, size_bytes: int = SIZE) -> Store: ...
    def reopen(self) -> Store: ...
    def end(self) -> None: ...


class FilePlace:
    """DIR/data and DIR/meta on a filesystem."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data_path = directory / DATA_NAME
        self.size_bytes = 0
        self.store: Store | None = None

    def create(self, size_bytes: int = SIZE) -> Store:
        self.size_bytes = size_bytes
        create_replica_files(self.directory, size_bytes, None, superblock(size_bytes=size_bytes))
        return self.reopen()

    def reopen(self) -> Store:
        if self.store is not None:
            self.store.close()
        self.store = Store.open(self.directory, self.data_path, self.size_bytes)
        return self.store

    def end(self) -> None:
        if self.store is not None:
            self.store.close()


class TmpfsPlace(FilePlace):
    """The same on tmpfs, which knows no ZERO_RANGE."""

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(dir="/dev/shm", prefix="nbdmirror-")))

    def end(self) -> None:
        super().end()
        shutil.rmtree(self.directory)


class LoopPlace(FilePlace):
    """A block device as backing, its old contents in place."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
            pytest.skip("a loop device takes root")

    def create(self, size_bytes: int = SIZE) -> Store:
        self.size_bytes = size_bytes
        image = self.directory / "image"
        with image.open("wb") as file:
            file.truncate(size_bytes)
        attach = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
        self.data_path = Path(attach.stdout.strip())
        create_replica_files(self.directory, size_bytes, self.data_path, superblock(size_bytes=size_bytes))
        return self.reopen()

    def end(self) -> None:
        super().end()
        if self.data_path.is_block_device():
            subprocess.run(["losetup", "--detach", self.data_path], check=True)


class SimulatedPlace(FilePlace):
    """The simulator's disk, under the very same store."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(Path("/n0"))
        scheduler = Scheduler(0, 0.0)
        self.disk = Disk(scheduler, "n0")
        simulated = OsModule(scheduler, lambda _path: self.disk)
        for module in (mirror.store, data_file, files, map_file, metadata_file, parked_file):
            patch.setattr(module, "os", simulated)
        patch.setattr(data_file, "_fallocate", simulated.fallocate)


@pytest.fixture(params=["file", "tmpfs", "loop", "simulated"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    made: Place
    if request.param == "file":
        made = FilePlace(tmp_path)
    elif request.param == "simulated":
        made = SimulatedPlace(monkeypatch)
    elif request.param == "tmpfs":
        made = TmpfsPlace()
    else:
        made = LoopPlace(tmp_path)
    yield made
    made.end()


def whole(store: Store) -> bytes:
    return store.read(store.size_bytes, 0)


# -- data -------------------------------------------------------------------------------------------------------------


def test_a_new_store_reads_as_zeroes(place: Place) -> None:
    store = place.create()
    assert not any(whole(store))
    assert store.size_bytes == SIZE


@pytest.mark.parametrize("seed", range(3))
def test_it_behaves_like_an_array_of_bytes(place: Place, rng: random.Random, seed: int) -> None:
    store = place.create()
    twin = bytearray(SIZE)
    for _ in range(120):
        length = rng.choice([1, 511, 512, 4095, BLOCK_BYTES, 3 * BLOCK_BYTES, rng.randrange(1, 2 * MIB)])
        offset = rng.randrange(SIZE - length + 1)
        if rng.random() < 0.6:
            offset = offset // BLOCK_BYTES * BLOCK_BYTES
        durable = rng.random() < 0.2
        verb = rng.choice(["write", "write", "zero", "zero", "trim", "read", "flush"])
        if verb == "write":
            contents = rng.randbytes(length)
            store.write(memoryview(contents), offset, durable)
            twin[offset : offset + length] = contents
        elif verb in ("zero", "trim"):
            if verb == "zero":
                store.zero(offset, length, rng.random() < 0.5, durable)
            else:
                store.trim(offset, length, durable)
            twin[offset : offset + length] = bytes(length)
        elif verb == "read":
            buffer = bytearray(length)
            store.read_into(memoryview(buffer), offset)
            assert buffer == twin[offset : offset + length]
            assert store.read(length, offset) == buffer
        else:
            store.flush()
    assert whole(store) == twin
    assert whole(place.reopen()) == twin


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, SIZE),
        (0, BLOCK_BYTES),
        (SIZE - BLOCK_BYTES, BLOCK_BYTES),
        (1, 1),
        (BLOCK_BYTES - 1, 2),
        (BLOCK_BYTES + 512, 2 * BLOCK_BYTES),
        (4095, 2 * ZERO_PIECE_BYTES + 2),
        (SIZE - 5, 5),
        (7, 0),
    ],
)
@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("verb", ["trim", "zero", "zero, may trim"])
def test_what_was_zeroed_reads_as_zeroes_and_nothing_else_does(
    place: Place, offset: int, length: int, verb: str, durable: bool
) -> None:
    store = place.create()
    store.write(b"\xa5" * SIZE, 0)
    for _ in range(2):
        if verb == "trim":
            store.trim(offset, length, durable)
        else:
            store.zero(offset, length, verb != "zero", durable)
        expected = bytearray(b"\xa5" * SIZE)
        expected[offset : offset + length] = bytes(length)
        assert whole(store) == expected


@pytest.mark.parametrize("durable", [False, True])
def test_any_buffer_of_bytes_can_be_written(place: Place, durable: bool) -> None:
    store = place.create()
    contents = os.urandom(BLOCK_BYTES)
    numbers = memoryview(bytearray(contents)).cast("I")
    for index, buffer in enumerate([contents, bytearray(contents), memoryview(contents), numbers]):
        store.write(buffer, index * BLOCK_BYTES, durable)
        assert store.read(BLOCK_BYTES, index * BLOCK_BYTES) == contents
    store.read_into(numbers, SIZE - BLOCK_BYTES)
    assert not any(numbers)
    store.write(b"", 0, durable)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (-BLOCK_BYTES, BLOCK_BYTES)])
def test_nothing_happens_outside_the_volume(place: Place, offset: int, length: int) -> None:
    store = place.create()
    with pytest.raises(ValueError, match="outside"):
        store.write(b"x" * length, offset)
    with pytest.raises(ValueError, match="outside"):
        store.write(b"x" * length, offset, True)
    with pytest.raises(ValueError, match="outside"):
        store.read(length, offset)
    with pytest.raises(ValueError, match="outside"):
        store.read_into(bytearray(length), offset)
    with pytest.raises(ValueError, match="outside"):
        store.zero(offset, length, True)
    with pytest.raises(ValueError, match="outside"):
        store.trim(offset, length)
    with pytest.raises(ValueError, match="outside"):
        store.extents(offset, length)
    with pytest.raises(ValueError, match="outside"):
        store.is_hole(offset, length)
    assert not any(whole(store))


# -- holes ------------------------------------------------------------------------------------------------------------


def assert_tells_the_truth(store: Store, offset: int, length: int) -> None:
    at = offset
    for start, size, hole in store.extents(offset, length):
        assert start == at
        assert size > 0
        assert not hole or not any(store.read(size, start))
        assert store.is_hole(start, size) is hole
        at += size
    assert at == offset + length


def test_extents_cover_the_range_and_no_hole_has_contents(place: Place, rng: random.Random) -> None:
    store = place.create()
    for _ in range(20):
        offset = rng.randrange(SIZE // BLOCK_BYTES) * BLOCK_BYTES
        store.write(b"x" * BLOCK_BYTES, offset)
        store.trim(rng.randrange(SIZE // BLOCK_BYTES) * BLOCK_BYTES, BLOCK_BYTES)
        start, end = sorted((rng.randrange(SIZE), rng.randrange(SIZE)))
        assert_tells_the_truth(store, start, end - start)
    assert_tells_the_truth(store, 0, SIZE)
    assert store.extents(5, 0) == []


def test_a_fragmented_file_is_described_in_bounded_answers(place: Place) -> None:
    size = (2 * EXTENTS_ANSWER_MAX + 100) * 4 * KIB
    store = place.create(size)
    for offset in range(0, size, 2 * BLOCK_BYTES):
        store.write(b"x", offset)
    at = 0
    while at < size:
        found = store.extents(at, size - at)
        assert 0 < len(found) <= EXTENTS_ANSWER_MAX
        assert found[0][0] == at
        at = found[-1][0] + found[-1][1]
    assert at == size


# -- metadata ---------------------------------------------------------------------------------------------------------


def test_a_new_store_has_sound_records_everywhere(place: Place) -> None:
    size = 40 * EXTENT_BYTES
    store = place.create(size)
    first, second = store.read_superblock_copies()
    assert first == second == superblock(size_bytes=size)
    log = store.read_log()
    assert len(log) == LOG_RING_RECORDS
    assert {decode_log_record(raw).epoch for raw in log} == {0}
    pages = list(store.read_map())
    assert [index for index, _ in pages] == list(range(Geometry(size).pages)) == [0, 1]
    assert all(decode_map_page(raw, index) == [0] * EXTENTS_PER_PAGE for index, raw in pages)
    assert store.read_map_page(1) == pages[1][1]


def test_a_superblock_replaces_both_copies(place: Place) -> None:
    store = place.create()
    for sequence in (2, 3):
        store.write_superblock(superblock(sequence))
    for opened in (store, place.reopen()):
        assert [decode_superblock(raw).sequence for raw in opened.read_superblock_copies()] == [3, 3]


def test_log_records_stand_where_they_were_put(place: Place) -> None:
    store = place.create()
    records = [
        encode_log_record(LogRecord(1, sequence, 64, ((3, sequence),), ())) for sequence in range(LOG_RING_RECORDS)
    ]
    for position in reversed(range(LOG_RING_RECORDS)):
        store.write_log_record(position, records[position])
    assert store.read_log() == records == place.reopen().read_log()


def test_reset_blanks_the_named_records(place: Place) -> None:
    store = place.create()
    record = encode_log_record(LogRecord(1, 1, 64, (), ()))
    for position in range(LOG_RING_RECORDS):
        store.write_log_record(position, record)
    store.reset_log([5])
    assert [position for position, raw in enumerate(store.read_log()) if raw != record] == [5]
    store.reset_log()
    assert {decode_log_record(raw).epoch for raw in store.read_log()} == {0}


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1], [2, 1, 0], [1], []])
def test_map_pages_stand_where_they_were_put(place: Place, order: list[int]) -> None:
    size = 4 * EXTENTS_PER_PAGE * EXTENT_BYTES
    store = place.create(size)
    store.write_map_pages((index, encode_map_page(index, [index + 1])) for index in order)
    for opened in (store, place.reopen()):
        found = {index: decode_map_page(raw, index)[0] for index, raw in opened.read_map()}
        assert found == {index: index + 1 if index in order else 0 for index in range(4)}


def test_a_map_larger_than_one_piece_is_read_and_written_whole(place: Place) -> None:
    pages = 600
    store = place.create(pages * EXTENTS_PER_PAGE * EXTENT_BYTES)
    store.write_map_pages((index, encode_map_page(index, [index])) for index in range(pages))
    assert [decode_map_page(raw, index)[0] for index, raw in store.read_map()] == list(range(pages))


@pytest.mark.parametrize("record", [b"", bytes(RECORD_BYTES - 1), bytes(RECORD_BYTES + 1)])
def test_only_whole_records_are_written(place: Place, record: bytes) -> None:
    store = place.create()
    with pytest.raises(AssertionError):
        store.write_superblock(record)
    with pytest.raises(AssertionError):
        store.write_log_record(0, record)
    with pytest.raises(AssertionError):
        store.write_log_record(LOG_RING_RECORDS, bytes(RECORD_BYTES))
    with pytest.raises(AssertionError):
        store.write_map_pages([(1, bytes(RECORD_BYTES))])
    assert decode_superblock(store.read_superblock_copies()[0]).sequence == 1


# -- files only: what a filesystem gives beyond the contents ----------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> FilePlace:
    return FilePlace(tmp_path)


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("made", ["file", "tmpfs"])
def test_space_is_given_back_by_trim_and_kept_by_zero(made: str, tmp_path: Path) -> None:
    files = FilePlace(tmp_path) if made == "file" else TmpfsPlace()
    try:
        store = files.create()
        assert store.can_fast_zero
        assert allocated(files.data_path) < MIB
        store.write(b"x" * SIZE, 0, True)
        assert allocated(files.data_path) >= SIZE
        store.zero(0, SIZE, False, True)
        assert allocated(files.data_path) >= SIZE
        store.write(b"x" * SIZE, 0, True)
        store.zero(0, EXTENT_BYTES, True, True)
        assert allocated(files.data_path) < SIZE - EXTENT_BYTES + MIB
        store.trim(0, SIZE, True)
        assert allocated(files.data_path) < MIB
        assert store.extents(0, SIZE) == [(0, SIZE, True)]
        assert files.data_path.stat().st_size == SIZE
        assert not any(whole(store))
    finally:
        files.end()


def test_all_metadata_is_allocated_from_the_start(directory: FilePlace) -> None:
    size = 100 * EXTENT_BYTES
    directory.create(size).close()
    directory.store = None
    assert allocated(directory.directory / META_NAME) >= Geometry(size).metadata_bytes
    assert (directory.directory / META_NAME).stat().st_size == Geometry(size).metadata_bytes


def test_a_short_metadata_file_is_damaged_where_it_ends(directory: FilePlace) -> None:
    size = 40 * EXTENT_BYTES
    store = directory.create(size)
    os.truncate(directory.directory / META_NAME, Geometry(size).map_page_offset(1) + 100)
    decode_map_page(store.read_map_page(0), 0)
    with pytest.raises(DamagedRecord):
        decode_map_page(store.read_map_page(1), 1)
    os.truncate(directory.directory / META_NAME, RECORD_BYTES)
    first, second = store.read_superblock_copies()
    decode_superblock(first)
    with pytest.raises(DamagedRecord):
        decode_superblock(second)
    assert len(store.read_log()) == LOG_RING_RECORDS
    for raw in store.read_log():
        with pytest.raises(DamagedRecord):
            decode_log_record(raw)

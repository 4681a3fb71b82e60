"""The files of a replica: the only package that touches them.

`DIR/meta` is the metadata (metadata_file.py says what it promises), `DIR/data` or a backing is the contents
(data_file.py); `DIR/suspects` and `DIR/unproven` are maps (map_file.py), `DIR/parked` holds writes that are not to be
applied yet (parked_file.py). Positioned system calls only, so threads share descriptors without locks; nothing is
cached and nothing is copied. OSError becomes DeviceError with its errno, so that a full disk (ENOSPC) is not taken for
a broken one.

`create_replica_files` allocates all metadata and writes it: a full filesystem can still be logged to.
"""

import os
from collections.abc import Callable
from pathlib import Path

from mirror.core.errors import OperatorError
from mirror.core.layout import (
    Geometry,
    blank_log_record,
    encode_suspects_page,
    encode_unproven_page,
)
from mirror.core.limits import EXTENTS_PER_PAGE, LOG_RING_RECORDS
from mirror.runtime import Runtime
from mirror.store.data_file import DataFile
from mirror.store.files import failed, flush_directory, write_all
from mirror.store.map_file import MapFile, fill
from mirror.store.metadata_file import MetadataFile, write_clean_pages
from mirror.store.parked_file import ParkedFile
from mirror.store.parked_file import fill as fill_parked

DATA_NAME = "data"
META_NAME = "meta"
SUSPECTS_NAME = "suspects"
UNPROVEN_NAME = "unproven"
PARKED_NAME = "parked"
# What `create` makes in the replica's directory.
REPLICA_FILES = (META_NAME, DATA_NAME, SUSPECTS_NAME, UNPROVEN_NAME, PARKED_NAME)


class Store:
    """The files of a replica; the calls go straight to `DataFile`, `MetadataFile`, `MapFile`: their docstrings hold."""

    def __init__(
        self, metadata: MetadataFile, data: DataFile | None, suspects: MapFile, unproven: MapFile, parked: ParkedFile
    ) -> None:
        self._metadata = metadata
        self._data = data
        self.suspects = suspects
        self.unproven = unproven
        self.parked = parked
        self.size_bytes = 0
        self.read_superblock_copies = metadata.read_superblock_copies
        self.write_superblock = metadata.write_superblock
        self.read_log = metadata.read_log
        self.write_log_record = metadata.write_log_record
        self.reset_log = metadata.reset_log
        self.read_map_page = metadata.read_map_page
        self.read_map = metadata.read_map
        self.write_map_pages = metadata.write_map_pages
        if data is None:
            return
        self.data_fd = data.data_fd
        self.can_fast_zero = data.can_fast_zero
        self.read_into = data.read_into
        self.read = data.read
        self.write = data.write
        self.commits = data.commits
        self.write_back_soon = data.write_back_soon
        self.flush = data.flush
        self.zero = data.zero
        self.trim = data.trim
        self.extents = data.extents
        self.is_hole = data.is_hole

    @staticmethod
    def open(
        directory: Path, data_path: Path | None, size_bytes: int | None = None, runtime: Runtime | None = None
    ) -> "Store":
        """Open a replica's files; without `data_path` only the metadata, to be inspected.

        Without `size_bytes` (the superblock has to be read first) `set_size` comes before data and map are touched.
        Raises OperatorError for what is missing or too small, DeviceError.
        """
        runtime = runtime or Runtime()
        metadata = MetadataFile(directory / META_NAME, runtime)
        opened: list[MetadataFile | MapFile | ParkedFile] = [metadata]
        try:
            suspects = MapFile(directory / SUSPECTS_NAME, runtime, _blank_suspects)
            opened.append(suspects)
            unproven = MapFile(directory / UNPROVEN_NAME, runtime, _blank_unproven)
            opened.append(unproven)
            parked = ParkedFile(directory / PARKED_NAME, make=data_path is not None)
            opened.append(parked)
            own = data_path == directory / DATA_NAME
            data = None if data_path is None else DataFile(data_path, runtime, own)
            store = Store(metadata, data, suspects, unproven, parked)
        except BaseException:
            for file in opened:
                file.close()
            raise
        try:
            if size_bytes is not None:
                store.set_size(size_bytes)
        except BaseException:
            store.close()
            raise
        return store

    def set_size(self, size_bytes: int) -> None:
        """The volume's size. Raises OperatorError when the data is smaller."""
        if self._data is not None:
            self._data.set_size(size_bytes)
        self._metadata.geometry = Geometry(size_bytes)
        self.suspects.pages = self._metadata.geometry.pages
        self.unproven.pages = self._metadata.geometry.unproven_pages
        self.size_bytes = size_bytes

    def check_room(self, size_bytes: int) -> None:
        """Raises OperatorError when the data is smaller."""
        if self._data is not None:
            self._data.check_room(size_bytes)

    def make_room(self, size_bytes: int, go_on: Callable[[], None]) -> None:
        """All that a volume of this size needs behind its present end, durable: the map's pages clean, the data zeroes.

        Nothing of what the volume has now is touched, and it may be repeated. `go_on` is called at times, and raises to
        break it off. Raises OperatorError when a backing is too small, DeviceError; then the room is given back.
        """
        assert self._data is not None, "without its data a replica can't grow"
        try:
            self._metadata.make_room(Geometry(size_bytes))
            self.grow_maps(size_bytes)
            self._data.make_room(size_bytes, go_on)
        except BaseException:
            self.give_room_back()
            raise

    def grow_maps(self, size_bytes: int) -> None:
        """Make `suspects` and `unproven` large enough for a volume of this size, before that size is durable."""
        geometry = Geometry(size_bytes)
        self.suspects.grow(geometry.pages)
        self.unproven.grow(geometry.unproven_pages)

    def give_room_back(self) -> None:
        """The volume does not grow: its files end where it ends, as far as they are its own."""
        geometry = Geometry(self.size_bytes)
        self._metadata.give_room_back()
        self.suspects.cut(geometry.pages)
        self.unproven.cut(geometry.unproven_pages)
        if self._data is not None:
            self._data.give_room_back()

    def close(self) -> None:
        self._metadata.close()
        self.suspects.close()
        self.unproven.close()
        self.parked.close()
        if self._data is not None:
            self._data.close()


def create_replica_files(directory: Path, size_bytes: int, backing: Path | None, superblock: bytes) -> None:
    """Make the maps, `meta`, and `data` unless there is a backing, in a directory that exists; durable on return.

    The superblock comes last: files of an interrupted creation are never taken for a replica. What was made is removed
    on failure. Raises OperatorError, DeviceError (ENOSPC when the metadata does not fit).
    """
    if backing is not None:
        data = DataFile(backing, Runtime(), own=False)
        data.close()
        if data.file_bytes < size_bytes:
            raise OperatorError(
                f"{backing} holds {data.file_bytes} bytes, fewer than the {size_bytes} of the volume",
                remedy="make it larger, or the volume smaller",
            )
    made: list[Path] = []
    try:
        if backing is None:
            _make(directory / DATA_NAME, made, lambda fd: os.ftruncate(fd, size_bytes))
        geometry = Geometry(size_bytes)
        _make(directory / SUSPECTS_NAME, made, lambda fd: fill(fd, geometry.pages, _blank_suspects))
        _make(directory / UNPROVEN_NAME, made, lambda fd: fill(fd, geometry.unproven_pages, _blank_unproven))
        _make(directory / PARKED_NAME, made, fill_parked)
        _make(directory / META_NAME, made, lambda fd: _write_first_metadata(fd, size_bytes, superblock))
        flush_directory(directory)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise


def _blank_suspects(number: int) -> bytes:
    return encode_suspects_page(number, [0] * EXTENTS_PER_PAGE)


def _blank_unproven(number: int) -> bytes:
    return encode_unproven_page(number, 0)


def _make(path: Path, made: list[Path], fill: Callable[[int], None]) -> None:
    """Make a file that must not exist, fill it, make it durable."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise OperatorError(f"{path} exists already", remedy="choose another directory, or destroy this one") from None
    except OSError as error:
        raise failed(path, "make", error) from error
    made.append(path)
    try:
        fill(fd)
        os.fsync(fd)
    except OSError as error:
        raise failed(path, "fill", error) from error
    finally:
        os.close(fd)


def _write_first_metadata(fd: int, size_bytes: int, superblock: bytes) -> None:
    geometry = Geometry(size_bytes)
    os.posix_fallocate(fd, 0, geometry.metadata_bytes)
    write_all(fd, blank_log_record() * LOG_RING_RECORDS, geometry.log_offset)
    write_clean_pages(fd, geometry, 0)
    os.fdatasync(fd)
    for offset in geometry.superblock_offsets:
        write_all(fd, superblock, offset)

"""The metadata file `DIR/meta`: superblock copies, log ring and map pages, as bytes.

mirror.core.layout encodes and decodes them and says where they stand. What the file is too short for, or the disk can't
read, comes back short, and the decoder calls it damaged.

Nothing is remembered of a failed write here: each call makes durable all that it vouches for, and no other call can
take the news of its failure: the log has a file description of its own, the rest shares one under a lock.

What lost: O_DIRECT for the log (92 instead of 96 µs a record at the median), one description for all (a failed
write-back of the map would be told to a log record, and never to the map).
"""

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mirror.core.layout import Geometry, blank_log_record, encode_map_page
from mirror.core.limits import EXTENTS_PER_PAGE, LOG_RING_RECORDS, METADATA_PIECE_BYTES, RECORD_BYTES
from mirror.runtime import Runtime
from mirror.store.files import failed, open_file, read_records, write_all

log = logging.getLogger(__name__)


class MetadataFile:
    """An open metadata file; `geometry` is set once the volume's size is known."""

    def __init__(self, path: Path, runtime: Runtime) -> None:
        self.path = path
        self.geometry: Geometry | None = None
        self._fd = open_file(path, os.O_RDWR)
        self._log_fd = open_file(path, os.O_RDWR)
        self._lock = runtime.lock()
        self._log_lock = runtime.lock()

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._log_fd)

    def _known(self) -> Geometry:
        assert self.geometry is not None, "the map's place is known only when the volume's size is"
        return self.geometry

    def _read_records(self, count: int, offset: int) -> list[bytes]:
        return read_records(self.path, self._fd, count, offset)

    def read_superblock_copies(self) -> tuple[bytes, bytes]:
        first, second = self._read_records(2, Geometry.superblock_offsets[0])
        return first, second

    def write_superblock(self, record: bytes) -> None:
        """Replace both copies, the second only when the first is durable: a crash leaves one of them whole."""
        assert len(record) == RECORD_BYTES, f"a superblock of {len(record)} bytes"
        with self._lock:
            try:
                for offset in Geometry.superblock_offsets:
                    write_all(self._fd, record, offset, os.RWF_DSYNC)
            except OSError as error:
                raise failed(self.path, "write the superblock of", error) from error

    def read_log(self) -> list[bytes]:
        return self._read_records(LOG_RING_RECORDS, Geometry.log_offset)

    def write_log_record(self, position: int, record: bytes) -> None:
        """Durable when this returns."""
        assert len(record) == RECORD_BYTES, f"a log record of {len(record)} bytes"
        assert 0 <= position < LOG_RING_RECORDS, f"ring position {position}"
        with self._log_lock:
            try:
                write_all(self._log_fd, record, Geometry.log_record_offset(position), os.RWF_DSYNC)
            except OSError as error:
                raise failed(self.path, "log to", error) from error

    def reset_log(self, positions: Iterable[int] = range(LOG_RING_RECORDS)) -> None:
        """Blank these records of the ring: torn or damaged ones whose extents are durably dirty by now."""
        for position in positions:
            self.write_log_record(position, blank_log_record())

    def read_map_page(self, index: int) -> bytes:
        return self._read_records(1, self._known().map_page_offset(index))[0]

    def read_map(self) -> Iterator[tuple[int, bytes]]:
        """All (index, page)."""
        geometry = self._known()
        step = METADATA_PIECE_BYTES // RECORD_BYTES
        for first in range(0, geometry.pages, step):
            count = min(step, geometry.pages - first)
            yield from enumerate(self._read_records(count, geometry.map_page_offset(first)), first)

    def write_map_pages(self, pages: Iterable[tuple[int, bytes]]) -> None:
        """Write these (index, page), then make them durable together."""
        geometry = self._known()
        with self._lock:
            try:
                for first, run in adjacent(pages):
                    assert 0 <= first <= geometry.pages - len(run), f"map pages {first} and {len(run) - 1} more"
                    write_all(self._fd, b"".join(run), geometry.map_page_offset(first))
                os.fdatasync(self._fd)
            except OSError as error:
                raise failed(self.path, "write the dirty map to", error) from error

    def make_room(self, geometry: Geometry) -> None:
        """Clean map pages behind the present ones, allocated and durable, for a volume that grows."""
        first = self._known().pages
        with self._lock:
            try:
                os.posix_fallocate(self._fd, 0, geometry.metadata_bytes)
                write_clean_pages(self._fd, geometry, first)
                os.fsync(self._fd)
            except OSError as error:
                raise failed(self.path, "make room for a larger dirty map in", error) from error

    def give_room_back(self) -> None:
        """The volume does not grow: nothing is needed behind the present pages, and nothing there would harm."""
        with self._lock:
            try:
                os.ftruncate(self._fd, self._known().metadata_bytes)
            except OSError as error:
                log.warning("%s keeps room that it does not need: %s", self.path, error.strerror)


def write_clean_pages(fd: int, geometry: Geometry, first: int) -> None:
    """Map pages from `first` on, all clean. Raises OSError."""
    clean = [0] * EXTENTS_PER_PAGE
    for start, run in adjacent((index, encode_map_page(index, clean)) for index in range(first, geometry.pages)):
        write_all(fd, b"".join(run), geometry.map_page_offset(start))


def adjacent(pages: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, list[bytes]]]:
    """Neighbours among successive pages as (first index, pages), as many as one piece of metadata holds."""
    first, run = 0, list[bytes]()
    for index, page in pages:
        if run and (index != first + len(run) or len(run) * RECORD_BYTES >= METADATA_PIECE_BYTES):
            yield first, run
            run = []
        if not run:
            first = index
        run.append(page)
    if run:
        yield first, run

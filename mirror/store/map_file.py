"""A file of map pages beside the metadata: `DIR/suspects` and `DIR/unproven`.

Records of 4 096 bytes, page n at n times that; mirror.core.layout encodes and decodes them. Such a map has a file of
its own, so the dirty map's place never moves, and a larger volume only means pages behind the last one.

`create` writes every page, and a missing file is made under another name first: a page that can't be read is therefore
damage, never the rest of an interrupted creation (invariant say-why). Pages are allocated: a full filesystem can still
keep what was found.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mirror.core.limits import METADATA_PIECE_BYTES, RECORD_BYTES
from mirror.runtime import Runtime
from mirror.store.files import failed, flush_directory, read_records, write_all

log = logging.getLogger(__name__)

# The page of this number, as `create` writes it.
BlankPage = Callable[[int], bytes]


class MapFile:
    """An open file of map pages, or one that is not there yet. `pages` is set once the volume's size is known."""

    def __init__(self, path: Path, runtime: Runtime, blank_page: BlankPage) -> None:
        self.path = path
        self.pages = 0
        self._blank_page = blank_page
        self._lock = runtime.lock()
        self._fd = self._open()

    def _open(self) -> int | None:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise failed(self.path, "open", error) from error

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def exists(self) -> bool:
        return self._fd is not None

    def make(self) -> None:
        """Make the missing file with blank pages, durable and whole when this returns. Raises DeviceError."""
        assert self._fd is None, f"{self.path} is there"
        new = self.path.with_name(self.path.name + ".new")
        try:
            fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fill(fd, self.pages, self._blank_page)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(new, self.path)
            flush_directory(self.path.parent)
        except OSError as error:
            raise failed(self.path, "make", error) from error
        self._fd = self._open()

    def read(self) -> Iterator[tuple[int, bytes]]:
        """All (number, page); what can't be read comes back short, and the decoder calls it damaged."""
        assert self._fd is not None, f"{self.path} was not made"
        step = METADATA_PIECE_BYTES // RECORD_BYTES
        for first in range(0, self.pages, step):
            count = min(step, self.pages - first)
            yield from enumerate(read_records(self.path, self._fd, count, first * RECORD_BYTES), first)

    def write(self, pages: Iterable[tuple[int, bytes]]) -> None:
        """Write these (number, page), then make them durable together. Raises DeviceError."""
        assert self._fd is not None, f"{self.path} was not made"
        with self._lock:
            try:
                for number, page in pages:
                    assert 0 <= number < self.pages, f"page {number} of {self.path}"
                    write_all(self._fd, page, number * RECORD_BYTES)
                os.fdatasync(self._fd)
            except OSError as error:
                raise failed(self.path, "write", error) from error

    def grow(self, pages: int) -> None:
        """Have room for a larger volume: blank pages behind the last one, durable when this returns.

        Before the volume's new size is durable. May be repeated: what is there stays.
        """
        assert self._fd is not None, f"{self.path} was not made"
        with self._lock:
            try:
                if pages > self.pages:
                    fill(self._fd, pages, self._blank_page, self.pages)
                    os.fsync(self._fd)
            except OSError as error:
                raise failed(self.path, "grow", error) from error
            self.pages = max(pages, self.pages)

    def cut(self, pages: int) -> None:
        """The volume does not grow: nothing behind these pages is needed, and nothing there would harm."""
        with self._lock:
            self.pages = pages
            try:
                if self._fd is not None:
                    os.ftruncate(self._fd, pages * RECORD_BYTES)
            except OSError as error:
                log.warning("%s keeps room that it does not need: %s", self.path, error.strerror)


def fill(fd: int, pages: int, blank_page: BlankPage, first: int = 0) -> None:
    """Write blank pages from `first` on. Raises OSError."""
    os.posix_fallocate(fd, 0, pages * RECORD_BYTES)
    step = METADATA_PIECE_BYTES // RECORD_BYTES
    for start in range(first, pages, step):
        numbers = range(start, min(start + step, pages))
        write_all(fd, b"".join(map(blank_page, numbers)), start * RECORD_BYTES)

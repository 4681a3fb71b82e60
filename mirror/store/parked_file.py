"""`DIR/parked`: writes that a secondary has and must not apply yet, so that a killed process loses none of them.

mirror.core.parked encodes them. Plain writes into the page cache: what they promise is what the data file's page cache
promises, to outlive the process and not the power. The file is allocated: a full filesystem can still park.
"""

import logging
import os
from pathlib import Path

from mirror.core.limits import PARKED_MAX
from mirror.core.parked import EMPTY_HEAD, FILE_BYTES, SLOT_BYTES, ParkedWrite, decode_slot, encode_slot
from mirror.store.files import failed, read_all, write_all

log = logging.getLogger(__name__)


class ParkedFile:
    """An open file of slots. Each slot has one user at a time."""

    def __init__(self, path: Path, make: bool) -> None:
        """`make` it where it is missing, as it is in a replica of an older release. Raises DeviceError."""
        self.path = path
        self._fd = self._open(make)

    def _open(self, make: bool) -> int | None:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return self._make() if make else None
        except OSError as error:
            raise failed(self.path, "open", error) from error
        return self._allocated(fd) if make else fd

    def _make(self) -> int | None:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT, 0o600)
        except OSError as error:
            self._warn(error)
            return None
        return self._allocated(fd)

    def _allocated(self, fd: int) -> int | None:
        """Also where it was copied with holes."""
        try:
            fill(fd)
        except OSError as error:
            os.close(fd)
            self._warn(error)
            return None
        return fd

    def _warn(self, error: OSError) -> None:
        """No more than that, for nothing needs the file."""
        log.warning("%s can't be made (%s): cold writes will take a round trip more", self.path, error.strerror)

    @property
    def exists(self) -> bool:
        return self._fd is not None

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def keep(self, slot: int, epoch: int, offset: int, data: bytes | memoryview) -> None:
        """The write outlives this process when this returns. Raises DeviceError."""
        self._write(slot, encode_slot(epoch, offset, data))

    def drop(self, slot: int) -> None:
        """It is applied. Raises DeviceError."""
        self._write(slot, EMPTY_HEAD)

    def _write(self, slot: int, content: bytes) -> None:
        assert self._fd is not None, f"{self.path} was not made"
        assert 0 <= slot < PARKED_MAX, f"slot {slot} of {self.path}"
        try:
            write_all(self._fd, content, slot * SLOT_BYTES)
        except OSError as error:
            raise failed(self.path, "park a write in", error) from error

    def read(self, epoch: int) -> dict[int, ParkedWrite]:
        """What is parked, by slot. Raises DeviceError."""
        if self._fd is None:
            return {}
        try:
            raw = read_all(self._fd, FILE_BYTES, 0)
        except OSError as error:
            raise failed(self.path, "read", error) from error
        found = {slot: decode_slot(raw[slot * SLOT_BYTES :][:SLOT_BYTES], epoch) for slot in range(PARKED_MAX)}
        return {slot: write for slot, write in found.items() if write is not None}

    def check_no_write_lost(self) -> None:
        """Raises DeviceError when the disk could not keep some of it: what is read may be of before then.

        The kernel tells that once, so nobody else asks it to write the file back.
        """
        if self._fd is None:
            return
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise failed(self.path, "flush", error) from error


def fill(fd: int) -> None:
    """All slots empty and allocated. Raises OSError."""
    os.posix_fallocate(fd, 0, FILE_BYTES)

"""The volume's contents: a sparse file, a backing file or a block device.

Promises
- A write returns when all of it is in the page cache, a durable one (RWF_DSYNC) when it is on the disk.
- After `zero` and `trim` the range reads as zeroes, whatever the file can do: a hole, an unwritten extent, or zeroes
  that are written.
- The first failed write-back is final: every later `flush` and durable write fails too (invariant flush). Linux tells
  each open file description of a failed write-back once and forgets it, so those that could take the news from each
  other have a description of their own: flushes share one and come in turn, each running durable write has another.

What lost: O_DIRECT (70 µs a write instead of 1, and readers without a cache), `fdatasync` after each durable write (it
flushes what others wrote, too), mmap (a page that can't be read is a signal, not an error).
"""

import ctypes
import errno as codes
import fcntl
import logging
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from mirror.core.commits import Commits
from mirror.core.errors import DeviceError, OperatorError
from mirror.core.limits import (
    BLOCK_BYTES,
    DURABLE_DESCRIPTORS,
    EXTENT_BYTES,
    EXTENTS_ANSWER_MAX,
    PIECE_BYTES_MAX,
    ZERO_PIECE_BYTES,
)
from mirror.core.unflushed import Unflushed
from mirror.core.units import exact_size_text
from mirror.runtime import Runtime
from mirror.store.files import Buffer, failed, open_file, read_all, write_all

log = logging.getLogger(__name__)

_ZEROES = memoryview(bytes(ZERO_PIECE_BYTES))
_BLKGETSIZE64 = 0x80081272

# fallocate(2); Python has only posix_fallocate, which knows no modes.
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
_HOLE = (_PUNCH_HOLE | _KEEP_SIZE,)
_UNWRITTEN = (_ZERO_RANGE | _KEEP_SIZE,)
# tmpfs knows no ZERO_RANGE; a hole that is allocated again reads as zeroes, too.
_HOLE_THEN_ALLOCATED = (_PUNCH_HOLE | _KEEP_SIZE, _KEEP_SIZE)
# What a way to zero a range takes: the modes of successive fallocate calls.
Ways = tuple[tuple[int, ...], ...]
_NEVER_POSSIBLE = (codes.EOPNOTSUPP, codes.ENOSYS)
# EBUSY: pages of a device are being written back; held with O_EXCL by the parent, it is not waited for.
_NOT_POSSIBLE_HERE = (*_NEVER_POSSIBLE, codes.EINVAL, codes.EBUSY)

# Of sync_file_range: wait for what is on its way, and begin without waiting for anything.
_AWAIT_WRITE_BACK, _BEGIN_WRITE_BACK = 0x01, 0x02
# It did not begin, or goes on later.
_NOTHING_LOST = (codes.ENOMEM, codes.EINTR, codes.EAGAIN, codes.ENOSYS, codes.EPERM)

_libc_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_libc_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc_sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range
_libc_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _libc_fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != codes.EINTR:
            raise OSError(number, os.strerror(number))


class DataFile:
    """An open data file; `size_bytes` of it are the volume."""

    def __init__(self, path: Path, runtime: Runtime, own: bool) -> None:
        """`own`: `create` made it, so nobody else decides its length."""
        self.path = path
        self._own = own
        self.size_bytes = 0
        self.data_fd = open_file(path, os.O_RDWR)
        self._durable_fds: list[int] = []
        try:
            self._durable_fds.extend(self._reopen() for _ in range(DURABLE_DESCRIPTORS))
            kind = os.fstat(self.data_fd).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise OperatorError(f"{path} is neither a file nor a block device", remedy="name another backing")
            self.is_device = stat.S_ISBLK(kind)
            self.file_bytes = self._measure()
        except BaseException:
            self.close()
            raise
        self._ways_to_trim: Ways = (_HOLE, _UNWRITTEN)
        self._ways_to_zero: Ways = (_UNWRITTEN,) if self.is_device else (_UNWRITTEN, _HOLE_THEN_ALLOCATED)
        self.can_fast_zero = self._probe_fast_zero()
        self.commits = Commits()
        self._unflushed = Unflushed()
        self._flush_lock = runtime.lock()
        self._write_back_lock = runtime.lock()
        # What the first failed write-back was: never forgotten.
        self._lost: tuple[str, OSError] | None = None

    def _reopen(self) -> int:
        """Another open file description of the very same file."""
        try:
            return os.open(f"/proc/self/fd/{self.data_fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise self._failed("open once more", error) from error

    def _measure(self) -> int:
        try:
            if self.is_device:
                return int(struct.unpack("Q", fcntl.ioctl(self.data_fd, _BLKGETSIZE64, bytes(8)))[0])
            return os.fstat(self.data_fd).st_size
        except OSError as error:
            raise self._failed("measure", error) from error

    def _probe_fast_zero(self) -> bool:
        """Whether zeroing costs less than writing."""
        if self.is_device:
            return self._device_zeroes_by_itself()
        try:
            # A hole behind the end changes nothing.
            _fallocate(self.data_fd, *_HOLE, -(-self.file_bytes // BLOCK_BYTES) * BLOCK_BYTES, BLOCK_BYTES)
        except OSError:
            return False
        return True

    def _device_zeroes_by_itself(self) -> bool:
        number = os.fstat(self.data_fd).st_rdev
        device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
        for queue in (device / "queue", device.parent / "queue"):
            try:
                return int((queue / "write_zeroes_max_bytes").read_text()) > 0
            except (OSError, ValueError):
                # A partition has no queue of its own: its disk's is asked next.
                continue
        return False

    def set_size(self, size_bytes: int) -> None:
        """Serve this many bytes; the file must have them."""
        if self.file_bytes < size_bytes:
            raise OperatorError(
                f"{self.path} holds {self.file_bytes} bytes, the volume has {size_bytes}: it was truncated or replaced",
                remedy="restore it, or make a new replica with `nbdmirror create --join` beside a good peer",
            )
        self._unflushed.grow(size_bytes)
        self.size_bytes = size_bytes

    def check_room(self, size_bytes: int) -> None:
        """Raises OperatorError when a volume of this size does not fit."""
        self.file_bytes = self._measure()
        if self.file_bytes < size_bytes:
            has, shall_have = exact_size_text(self.file_bytes), exact_size_text(size_bytes)
            raise OperatorError(
                f"{self.path} holds {has}, fewer than the {shall_have} that the volume shall have",
                remedy="make it larger first",
            )

    def make_room(self, size_bytes: int, go_on: Callable[[], None]) -> None:
        """What lies behind the volume's end, up to `size_bytes`, reads as zeroes, durably.

        An own file is cut off at the volume's end and made longer again: a hole, in no time. A backing must be large
        enough, and whatever it holds there is zeroed piece by piece; `go_on` is called before each.
        """
        if self._own:
            try:
                os.ftruncate(self.data_fd, self.size_bytes)
                os.ftruncate(self.data_fd, size_bytes)
            except OSError as error:
                raise self._failed("make longer", error) from error
        else:
            self.check_room(size_bytes)
            self._zero_behind_the_end(size_bytes, go_on)
        self._flush_length()
        self.check_room(size_bytes)

    def _zero_behind_the_end(self, end: int, go_on: Callable[[], None]) -> None:
        for offset in range(self.size_bytes, end, PIECE_BYTES_MAX):
            go_on()
            length = min(PIECE_BYTES_MAX, end - offset)
            try:
                if self.is_device:
                    self._zero_device(offset, offset + length, True)
                else:
                    self._zero_range(offset, length, True)
            except OSError as error:
                raise self._failed("zero", error) from error

    def _flush_length(self) -> None:
        """As `flush`, with the file's length."""
        with self._flush_lock:
            self._raise_lost()
            try:
                os.fsync(self.data_fd)
            except OSError as error:
                self._lost = ("flush", error)
            self._raise_lost_by_now()

    def give_room_back(self) -> None:
        """The volume does not grow."""
        if self._own:
            try:
                os.ftruncate(self.data_fd, self.size_bytes)
            except OSError as error:
                log.warning("%s stays longer than it needs to be: %s", self.path, error.strerror)

    def close(self) -> None:
        for fd in (self.data_fd, *self._durable_fds):
            os.close(fd)
        self._durable_fds.clear()

    def _failed(self, operation: str, error: OSError) -> DeviceError:
        return failed(self.path, operation, error)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise ValueError(f"{offset}+{length} is outside the volume of {self.size_bytes} bytes")

    # Reading

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill the buffer."""
        length = memoryview(buffer).nbytes
        if offset < 0 or offset + length > self.size_bytes:
            self._check(offset, length)
        try:
            done = os.preadv(self.data_fd, (buffer,), offset)
            if done != length:
                self._read_rest(memoryview(buffer).cast("B")[done:], offset + done)
        except OSError as error:
            raise self._failed("read", error) from error

    def _read_rest(self, rest: memoryview, offset: int) -> None:
        while rest:
            done = os.preadv(self.data_fd, (rest,), offset)
            if not done:
                raise OSError(codes.EIO, "the file ends within the volume")
            rest = rest[done:]
            offset += done

    def read(self, length: int, offset: int) -> bytes:
        self._check(offset, length)
        try:
            contents = read_all(self.data_fd, length, offset)
            if len(contents) != length:
                raise OSError(codes.EIO, "the file ends within the volume")
        except OSError as error:
            raise self._failed("read", error) from error
        return contents

    # Writing

    def write(self, buffer: Buffer, offset: int, durable: bool = False, resync: bool = False) -> None:
        """Write the buffer; durable: it is on the disk when this returns.

        `resync`: its flushes are not made even: they are bounded anyway (RESYNC_STABLE_BYTES), and the p99 of clients'
        writes beside them was a seventh longer.
        """
        length = memoryview(buffer).nbytes
        if offset < 0 or offset + length > self.size_bytes:
            self._check(offset, length)
        if durable:
            self._write_durable(buffer, offset)
            return
        try:
            done = os.pwrite(self.data_fd, buffer, offset)
            if done != length:
                write_all(self.data_fd, memoryview(buffer).cast("B")[done:], offset + done)
        except OSError as error:
            raise self._failed("write", error) from error
        self.commits.writes += 1
        if not resync:
            self._unflushed.wrote(offset, length)

    def write_back_soon(self, offset: int, length: int) -> None:
        """Let the disk begin with what was just written, where a flush is `likely`; for when nobody waits for it.

        Nothing is promised: the flush waits for it all the same, and tells of its errors. But for those at its very
        beginning: where ext4 can't allocate a delayed block it drops the page, and tells nobody else (invariant flush).
        What was written beside it in that page is gone as well, so this is no full disk, whatever the kernel calls it.
        """
        self._begin_write_back(offset, length)

    def _begin_write_back(self, offset: int, length: int) -> bool:
        """Whether it was begun."""
        with self._write_back_lock:
            if not _libc_sync_file_range(self.data_fd, offset, length, _BEGIN_WRITE_BACK):
                return True
            number = ctypes.get_errno()
            if number not in _NOTHING_LOST:
                self._lost = ("write-back", OSError(codes.EIO, os.strerror(number)))
                self._raise_lost()
            return False

    def _await_write_back(self, offset: int, length: int) -> bool:
        """Whether it was awaited. Called with the flush lock held: it takes the news of a failure from the flush.

        That may be any error, the one that the write-back met: none of itself but where there is no such call.
        """
        if not _libc_sync_file_range(self.data_fd, offset, length, _AWAIT_WRITE_BACK):
            return True
        number = ctypes.get_errno()
        if number != codes.ENOSYS:
            self._lost = ("flush", OSError(number, os.strerror(number)))
            self._raise_lost()
        return False

    def _write_durable(self, buffer: Buffer, offset: int) -> None:
        self._raise_lost()
        try:
            fd = self._durable_fds.pop()
        except IndexError:
            # More durable writes at once than there are descriptions.
            self._write_then_flush(buffer, offset)
            return
        try:
            write_all(fd, buffer, offset, os.RWF_DSYNC)
        except OSError as error:
            if error.errno not in (codes.ENOSPC, codes.EDQUOT):
                self._lost = ("durable write", error)
                raise self._failed("durable write", error) from error
            # Full before anything was written, or at the write-back, which is a loss: the flush, which has not been
            # told yet, knows which.
            self._write_then_flush(buffer, offset)
        finally:
            self._durable_fds.append(fd)
        self._raise_lost_by_now()

    def _write_then_flush(self, buffer: Buffer, offset: int) -> None:
        self.write(buffer, offset)
        self.flush()

    def flush(self) -> None:
        """Make everything written so far durable. Once this has failed it never succeeds again."""
        with self._flush_lock:
            self._raise_lost()
            self.commits.flushed()
            self._write_back_evenly(*self._unflushed.take())
            try:
                os.fdatasync(self.data_fd)
            except OSError as error:
                self._lost = ("flush", error)
            self._raise_lost_by_now()

    def _write_back_evenly(self, extents: list[int], at_once: int) -> None:
        """Before a flush of much: these extents, so many at once, so that others get their turn at the disk."""
        for number, extent in enumerate(extents):
            if not self._begin_write_back(extent * EXTENT_BYTES, EXTENT_BYTES):
                return
            if number >= at_once:
                first = extents[number - at_once]
                if not self._await_write_back(first * EXTENT_BYTES, EXTENT_BYTES):
                    return

    def _raise_lost_by_now(self) -> None:
        """The same after something was made durable: a write-back may just have dropped a page of it."""
        with self._write_back_lock:
            pass  # what it lost is known once it has ended
        self._raise_lost()

    def _raise_lost(self) -> None:
        if self._lost is not None:
            operation, error = self._lost
            raise self._failed(operation, error) from error

    # Zeroes

    def trim(self, offset: int, length: int, durable: bool = False) -> None:
        """Give the space back where possible; the range reads as zeroes in any case."""
        self.zero(offset, length, True, durable)

    def zero(self, offset: int, length: int, may_trim: bool, durable: bool = False) -> None:
        """The range reads as zeroes; its space is given back only if `may_trim`."""
        self._check(offset, length)
        try:
            if self.is_device:
                self._zero_device(offset, offset + length, may_trim)
            elif length:
                self._zero_range(offset, length, may_trim)
        except OSError as error:
            raise self._failed("trim" if may_trim else "zero", error) from error
        if durable:
            self.flush()

    def _zero_device(self, start: int, end: int, may_trim: bool) -> None:
        """Devices zero whole sectors only; the ends of the range are written."""
        first = min(-(-start // BLOCK_BYTES) * BLOCK_BYTES, end)
        last = max(end // BLOCK_BYTES * BLOCK_BYTES, first)
        self._write_zeroes(start, first - start)
        if last > first:
            self._zero_range(first, last - first, may_trim)
        self._write_zeroes(last, end - last)

    def _zero_range(self, offset: int, length: int, may_trim: bool) -> None:
        for way in self._ways_to_trim if may_trim else self._ways_to_zero:
            try:
                for mode in way:
                    _fallocate(self.data_fd, mode, offset, length)
                return
            except OSError as error:
                if error.errno not in _NOT_POSSIBLE_HERE:
                    raise
                if error.errno in _NEVER_POSSIBLE:
                    self._ways_to_trim = tuple(one for one in self._ways_to_trim if one != way)
                    self._ways_to_zero = tuple(one for one in self._ways_to_zero if one != way)
        self._write_zeroes(offset, length)

    def _write_zeroes(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            piece = min(end - offset, ZERO_PIECE_BYTES)
            write_all(self.data_fd, _ZEROES[:piece], offset)
            offset += piece

    # Holes

    def extents(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """(offset, length, hole) from `offset` on, without gaps; EXTENTS_ANSWER_MAX of them may not reach the end."""
        self._check(offset, length)
        found: list[tuple[int, int, bool]] = []
        at, end = offset, offset + length
        try:
            while at < end and len(found) < EXTENTS_ANSWER_MAX:
                data = self._seek(at, os.SEEK_DATA, end)
                if data > at:
                    found.append((at, data - at, True))
                    at = data
                    continue
                # At least to the next block, lest a hole that is punched meanwhile makes this stand still.
                hole = max(self._seek(at, os.SEEK_HOLE, end), min((at // BLOCK_BYTES + 1) * BLOCK_BYTES, end))
                found.append((at, hole - at, False))
                at = hole
        except OSError as error:
            raise self._failed("seek in", error) from error
        return found

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether nothing but a hole is there; finds out in no time where data begins the range.

        Where data ends is not asked: tmpfs goes through all its pages to tell.
        """
        self._check(offset, length)
        try:
            return self._seek(offset, os.SEEK_DATA, offset + length) == offset + length
        except OSError as error:
            raise self._failed("seek in", error) from error

    def _seek(self, at: int, what: int, end: int) -> int:
        """Where data or a hole begins, at most `end`; a device is all data."""
        if self.is_device:
            return at if what == os.SEEK_DATA else end
        try:
            return min(os.lseek(self.data_fd, at, what), end)
        except OSError as error:
            if error.errno == codes.ENXIO:
                return end
            raise

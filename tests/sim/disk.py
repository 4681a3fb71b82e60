"""Simulated `os` for mirror.store: files with a page cache that a power cut loses, keeps or tears, page by page.

A file has what the cache shows, what is durable, and for each page the versions that were written since it was made
durable: any of them, or a mixture of sectors, may be what a power cut leaves. A failed flush behaves as Linux does:
told once to each description that was open, then the pages count as clean although they never reached the disk.
"""

import ctypes
import errno
import os as real_os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.sim.scheduler import Process, Scheduler

PAGE_BYTES = 4096
SECTOR_BYTES = 512
# Small limits make small records: they are torn in smaller units, or each would stand in one sector.
RECORD_UNIT_BYTES = 8
ZERO_PAGE = bytes(PAGE_BYTES)
AWAIT_WRITE_BACK = 0x01
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
# None: a hole, which reads as zeroes.
Page = bytes | None
# A page as it was written, numbered in order.
Version = tuple[int, Page]


class File:
    """One file's pages: `cached` is what readers see."""

    def __init__(self, disk: "Disk", name: str) -> None:
        self.disk = disk
        self.name = name
        self.size_bytes = 0
        self.cached: dict[int, Page] = {}
        self.durable: dict[int, Page] = {}
        # Written since it was last made durable, oldest first.
        self.versions: dict[int, list[Version]] = {}
        self._serial = 0
        self.descriptions: list[Description] = []
        # A failed write-back that nobody was told of yet: whoever opens the file next is.
        self.untold = False

    def page(self, index: int) -> bytes:
        return self.cached.get(index) or ZERO_PAGE

    def durable_page(self, index: int) -> bytes:
        return self.durable.get(index) or ZERO_PAGE

    def stable(self, index: int) -> bool:
        """What readers see of this page survives a power cut."""
        return index not in self.versions and self.page(index) == self.durable_page(index)

    def put(self, index: int, page: Page) -> None:
        self.cached[index] = page
        self._serial += 1
        self.versions.setdefault(index, []).append((self._serial, page))

    def snapshot(self, pages: list[int] | None = None) -> dict[int, Version]:
        """What a flush that begins now will make durable."""
        wanted = self.versions if pages is None else [index for index in pages if index in self.versions]
        return {index: self.versions[index][-1] for index in wanted}

    def make_durable(self, taken: dict[int, Version]) -> None:
        for index, (serial, page) in taken.items():
            if self._forget(index, serial):
                self.durable[index] = page

    def lose(self, taken: dict[int, Version]) -> None:
        """The write-back failed: clean for the kernel, never on the disk."""
        for index, (serial, _) in taken.items():
            self._forget(index, serial)

    def _forget(self, index: int, serial: int) -> bool:
        """The versions up to this one need no flush any more; False when a later flush was quicker."""
        versions = self.versions.get(index)
        if versions is None or versions[0][0] > serial:
            return False
        left = [version for version in versions if version[0] > serial]
        if left:
            self.versions[index] = left
        else:
            del self.versions[index]
        return True

    def flip_a_bit(self, index: int) -> int:
        """Returns the sector of the page in which it is."""
        page = bytearray(self.page(index))
        random = self.disk.scheduler.random
        at = random.randrange(PAGE_BYTES)
        page[at] ^= 1 << random.randrange(8)
        self.cached[index] = self.durable[index] = bytes(page)
        return at // SECTOR_BYTES

    def power_cut(self) -> None:
        random = self.disk.scheduler.random
        for index, versions in self.versions.items():
            choices = [self.durable.get(index), *(page for _, page in versions)]
            page = random.choice(choices)
            if random.random() < 0.5:
                page, other = choices[-1], choices[-2] or ZERO_PAGE
                mixed = bytearray(page or ZERO_PAGE)
                unit = SECTOR_BYTES if self.name.endswith("/data") else RECORD_UNIT_BYTES
                for start in range(0, PAGE_BYTES, unit):
                    if random.random() < 0.5:
                        mixed[start : start + unit] = other[start : start + unit]
                page = bytes(mixed)
            self.durable[index] = page
        self.versions.clear()
        self.cached = dict(self.durable)
        self.descriptions.clear()
        self.untold = False


class Description:
    """An open file description; `news` is a failed write-back that it was not told yet."""

    def __init__(self, file: File, process: Process | None) -> None:
        self.file = file
        self.process = process
        self.news = file.untold
        file.descriptions.append(self)


class Disk:
    """One machine's disk, and its faults."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self.scheduler = scheduler
        self.name = name
        self.files: dict[str, File] = {}
        self.full = False
        self.stalled_until_s = 0.0
        # How many of the next calls of a kind fail with EIO.
        self.failing: dict[str, int] = {}
        self.slow = 1.0
        # The next write of data hangs in the kernel for so long.
        self.stick_s = 0.0
        # The next flush of data takes so long, while writes go on.
        self.stick_flush_s = 0.0
        self.on_write: Callable[[File, int, int], None] = lambda file, offset, length: None
        self.on_durable: Callable[[File, int, int], None] = lambda file, offset, length: None
        self.on_lost: Callable[[File], None] = lambda file: None

    def file(self, path: str) -> File:
        return self.files[path]

    def power_cut(self) -> None:
        for file in self.files.values():
            file.power_cut()
        self.stalled_until_s = 0.0

    def take(self, kind: str, cost_s: float) -> None:
        """One disk access: takes its time, and fails when it is told to."""
        scheduler = self.scheduler
        scheduler.check_alive()
        if scheduler.current is not None:
            if scheduler.now_s < self.stalled_until_s:
                scheduler.elapse(self.stalled_until_s - scheduler.now_s)
            elif cost_s and scheduler.random.random() < 0.5:
                scheduler.elapse(cost_s * self.slow * scheduler.random.random() * 2)
            else:
                scheduler.point()
        if self.failing.get(kind):
            self.failing[kind] -= 1
            raise OSError(errno.EIO, "Input/output error")


class OsModule:
    """In place of `os` in mirror: positioned system calls on simulated files, all else from the real one."""

    def __init__(self, scheduler: Scheduler, disk_of: Callable[[str], Disk]) -> None:
        self._scheduler = scheduler
        self._disk_of = disk_of
        self._open: dict[int, Description] = {}
        self._directories: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(real_os, name)

    def sched_yield(self) -> None:
        """Between two looks at a socket, and each of those gives way already."""

    def _process(self) -> Process | None:
        return None if self._scheduler.current is None else self._scheduler.current.process

    def _described(self, descriptor: int) -> Description:
        try:
            return self._open[descriptor]
        except KeyError:
            raise OSError(errno.EBADF, "Bad file descriptor") from None

    def open(self, path: str | Path, flags: int, mode: int = 0o600) -> int:
        self._scheduler.check_alive()
        name = str(path)
        if name.startswith("/proc/self/fd/"):
            file: File | None = self._described(int(name.rsplit("/", maxsplit=1)[1])).file
        elif flags & real_os.O_DIRECTORY:
            file = None
        else:
            disk = self._disk_of(name)
            file = disk.files.get(name)
            if file is None:
                if not flags & real_os.O_CREAT:
                    raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)
                file = disk.files[name] = File(disk, name)
            elif flags & real_os.O_EXCL:
                raise FileExistsError(errno.EEXIST, "File exists", name)
        # The lowest free number, as POSIX has it: what was closed by mistake is met again under another name.
        number = next(one for one in range(100, 100_000) if one not in self._open and one not in self._directories)
        if file is None:
            self._directories.add(number)
        else:
            self._open[number] = Description(file, self._process())
        return number

    def close(self, descriptor: int) -> None:
        self._directories.discard(descriptor)
        description = self._open.pop(descriptor, None)
        if description is not None and description in description.file.descriptions:
            description.file.descriptions.remove(description)

    def process_died(self, process: Process) -> None:
        for descriptor, description in list(self._open.items()):
            if description.process is process:
                self.close(descriptor)

    def fstat(self, descriptor: int) -> real_os.stat_result:
        size_bytes = self._described(descriptor).file.size_bytes
        return real_os.stat_result((stat.S_IFREG | 0o600, 0, 0, 1, 0, 0, size_bytes, 0, 0, 0))

    # Reading

    def pread(self, descriptor: int, length: int, offset: int) -> bytes:
        file = self._described(descriptor).file
        file.disk.take("read", 0.0)
        length = max(0, min(length, file.size_bytes - offset))
        if not length:
            return b""
        first, last = offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES
        if first == last:
            start = offset - first * PAGE_BYTES
            return file.page(first)[start : start + length]
        whole = b"".join([file.page(index) for index in range(first, last + 1)])
        start = offset - first * PAGE_BYTES
        return whole[start : start + length]

    def preadv(self, descriptor: int, buffers: tuple[Any, ...], offset: int) -> int:
        done = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            data = self.pread(descriptor, len(view), offset + done)
            view[: len(data)] = data
            done += len(data)
            if len(data) < len(view):
                break
        return done

    # Writing

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        return self.pwritev(descriptor, (data,), offset)

    def pwritev(self, descriptor: int, buffers: tuple[Any, ...], offset: int, flags: int = 0) -> int:
        description = self._described(descriptor)
        file = description.file
        disk = file.disk
        disk.take("write", 0.00005)
        if disk.stick_s and file.name.endswith("/data"):
            stick_s, disk.stick_s = disk.stick_s, 0.0
            self._scheduler.elapse(stick_s)
        data = b"".join([bytes(memoryview(one).cast("B")) for one in buffers])
        first, last = offset // PAGE_BYTES, (offset + max(len(data), 1) - 1) // PAGE_BYTES
        if disk.full and any(file.cached.get(index) is None for index in range(first, last + 1)):
            raise OSError(errno.ENOSPC, "No space left on device")
        for index in range(first, last + 1):
            # A large write is killed or interrupted between two of its pages.
            if index > first:
                self._scheduler.point()
            start, end = max(offset, index * PAGE_BYTES), min(offset + len(data), (index + 1) * PAGE_BYTES)
            part = data[start - offset : end - offset]
            if len(part) < PAGE_BYTES:
                old = file.page(index)
                at = start - index * PAGE_BYTES
                part = old[:at] + part + old[at + len(part) :]
            file.put(index, part)
        file.size_bytes = max(file.size_bytes, offset + len(data))
        disk.on_write(file, offset, len(data))
        if flags & real_os.RWF_DSYNC:
            self._flush(description, list(range(first, last + 1)), "flush-write")
            disk.on_durable(file, offset, len(data))
        return len(data)

    def _flush(self, description: Description, pages: list[int] | None, kind: str) -> None:
        file = description.file
        taken = file.snapshot(pages)
        try:
            file.disk.take(kind, 0.001)
        except OSError:
            file.lose(taken)
            for other in file.descriptions:
                other.news = other is not description
            file.disk.on_lost(file)
            raise
        if file.disk.stick_flush_s and kind == "flush" and file.name.endswith("/data"):
            stick_s, file.disk.stick_flush_s = file.disk.stick_flush_s, 0.0
            self._scheduler.elapse(stick_s)
        file.make_durable(taken)

    def sync_file_range(self, descriptor: int, offset: int, length: int, flags: int) -> int:
        """In place of libc's, as mirror.store.data_file calls it: a write-back, or waiting for one.

        Who waits is told of a failure as by a flush; else the next flush tells.
        """
        description = self._described(descriptor)
        file = description.file
        if flags & AWAIT_WRITE_BACK:
            file.disk.take("await", 0.00005)
            try:
                self._tell(description)
            except OSError as error:
                ctypes.set_errno(error.errno)
                return -1
            return 0
        taken = file.snapshot(list(range(offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES))))
        try:
            file.disk.take("flush", 0.00005)
        except OSError:
            file.lose(taken)
            for description in file.descriptions:
                description.news = True
            file.untold = True
        else:
            file.make_durable(taken)
        return 0

    def fsync(self, descriptor: int) -> None:
        if descriptor in self._open:  # not a directory
            self.fdatasync(descriptor)

    def fdatasync(self, descriptor: int) -> None:
        description = self._described(descriptor)
        self._tell(description)
        self._flush(description, None, "flush")
        # Of what another thread's write-back lost meanwhile, too: Linux looks when it has waited.
        self._tell(description)
        description.file.disk.on_durable(description.file, 0, description.file.size_bytes)

    @staticmethod
    def _tell(description: Description) -> None:
        if description.news:
            description.news = description.file.untold = False
            raise OSError(errno.EIO, "Input/output error")

    def ftruncate(self, descriptor: int, size_bytes: int) -> None:
        file = self._described(descriptor).file
        file.disk.take("write", 0.0)
        file.size_bytes = size_bytes

    def posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
        file = self._described(descriptor).file
        if file.disk.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        for index in range(offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES)):
            if file.cached.get(index) is None:
                file.cached[index] = file.durable[index] = ZERO_PAGE
        file.size_bytes = max(file.size_bytes, offset + length)

    # Holes

    def fallocate(self, descriptor: int, mode: int, offset: int, length: int) -> None:
        """In place of libc's, as mirror.store.data_file calls it; raises what it would tell in errno."""
        file = self._described(descriptor).file
        disk = file.disk
        disk.take("zero", 0.00005)
        if mode == KEEP_SIZE:
            return
        end = min(offset + length, file.size_bytes) if file.size_bytes > offset else offset
        for index in range(offset // PAGE_BYTES, -(-end // PAGE_BYTES)):
            start, stop = max(offset, index * PAGE_BYTES), min(end, (index + 1) * PAGE_BYTES)
            if stop - start == PAGE_BYTES:
                file.put(index, None if mode & PUNCH_HOLE else ZERO_PAGE)
            elif file.cached.get(index) is not None:
                old = file.page(index)
                at = start - index * PAGE_BYTES
                file.put(index, old[:at] + bytes(stop - start) + old[at + stop - start :])
            self._scheduler.point()
        if end > offset:
            disk.on_write(file, offset, end - offset)

    def lseek(self, descriptor: int, offset: int, whence: int) -> int:
        file = self._described(descriptor).file
        file.disk.take("read", 0.0)
        pages = -(-file.size_bytes // PAGE_BYTES)
        first = offset // PAGE_BYTES
        for index in range(first, pages):
            has_data = file.cached.get(index) is not None
            if has_data == (whence == real_os.SEEK_DATA):
                return max(offset, index * PAGE_BYTES)
        if whence == real_os.SEEK_DATA:
            raise OSError(errno.ENXIO, "No such device or address")
        return file.size_bytes
